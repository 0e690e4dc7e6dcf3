import hashlib

import pytest

from qpa.circuits.qiskit_files import to_openqasm3
from qpa.documents import (
    ChunkedTensor,
    ChunkGroup,
    Decoder,
    Features,
    LogicalCircuit,
    ParameterAccount,
    Provenance,
    WeightLayout,
)
from qpa.passes.synthesize_circuit import SynthesizeCircuit
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.pipeline import Pipeline, verify
from qpa.store.run_directory import DirectoryStore
from tests.chains import chain, ry_cnot_chain


def layout(n_circuits, n_layers, n_qubits):
    """One tensor of 32 numbers in one chunk."""
    group = ChunkGroup(
        name="all",
        axis="flat",
        tensors=(ChunkedTensor(path="q_proj.lora_A.weight", shape=(4, 8)),),
        states=(0,),
        chunk_size=32,
        decoder=Decoder(kind="linear", widths=(n_circuits, 32), has_bias=False),
    )
    return WeightLayout(
        provenance=Provenance(pass_name="test", options=(), seed=0, qpa_version="0", parents=()),
        generator="paper",
        features=Features(
            kind="circuit",
            n_circuits=n_circuits,
            windows=None,
            registers=(),
            has_index_bits=False,
            n_control=0,
            contexts=None,
        ),
        ansatz=chain(n_layers, n_qubits),
        seed=0,
        budget=None,
        sizes=(),
        groups=(group,),
        parametrized=(),
        kept=(),
        account=ParameterAccount(
            n_angles=n_circuits * n_layers * n_qubits,
            n_control=0,
            n_program=0,
            n_decoder=32 * n_circuits,
            n_own=0,
            n_adapter=32,
        ),
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (24, 8, 7)])
def test_the_document_has_the_layouts_numbers_and_its_file(tmp_path, shape):
    source = layout(*shape)
    document = SynthesizeCircuit().run(source, PassContext(5, DirectoryStore(tmp_path)))
    verify(document, "synthesize-circuit")
    text = (tmp_path / "logical-circuit.qasm").read_bytes()
    ansatz = document.ansatz
    assert (document.n_circuits, ansatz.n_layers, ansatz.n_qubits) == shape
    assert text.decode() == to_openqasm3(ry_cnot_chain(*shape[1:]))
    assert document.openqasm.file == "logical-circuit.qasm"
    assert document.openqasm.sha256 == hashlib.sha256(text).hexdigest()
    assert document.openqasm.n_bytes == len(text)


def test_provenance_names_pass_seed_and_parent(tmp_path):
    source = layout(2, 3, 4)
    made = SynthesizeCircuit().run(source, PassContext(5, DirectoryStore(tmp_path))).provenance
    assert (made.pass_name, made.options, made.seed, made.parent) == (
        "synthesize-circuit",
        (),
        5,
        source.digest,
    )


def test_the_same_layout_gives_the_same_bytes(tmp_path):
    context = PassContext(5, DirectoryStore(tmp_path))
    documents = [SynthesizeCircuit().run(layout(2, 3, 4), context).to_json() for _ in range(2)]
    assert documents[0] == documents[1]


def test_it_composes_with_the_passes_around_it(tmp_path):
    pipeline = Pipeline(SynthesizeCircuit(), TranspileCircuit(), given=(WeightLayout,))
    context = pipeline.run(layout(2, 3, 4), PassContext(5, DirectoryStore(tmp_path)))
    _, logical, native = context.documents
    assert isinstance(logical, LogicalCircuit)
    assert native.provenance.parent == logical.digest
