"""LogicalCircuit: the parametric circuit, independent of any device."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.base import Attachment, Document
from qpa.documents.weight_layout import MAX_QUBITS


class LogicalCircuit(Document):
    """RY layers with a linear CNOT chain, `n_circuits` copies with angles of their own.

    One circuit: |0..0>, then n_layers times [RY(angle[layer, qubit]) on every qubit; CNOT(0,1),
    CNOT(1,2) .. CNOT(n-2,n-1)], then all qubits are measured. Qubit 0 is the most significant bit of
    the basis-state index, which is the chunk index. Angles are in radians.

    Args:    openqasm: the circuit as OpenQASM 3 text; the float input `_t_<i>_` is angle i,
             i = layer * n_qubits + qubit, and classical bit k holds bit k of the chunk index.
    Source:  arXiv 2410.09846, section 3; bit order ours.
    """

    kind: ClassVar[str] = "logical-circuit"

    ansatz: Literal["ry-cnot-chain"]
    n_circuits: int
    n_layers: int
    n_qubits: int
    qubit_order: Literal["qubit 0 is the most significant bit"]
    openqasm: Attachment

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if min(self.n_circuits, self.n_layers) < 1 or not 1 <= self.n_qubits <= MAX_QUBITS:
            raise ValueError(f"circuits and layers must be at least 1, qubits within 1 and {MAX_QUBITS}")
        return self
