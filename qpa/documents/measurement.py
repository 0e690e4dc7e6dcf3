"""Measurement: what the trained circuits gave when they were run once more, the numbers that are decoded."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from qpa.documents.base import Attachment, Document


class Measurement(Document):
    """The result of measure-circuit.

    Its provenance's seed is the one that a source with randomness drew from.

    Args:    source: a name in `qpa.circuits.sources.source.SOURCES`, "exact".
             target: the device whose circuit was run, as a NativeCircuit names it; "none" where the logical
             circuit was run.
             shots: of each circuit; None where the source gives exact probabilities.
             mitigation: how the counts were corrected; "none" where they were not.
             n_executions: runs of a circuit on the source, every shot counted; for an exact source, circuits.
             probabilities: safetensors; "probabilities" float32[n_circuits, 2**n_qubits], every row a
             distribution over basis states. None where the features come from a control without circuits.
             distance: largest total variation distance of a row to the exact probabilities, within 0 and 1.
    """

    kind: ClassVar[str] = "measurement"

    source: str
    target: str
    shots: int | None
    mitigation: str
    n_executions: int
    probabilities: Attachment | None
    distance: float

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if self.shots is not None and self.shots < 1:
            raise ValueError("a circuit that is sampled has at least 1 shot")
        if self.n_executions < 0 or (self.probabilities is None and self.n_executions):
            raise ValueError("executions without probabilities, or fewer than none")
        if not 0.0 <= self.distance <= 1.0:
            raise ValueError("a total variation distance is within 0 and 1")
        return self
