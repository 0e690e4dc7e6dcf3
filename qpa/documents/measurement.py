"""Measurement: the numbers that are decoded, which the trained circuits gave when they were run once more."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from qpa.documents.base import Attachment, Document


class Measurement(Document):
    """The result of measure-circuit.

    The seed in its provenance is the one from which a source with randomness drew.

    Args:    source: a name in `qpa.circuits.sources.source.SOURCES`, "exact".
             target: the device whose circuit was run, as a NativeCircuit names it; "none" where the logical
             circuit was run.
             shots: the number of shots of each circuit; None where the probabilities are exact.
             mitigation: how the counts were corrected; "none" where they were not.
             n_executions: how often a circuit was run on the source, where every shot counts as a run; for
             an exact source, the number of circuits.
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
            raise ValueError("there are executions without probabilities, or fewer than 0 executions")
        if not 0.0 <= self.distance <= 1.0:
            raise ValueError("a total variation distance is within 0 and 1")
        return self
