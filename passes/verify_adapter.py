"""verify-adapter: check, with readers we did not write, that an export is the function that was trained.

Rules:
1. The static contract of the format is kept (`qpa.exporters.contracts`), the manifest's digests
   included.
2. The base model's config.json is the one of the manifest, before any code of the model runs, and its
   answers are those of the base that was trained on. The manifest may be anybody's: that it asks for
   the model's own Python code is no permission to run it.
3. The engines load the directory in a fresh process that cannot import qpa, Qiskit, PennyLane or Cirq; on
   request in the Python of another environment, for engines that need one of their own.
4. Each engine finds every tensor it wants and wants every tensor it finds.
5. Its logits are the live model's within `tolerance * max(1, largest live logit)`, and they are not
   the base model's; its greedy tokens are the live model's. An engine without logits is judged by its
   tokens alone: they are the live model's, and not those of the base.
6. An export in a smaller type is the live model rounded. The logits are at least four times nearer to the
   live model's than to the base's. Where there are logits, its greedy tokens are reported and not judged.
7. A tolerance that is given holds as it is. Where none is given, it is TOLERANCE, and the bound is wider for
   an engine with a tolerance of its own, and for an export in a smaller type: there it grows by ROUNDING
   times the type's unit roundoff, times what was rounded: the largest effect of the adapter on the logits,
   or, of merged weights, the largest logit.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import qpa
from qpa.documents import (
    BaseModelReference,
    Document,
    EngineCheck,
    Manifest,
    Verification,
    read_manifest,
)
from qpa.documents.manifest import FORMATS
from qpa.documents.verification import ENGINES, NeededFile
from qpa.errors import ModelError, OptionError, VerificationError, last_sentence
from qpa.pipeline.options import check_options, option
from qpa.pipeline.pass_protocol import PassContext

WORKER = Path(str(qpa.__file__)).parent / "engines" / "worker.py"
_TRACEBACK = "Traceback (most recent call last):"
ROUNDOFF = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
ROUNDING = 16.0
TOLERANCE = 1e-5


@final
@dataclass(frozen=True, slots=True)
class VerifyAdapter:
    """Ask independent readers to answer the probe from the exported files alone.

    Args:    directory: the exported directory the manifest describes.
             model: where the base model is now; None for where the manifest says.
             trust_remote_code: the user allows the model's own Python code to run.
             tolerance: largest logit difference, in units of max(1, largest |live logit|); None is TOLERANCE,
             and more where an engine or the export's type rounds.
             engines: names that the export's format lists; None is those that this Python has.
             base_gguf: the base model as GGUF, for llama.cpp.
             python: interpreter of the environment that has the engines; None is this one.
    Source:  ours.
    """

    name: ClassVar[str] = "verify-adapter"
    consumes: ClassVar[type] = Manifest
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = Verification
    section: ClassVar[str] = "verify"

    directory: str = option(
        help="Adapter directory, run, or compact adapter.", is_path=True, positional=True, provenance=False
    )
    model: str | None = option(
        None,
        help="Base model to verify with.",
        shown_default="the one it was trained on",
        provenance=False,
    )
    tolerance: float | None = option(
        None,
        help="Largest difference of logits, in units of the largest live one or of 1; "
        "a tolerance that is given holds for every engine and type.",
        shown_default=f"{TOLERANCE:g}, and more for engines and types of numbers that round",
        above=0,
    )
    engines: tuple[str, ...] | None = option(
        None,
        name="engine",
        help="Engines that read the format, separated by commas, of {choices}; or all.",
        choices=ENGINES,
        shown_default="all that are installed",
    )
    base_gguf: str | None = option(None, help="The base model as GGUF, for llama.cpp.", provenance=False)
    python: str | None = option(
        None,
        help="Python of the environment that has the engines.",
        shown_default="this one",
        provenance=False,
    )
    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the model.", provenance=False
    )

    def run(self, source: Manifest, context: PassContext) -> Verification:
        """Check the files, then every engine's answers.

        Raises:  OptionError: an unknown engine or a tolerance that is not positive.
                 ModelError: the model needs its own Python code, and the user did not allow it.
                 VerificationError: any rule of this module is broken.
        """
        from qpa.models.base_model import moved_base

        engines = self._engines(source)
        self._check_static(source)
        base = moved_base(source.base, self.model)
        self._check_base(base)
        context.progress("loading the adapter in an independent process", 0, 1)
        answer = self._ask(source, base, engines)
        context.progress("loading the adapter in an independent process", 1, 1)
        scale = max(1.0, answer["largest_live_logit"])
        tolerance = TOLERANCE if self.tolerance is None else self.tolerance
        self._check_base_answer(base, answer["base_difference"], tolerance * scale)
        rounded = scale if FORMATS[source.format].merges else answer["largest_adapter_effect"]
        rounding = ROUNDING * ROUNDOFF[source.dtype] * rounded
        for engine in answer["engines"]:
            if engine["max_logit_difference"] is None:
                engine["base_tokens_equal"] = engine["greedy_tokens"] == answer["base_tokens"]
            bound = self._bound(engine["engine"], scale, rounding)
            engine["bound"] = None if engine["max_logit_difference"] is None else bound
            self._check_engine(engine, bound, exact=source.dtype == "float32")
        return Verification(
            provenance=context.provenance(self, source),
            engines=tuple(_engine_check(engine) for engine in answer["engines"]),
            tolerance=tolerance,
        )

    def _bound(self, engine: str, scale: float, rounding: float) -> float:
        """Return how far an engine's logits may be from the live model's, see rule 7."""
        if self.tolerance is not None:
            return self.tolerance * scale
        return max(TOLERANCE * scale + rounding, ENGINES[engine].tolerance * scale)

    def _engines(self, source: Manifest) -> tuple[str, ...]:
        """Return the engines to ask."""
        check_options(self)
        known = FORMATS[source.format].engines
        if not known:
            raise OptionError("engines", f"an engine that reads {source.format}", "none", "use `static`")
        if self.python is not None and self.engines is None:
            raise OptionError("engines", "names of engines beside `python`", "none")
        engines = tuple(filter(is_here, known)) if self.engines is None else self.engines
        expected = ", ".join(known)
        if unknown := [engine for engine in engines if engine not in known]:
            raise OptionError("engines", expected, ", ".join(unknown))
        if not engines:
            raise OptionError("engines", expected, "none that is installed", "see `python`, or use `static`")
        if self.python is None and (missing := [engine for engine in engines if not is_here(engine)]):
            advice = "pass `python`, the interpreter of an environment that has it"
            raise OptionError("engines", "an engine that is installed", missing[0], advice)
        for needed in self._needed(engines):
            path = getattr(self, needed.option)
            if not Path(path or "").is_file():
                raise OptionError(needed.option, needed.expected, path or "none", needed.advice)
        return engines

    def _needed(self, engines: tuple[str, ...]) -> tuple[NeededFile, ...]:
        return tuple(needed for engine in engines for needed in ENGINES[engine].needs)

    def _ask(self, source: Manifest, base: BaseModelReference, engines: tuple[str, ...]) -> dict[str, Any]:
        """Return the base model's answer from this environment, and the engines' from theirs."""
        if self.python is None:
            return self._ask_worker(sys.executable, source, base, engines, checks_base=True)
        here = self._ask_worker(sys.executable, source, base, (), checks_base=True)
        there = self._ask_worker(self.python, source, base, engines, checks_base=False)
        return here | {"engines": there["engines"]}

    def _check_static(self, source: Manifest) -> None:
        findings = FORMATS[source.format].findings(Path(self.directory), source)
        if findings:
            first, others = findings[0], len(findings) - 1
            raise VerificationError(
                f"{self.directory}: {first.rule} {first.subject}",
                first.expected,
                first.found,
                f"{others} more with `static`" if others else "",
            )
        if read_manifest(Path(self.directory)) != source:
            raise VerificationError(self.directory, "the files of this manifest", "those of another")

    def _check_base(self, base: BaseModelReference) -> None:
        from qpa.models.base_model import check_base, check_permission

        check_permission(base, trust_remote_code=self.trust_remote_code)
        try:
            check_base(base, trust_remote_code=self.trust_remote_code)
        except ModelError as error:
            advice = error.advice or "say where the base model is: `model`"
            raise VerificationError(error.subject, error.expected, error.found, advice) from error

    def _ask_worker(
        self,
        python: str,
        source: Manifest,
        base: BaseModelReference,
        engines: tuple[str, ...],
        *,
        checks_base: bool,
    ) -> dict[str, Any]:
        asked = [ENGINES[engine] for engine in engines]
        request = {
            "directory": self.directory,
            "merges": FORMATS[source.format].merges,
            "checks_base": checks_base,
            "probe": str(Path(self.directory) / source.probe),
            "model": base.name_or_path,
            "revision": base.revision,
            "trust_remote_code": base.trust_remote_code,
            "engines": [{"name": r.name, "package": r.package, "file": r.file} for r in asked],
        }
        request |= {needed.option: getattr(self, needed.option) for needed in self._needed(engines)}
        finished = subprocess.run(
            [python, "-I", str(WORKER)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            check=False,
        )
        if finished.returncode != 0:
            found = _what_was_raised(finished.stderr) or f"exit status {finished.returncode}"
            raise VerificationError(self.directory, "an adapter that engines load", found)
        answer: dict[str, Any] = json.loads(finished.stdout)
        return answer

    def _check_base_answer(self, base: BaseModelReference, difference: float, bound: float) -> None:
        if not difference <= bound:
            raise VerificationError(
                base.name_or_path,
                f"the base model's logits within {bound:.1e} of those in training",
                f"a difference of {difference:.1e}",
                "its weights are not the ones the adapter was trained on",
            )

    def _check_engine(self, answer: dict[str, Any], bound: float, *, exact: bool) -> None:
        subject = f"{self.directory} in {answer['engine']}"
        for kind in ("missing", "unexpected"):
            if keys := answer[f"{kind}_keys"]:
                raise VerificationError(subject, f"no {kind} key", f"{len(keys)}, the first {keys[0]}")
        self._check_answers(subject, answer, bound)
        if (exact or answer["max_logit_difference"] is None) and not answer["greedy_tokens_equal"]:
            found = f"others: {answer['greedy_tokens']}"
            raise VerificationError(subject, "the trained model's greedy tokens", found)

    def _check_answers(self, subject: str, answer: dict[str, Any], bound: float) -> None:
        """Compare the logits, or, of an engine without, the tokens with the base model's."""
        difference, from_base = answer["max_logit_difference"], answer["max_base_difference"]
        if answer.get("base_tokens_equal") or (from_base is not None and from_base <= bound):
            is_live = answer["greedy_tokens_equal"] if difference is None else difference <= bound
            found = "the adapter changes nothing" if is_live else "the adapter was ignored"
            expected = "answers that differ from the base model's"
            raise VerificationError(subject, expected, f"the base model's: {found}")
        if difference is not None and not difference <= bound:
            expected = f"the trained model's logits within {bound:.1e}"
            raise VerificationError(subject, expected, f"a difference of {difference:.1e}")
        if difference is not None and not 4 * difference <= from_base:
            expected = f"logits four times nearer to the trained model's than to the base's, {from_base:.1e}"
            raise VerificationError(subject, expected, f"a difference of {difference:.1e}", "use float32")


def _what_was_raised(stderr: str) -> str:
    """Return how the last exception's message in a process's stderr ends, or how stderr does; "" for nothing.

    A message may have several lines, and a line may stand behind the mark of its process, "[rank0]: ".
    """
    before, traceback, after = stderr.strip().rpartition(_TRACEBACK)
    mark = before.splitlines()[-1] if traceback and before and not before.endswith("\n") else ""
    of_process = [line for line in after.splitlines() if line.startswith(mark)]  # others are progress bars
    lines = [line.removeprefix(mark) for line in of_process if line.removeprefix(mark).strip()]
    frames = itertools.takewhile(lambda line: line[:1].isspace(), lines)
    message = lines[len(list(frames)) :] if traceback else []
    return last_sentence("\n".join(message or lines[-1:])) if lines else ""


def _engine_check(answer: dict[str, Any]) -> EngineCheck:
    return EngineCheck.model_validate_json(json.dumps(answer))


def is_here(engine: str) -> bool:
    return importlib.util.find_spec(ENGINES[engine].package) is not None
