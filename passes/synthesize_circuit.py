"""synthesize-circuit: from the layout's ansatz to a parametric circuit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from qpa.circuits.qiskit_files import to_openqasm3, to_qiskit
from qpa.documents import Document, LogicalCircuit, WeightLayout
from qpa.pipeline.pass_protocol import PassContext

QASM_FILE = "logical-circuit.qasm"


@final
@dataclass(frozen=True, slots=True)
class SynthesizeCircuit:
    """Build the circuit that training runs, and write it as OpenQASM 3.

    1. The layout fixes the ansatz, and how many circuits there are.
    2. All of them are one parametric circuit with angles of their own.

    Source:  arXiv 2410.09846, section 3.
    """

    name: ClassVar[str] = "synthesize-circuit"
    consumes: ClassVar[type] = WeightLayout
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = LogicalCircuit

    def run(self, source: WeightLayout, context: PassContext) -> LogicalCircuit:
        """Return the circuit document; leave `logical-circuit.qasm` in the context's files."""
        text = to_openqasm3(to_qiskit(source.ansatz))
        return LogicalCircuit(
            provenance=context.provenance(self, source),
            ansatz=source.ansatz,
            n_circuits=source.n_circuits,
            qubit_order="qubit 0 is the most significant bit",
            openqasm=context.files.put(QASM_FILE, text.encode()),
        )
