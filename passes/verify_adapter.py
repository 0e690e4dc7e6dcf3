"""verify-adapter: is an exported directory the function that was trained, for readers we did not write?

Rules:
1. The static contract of `qpa.exporters.lora_contract` is kept, the manifest's digests included.
2. The base model's config is the one of the manifest, and its answers are those of the base that was
   trained on.
3. Each engine loads the directory in a process that can import neither qpa nor anything quantum.
4. Each engine finds every tensor it wants and wants every tensor it finds.
5. Its logits are the live model's within `tolerance * max(1, largest live logit)`, and they are not
   the base model's; its greedy tokens are the live model's.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from qpa.documents import Document, EngineCheck, Manifest, Verification, read_manifest
from qpa.errors import ModelError, OptionError, VerificationError
from qpa.exporters.lora_contract import check_lora_contract
from qpa.pipeline import PassContext

ENGINES = ("peft", "transformers")
WORKER = Path(__file__).with_name("verify_worker.py")


@final
@dataclass(frozen=True, slots=True)
class VerifyAdapter:
    """Ask independent readers to answer the probe from the exported files alone.

    Args:    directory: the exported directory the manifest describes.
             model: where the base model is now; None for where the manifest says.
             tolerance: largest logit difference, in units of max(1, largest |live logit|).
             engines: any of "peft" and "transformers".
    Source:  ours.
    """

    name: ClassVar[str] = "verify-adapter"
    consumes: ClassVar[type] = Manifest
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = Verification

    directory: str
    model: str | None = None
    tolerance: float = 1e-5
    engines: tuple[str, ...] = ENGINES

    def run(self, source: Manifest, context: PassContext) -> Verification:
        """Check the files, then every engine's answers.

        Raises:  OptionError: an unknown engine or a tolerance that is not positive.
                 VerificationError: any rule of this module is broken.
        """
        self._check_options()
        self._check_static(source)
        self._check_base(source)
        context.progress("loading the adapter in independent processes", 0, 1)
        answer = self._ask_worker(source)
        context.progress("loading the adapter in independent processes", 1, 1)
        bound = self.tolerance * max(1.0, answer["largest_live_logit"])
        self._check_base_answer(source, answer["base_difference"], bound)
        for engine in answer["engines"]:
            self._check_engine(engine, bound)
        return Verification(
            provenance=context.provenance(self, source),
            engines=tuple(_engine_check(engine) for engine in answer["engines"]),
            tolerance=self.tolerance,
        )

    def _check_options(self) -> None:
        unknown = [engine for engine in self.engines if engine not in ENGINES]
        if unknown or not self.engines:
            raise OptionError("engines", " or ".join(ENGINES), ", ".join(unknown) or "none")
        if not 0.0 < self.tolerance < math.inf:
            raise OptionError("--tolerance", "a finite number above 0", str(self.tolerance))

    def _check_static(self, source: Manifest) -> None:
        findings = check_lora_contract(Path(self.directory))
        if findings:
            first, others = findings[0], len(findings) - 1
            raise VerificationError(
                f"{self.directory}: {first.rule} {first.subject}",
                first.expected,
                first.found,
                f"{others} more with --static" if others else "",
            )
        if read_manifest(Path(self.directory)) != source:
            raise VerificationError(self.directory, "the files of this manifest", "those of another")

    def _check_base(self, source: Manifest) -> None:
        from qpa.base_model import check_config, load_config

        base = source.base
        try:
            config = load_config(
                self._model(source),
                revision=self._revision(source),
                trust_remote_code=base.trust_remote_code,
            )
            check_config(base, config)
        except ModelError as error:
            advice = error.advice or "say where the base model is: --model"
            raise VerificationError(error.subject, error.expected, error.found, advice) from error

    def _ask_worker(self, source: Manifest) -> dict[str, Any]:
        request = {
            "directory": self.directory,
            "probe": str(Path(self.directory) / source.probe),
            "model": self._model(source),
            "revision": self._revision(source),
            "trust_remote_code": source.base.trust_remote_code,
            "engines": self.engines,
        }
        finished = subprocess.run(
            [sys.executable, "-I", str(WORKER)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            check=False,
        )
        if finished.returncode != 0:
            lines = finished.stderr.strip().splitlines()
            found = lines[-1].strip() if lines else f"exit status {finished.returncode}"
            raise VerificationError(self.directory, "an adapter that engines load", found[:300])
        answer: dict[str, Any] = json.loads(finished.stdout)
        return answer

    def _check_base_answer(self, source: Manifest, difference: float, bound: float) -> None:
        if not difference <= bound:
            raise VerificationError(
                self._model(source),
                f"the base model's logits within {bound:.1e} of those in training",
                f"a difference of {difference:.1e}",
                "its weights are not the ones the adapter was trained on",
            )

    def _check_engine(self, answer: dict[str, Any], bound: float) -> None:
        subject = f"{self.directory} in {answer['engine']}"
        for kind in ("missing", "unexpected"):
            if keys := answer[f"{kind}_keys"]:
                raise VerificationError(subject, f"no {kind} key", f"{len(keys)}, the first {keys[0]}")
        difference = answer["max_logit_difference"]
        if answer["max_base_difference"] == 0.0:
            found = "the base model's: " + (
                "the adapter changes nothing" if difference <= bound else "the adapter was ignored"
            )
            raise VerificationError(subject, "answers that differ from the base model's", found)
        if not difference <= bound:
            expected = f"the trained model's logits within {bound:.1e}"
            raise VerificationError(subject, expected, f"a difference of {difference:.1e}")
        if not answer["greedy_tokens_equal"]:
            found = f"others: {answer['greedy_tokens']}"
            raise VerificationError(subject, "the trained model's greedy tokens", found)

    def _model(self, source: Manifest) -> str:
        return self.model or source.base.name_or_path

    def _revision(self, source: Manifest) -> str | None:
        return source.base.revision if self.model is None else None


def _engine_check(answer: dict[str, Any]) -> EngineCheck:
    return EngineCheck(
        engine=answer["engine"],
        max_logit_difference=answer["max_logit_difference"],
        max_base_difference=answer["max_base_difference"],
        greedy_tokens=tuple(answer["greedy_tokens"]),
        greedy_tokens_equal=answer["greedy_tokens_equal"],
        missing_keys=tuple(answer["missing_keys"]),
        unexpected_keys=tuple(answer["unexpected_keys"]),
    )
