"""Measurement: the numbers that are decoded, which the trained circuits gave when they were run once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

from pydantic import model_validator

from qpa.documents.base import Attachment, Document, JsonObject, Record


def _upgrade_1(content: JsonObject) -> JsonObject:
    """Version 1 knew exact probabilities, and named no device."""
    return content | {
        "backend": None,
        "calibrated": None,
        "physical_qubits": [],
        "lacks_last_layer": False,
        "counts": None,
        "circuit": None,
        "device": None,
    }


def _upgrade_2(content: JsonObject) -> JsonObject:
    """Version 2 knew no contexts."""
    return content | {"context": None}


class MeasuredContext(Record):
    """The context from which the angles were programmed.

    Args:    name: of a context of the training; None for a prompt that is none of them.
             prompt: its text; None for a name.
             vector: safetensors; "context" float32[size], the numbers that tell the context.
    """

    name: str | None
    prompt: str | None
    vector: Attachment

    @property
    def words(self) -> str:
        """Return the name, or that it is a prompt, and its text."""
        return f'the prompt "{self.prompt}"' if self.name is None else self.name


class Measurement(Document):
    """The result of measure-circuit.

    The seed in its provenance is the one from which a source with randomness drew.

    Args:    source: a name in `qpa.circuits.sources.source.SOURCES`, "exact".
             backend: the backend on which the circuits ran, as it was named; None for a source without one.
             target: the device whose circuit was run, as a NativeCircuit names it; "none" where the logical
             circuit was run.
             shots: the number of shots of each circuit; None where the probabilities are exact.
             mitigation: how the counts were corrected, names of
             `qpa.circuits.mitigation.mitigation.MITIGATIONS` in their order, joined by "+"; "none" where they
             were not.
             counts: safetensors; "counts" int64[n_circuits, 2**n_qubits], what was measured, from which the
             probabilities follow; what was measured besides for the mitigation has other names. None where
             the probabilities are exact, and in documents of an older schema.
             calibrated, physical_qubits, lacks_last_layer: of what was run, see `NativeCircuit`.
             circuit: what was run, in Qiskit's QPY format; device: what was known of its device. None where
             the logical circuit was run.
             n_executions: how often a circuit was run on the source, where every shot counts as a run; for
             an exact source, the number of circuits.
             probabilities: safetensors; "probabilities" float32[n_circuits, 2**n_qubits], every row a
             distribution over basis states. None where the features come from a control without circuits.
             distance: largest total variation distance of a row to the exact probabilities, within 0 and 1.
             context: whose angles were measured; None where the angles are the same for all data.
    """

    kind: ClassVar[str] = "measurement"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (_upgrade_1, _upgrade_2)

    source: str
    backend: str | None
    target: str
    shots: int | None
    mitigation: str
    n_executions: int
    calibrated: str | None
    physical_qubits: tuple[int, ...]
    lacks_last_layer: bool
    counts: Attachment | None
    circuit: Attachment | None
    device: Attachment | None
    probabilities: Attachment | None
    distance: float
    context: MeasuredContext | None

    @property
    def context_name(self) -> str | None:
        """Return the name of the context of the training that was measured; None where there is none."""
        return None if self.context is None else self.context.name

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if self.shots is not None and self.shots < 1:
            raise ValueError("a circuit that is sampled has at least 1 shot")
        if self.n_executions < 0 or (self.probabilities is None and self.n_executions):
            raise ValueError("there are executions without probabilities, or fewer than 0 executions")
        if not 0.0 <= self.distance <= 1.0:
            raise ValueError("a total variation distance is within 0 and 1")
        return self
