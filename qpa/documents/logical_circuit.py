"""LogicalCircuit: the parametric circuit, independent of any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.ansatz import Ansatz, chain_of_schema_1
from qpa.documents.base import Attachment, Document, JsonObject, with_parents


def _upgrade_1(content: JsonObject) -> JsonObject:
    """Version 1 knew one ansatz, and spread its record over the document."""
    chain = chain_of_schema_1(content.pop("n_layers"), content.pop("n_qubits"), content.pop("ansatz"))
    return with_parents(content) | {"ansatz": chain}


class LogicalCircuit(Document):
    """One parametric circuit, of which a generator runs `n_circuits` copies with angles of their own.

    A circuit starts in |0..0>, applies its ansatz, and measures all qubits. Qubit 0 is the most significant
    bit of the basis state's index, which is the chunk index. Angles are in radians.

    Args:    openqasm: the circuit as OpenQASM 3 text; the float input `_t_<i>_` is angle i, and classical bit
             k holds bit k of the chunk index.
    Source:  arXiv 2410.09846, section 3; bit order ours.
    """

    kind: ClassVar[str] = "logical-circuit"
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = (_upgrade_1,)

    ansatz: Ansatz
    n_circuits: int
    qubit_order: Literal["qubit 0 is the most significant bit"]
    openqasm: Attachment

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if self.n_circuits < 1:
            raise ValueError("there is at least 1 circuit")
        return self
