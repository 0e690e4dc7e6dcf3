"""synthesize-circuit: from the layout's numbers to a parametric circuit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from qpa.circuits.ry_cnot_chain import ry_cnot_chain, to_openqasm3
from qpa.documents import Document, LogicalCircuit, WeightLayout
from qpa.pipeline.pass_protocol import PassContext

QASM_FILE = "logical-circuit.qasm"


@final
@dataclass(frozen=True, slots=True)
class SynthesizeCircuit:
    """Choose the ansatz and write it as OpenQASM 3.

    1. The layout fixes how many circuits there are, of how many layers and qubits.
    2. All of them are one parametric circuit, `qpa.circuits.ry_cnot_chain.ry_cnot_chain`, with angles of
    their own.

    Source:  arXiv 2410.09846, section 3.
    """

    name: ClassVar[str] = "synthesize-circuit"
    consumes: ClassVar[type] = WeightLayout
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = LogicalCircuit

    def run(self, source: WeightLayout, context: PassContext) -> LogicalCircuit:
        """Return the circuit document; leave `logical-circuit.qasm` in the context's files."""
        circuit = ry_cnot_chain(source.n_layers, source.n_qubits)
        return LogicalCircuit(
            provenance=context.provenance(self, source),
            ansatz="ry-cnot-chain",
            n_circuits=source.n_circuits,
            n_layers=source.n_layers,
            n_qubits=source.n_qubits,
            qubit_order="qubit 0 is the most significant bit",
            openqasm=context.files.put(QASM_FILE, to_openqasm3(circuit).encode()),
        )
