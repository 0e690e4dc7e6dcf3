"""verify-adapter: is an exported directory the function that was trained, for readers we did not write?

Rules:
1. The static contract of `qpa.exporters.lora_contract` is kept, the manifest's digests included.
2. The base model's config.json is the one of the manifest, before any code of the model runs, and its
   answers are those of the base that was trained on. The manifest may be anybody's: that it asks for
   the model's own Python code is no permission to run it.
3. The engines load the directory in one fresh process that cannot import qpa, Qiskit, PennyLane or Cirq.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

from qpa.documents import (
    BaseModelReference,
    Document,
    EngineCheck,
    Manifest,
    Verification,
    read_manifest,
)
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
             trust_remote_code: the user allows the model's own Python code to run.
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
    trust_remote_code: bool = field(default=False, metadata={"provenance": False})

    def run(self, source: Manifest, context: PassContext) -> Verification:
        """Check the files, then every engine's answers.

        Raises:  OptionError: an unknown engine or a tolerance that is not positive.
                 ModelError: the model needs its own Python code, and the user did not allow it.
                 VerificationError: any rule of this module is broken.
        """
        from qpa.base_model import moved_base

        self._check_options()
        self._check_static(source)
        base = moved_base(source.base, self.model)
        self._check_base(base)
        context.progress("loading the adapter in an independent process", 0, 1)
        answer = self._ask_worker(source, base)
        context.progress("loading the adapter in an independent process", 1, 1)
        bound = self.tolerance * max(1.0, answer["largest_live_logit"])
        self._check_base_answer(base, answer["base_difference"], bound)
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
            raise OptionError("tolerance", "a finite number above 0", str(self.tolerance))

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

    def _check_base(self, base: BaseModelReference) -> None:
        from qpa.base_model import check_base, check_permission

        check_permission(base, trust_remote_code=self.trust_remote_code)
        try:
            check_base(base, trust_remote_code=self.trust_remote_code)
        except ModelError as error:
            advice = error.advice or "say where the base model is: --model"
            raise VerificationError(error.subject, error.expected, error.found, advice) from error

    def _ask_worker(self, source: Manifest, base: BaseModelReference) -> dict[str, Any]:
        request = {
            "directory": self.directory,
            "probe": str(Path(self.directory) / source.probe),
            "model": base.name_or_path,
            "revision": base.revision,
            "trust_remote_code": base.trust_remote_code,
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

    def _check_base_answer(self, base: BaseModelReference, difference: float, bound: float) -> None:
        if not difference <= bound:
            raise VerificationError(
                base.name_or_path,
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
