"""Ansatz: the record of a parametric circuit, which the layout and the circuit documents share."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from qpa.documents.base import JsonObject, Record

MAX_QUBITS = 24


class Ansatz(Record):
    """The choice of a parametric circuit: its family, and its size within the family.

    Qubit 0 is the most significant bit of the index of a basis state.

    Args:    kind: a name in `qpa.circuits.ansatz.ANSATZE`, "ry-cnot-chain".
             n_qubits, n_layers: the numbers of qubits and layers of one circuit.
             entanglement: which qubits each layer entangles, in the kind's own words, "linear".
             n_angles: the number of angles of one circuit.
    """

    kind: str
    n_qubits: int
    n_layers: int
    entanglement: str
    n_angles: int

    @model_validator(mode="after")
    def _verify(self) -> Self:
        # Before anything else is checked, as powers of two follow from these.
        if self.n_layers < 1 or not 1 <= self.n_qubits <= MAX_QUBITS:
            raise ValueError(f"an ansatz has at least 1 layer, and qubits within 1 and {MAX_QUBITS}")
        if self.n_angles < 1:
            raise ValueError("an ansatz has at least 1 angle")
        return self


def chain_of_schema_1(n_layers: object, n_qubits: object, kind: object = "ry-cnot-chain") -> JsonObject:
    """Return the record of the only ansatz of the time when its fields were fields of the documents.

    Raises:  TypeError, ValueError: it is not a record of that ansatz.
    """
    if kind != "ry-cnot-chain":
        raise ValueError(f"ansatz {kind}")
    if not isinstance(n_layers, int) or not isinstance(n_qubits, int):
        raise TypeError("layers and qubits are whole numbers")
    return {
        "kind": "ry-cnot-chain",
        "n_qubits": n_qubits,
        "n_layers": n_layers,
        "entanglement": "linear",
        "n_angles": n_layers * n_qubits,
    }
