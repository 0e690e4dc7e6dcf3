"""QTHA, a circuit that reads a layer's input: what only it has. The rest is in `test_adapter_kinds`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qiskit import QuantumCircuit
from qiskit.quantum_info import Pauli, Statevector
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qpa.adapters.attach import set_adapter
from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.adapters.qtha import ANGLES, FUSION
from qpa.adapters.qtha_model import circuit_matrix, encoded, expectations, signs_of
from qpa.documents import AdapterSpec, FrozenAdapter, TrainedGenerator, WeightLayout, read_manifest
from qpa.errors import DocumentError, ExportError, OptionError
from qpa.exporters.formats.onnx import ExportOnnx
from qpa.exporters.onnx.adapted_model import put_adapter
from qpa.exporters.registry import exporter_for
from qpa.models.base_model import load_model
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.pipeline.pass_protocol import PassContext
from tests.command_line import Cli
from tests.random_adapter import RandomAdapter, random_adapter
from tests.test_adapter_kinds import IDS, LFM2, MAMBA, attached, inspect, layout_of, logits
from tests.test_documents import seal
from tests.test_train_generator import plan, train

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")

SMALL: dict[str, Any] = {"method": "qtha", "rank": 2, "bond_dimension": 2, "targets": ("q_proj", "down_proj")}


def in_qiskit(inputs: torch.Tensor, angles: torch.Tensor) -> list[float]:
    """Return <Z> of every qubit: the input in RY, then layers of RY and a chain of CNOTs."""
    n_qubits = len(inputs)
    circuit = QuantumCircuit(n_qubits)
    for layer in (inputs, *angles):
        for qubit, angle in enumerate(layer):
            circuit.ry(float(angle), qubit)
        if layer is not inputs:
            for qubit in range(n_qubits - 1):
                circuit.cx(qubit, qubit + 1)
    state = Statevector(circuit)
    return [state.expectation_value(Pauli("Z"), [qubit]).real for qubit in range(n_qubits)]


@pytest.mark.parametrize(("n_qubits", "n_layers"), [(1, 1), (2, 3), (4, 2)])
def test_the_circuit_is_qiskits(n_qubits: int, n_layers: int) -> None:
    torch.manual_seed(0)
    inputs, angles = 2 * torch.randn(6, n_qubits).double(), 2 * torch.randn(n_layers, n_qubits).double()
    circuit = circuit_matrix(angles)
    torch.testing.assert_close(circuit @ circuit.T, torch.eye(2**n_qubits).double())
    found = expectations(encoded(inputs), circuit, signs_of(circuit))
    expected = torch.tensor([in_qiskit(row, angles) for row in inputs]).double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("fusion", ["product", "linear"])
@torch.no_grad()
def test_a_layer_adds_what_the_circuit_makes_of_its_input(llama: Path, fusion: str) -> None:
    model, parameters = attached(inspect(llama, **SMALL, fusion=fusion))
    torch.manual_seed(0)
    set_adapter(parameters, {path: 0.7 * torch.randn(p.shape) for path, p in parameters.items()})
    seen: list[torch.Tensor] = []
    layer = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    logits(model)
    inputs, output = seen
    own = {name.removeprefix("qtha_"): p for name, p in layer.named_parameters() if name.startswith("qtha_")}
    # 64 = 4 * 4 * 4 and 2 = 1 * 1 * 2, the large factors first where they count rows; all bonds are 2
    down = torch.einsum(
        "aip,pbjq,qck->abcijk",
        own["down_0"].view(2, 4, 2),
        own["down_1"].view(2, 1, 4, 2),
        own["down_2"].view(2, 1, 4),
    ).reshape(2, 64)
    up = torch.einsum(
        "iap,pjbq,qkc->ijkabc",
        own["up_0"].view(4, 1, 2),
        own["up_1"].view(2, 4, 1, 2),
        own["up_2"].view(2, 4, 2),
    ).reshape(64, 2)
    features = inputs @ down.T
    read = torch.tensor([in_qiskit(token, own["angles"]) for token in features[0]]).float()
    fused = (
        features * read if fusion == "product" else torch.cat((features, read[None]), -1) @ own["fusion"].T
    )
    torch.testing.assert_close(output, inputs @ layer.weight.T + fused @ up.T, atol=1e-4, rtol=1e-4)
    assert float((fused @ up.T).abs().max()) > 0.1


@pytest.mark.parametrize("fusion", ["product", "linear"])
def test_it_starts_as_the_base_and_every_number_is_trained(llama: Path, fusion: str) -> None:
    spec = inspect(llama, **SMALL, fusion=fusion)
    model, parameters = attached(spec)
    assert (FUSION.name in {tensor.role for tensor in spec.tensors}) is (fusion == "linear")
    assert torch.equal(logits(model), logits(load_model(spec.base, keep_dtype=False)))
    optimizer = torch.optim.AdamW([*parameters.values()], lr=0.05)
    for _ in range(2):  # the last cores are zero, and until they have moved nothing else has a gradient
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(bool(parameter.grad.any()) for parameter in parameters.values())


def test_the_options_make_the_sizes(llama: Path) -> None:
    def n_numbers(**options: Any) -> int:
        return inspect(llama, **(SMALL | options)).n_numbers

    angles = [t.shape for t in inspect(llama, **SMALL, circuit_layers=5).tensors if t.role == ANGLES.name]
    assert {*angles} == {(5, 2)}
    assert n_numbers(circuit_layers=3) == n_numbers() + 4 * 2
    assert n_numbers(fusion="linear") == n_numbers() + 4 * 2 * 4
    assert n_numbers(bond_dimension=1) < n_numbers() < n_numbers(rank=4)


def test_its_own_numbers_are_trained_and_options_of_the_adapter_are_not_the_layouts(llama: Path) -> None:
    spec = inspect(llama, **SMALL)
    layout = layout_of(spec, bond_dimension=2)
    assert layout.generator == "direct" and layout.account.n_generator == spec.n_numbers
    with pytest.raises(OptionError, match=r"^bond_dimension: expected no such option with .*spectral"):
        PlanLayout(bond_dimension=2).run(inspect(llama, "lora"), PassContext(0, None))  # type: ignore[arg-type]


def test_layers_that_a_mixer_may_use_without_a_call_are_left_out(tmp_path: Path) -> None:
    """Mamba multiplies by the weight of dt_proj, and by others on a GPU; LFM2 has attention as well."""
    for name, config in (("mamba", MAMBA), ("lfm2", LFM2)):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    with pytest.raises(OptionError, match=r"^targets: .*nothing is left: .* are beside a convolution"):
        inspect(tmp_path / "mamba", "qtha")
    spec = inspect(tmp_path / "lfm2", "qtha")
    assert not any(".conv." in tensor.module for tensor in spec.tensors)
    left_out = {left.layers: left.reason for left in spec.left_out}
    assert {*left_out} == {"model.layers.*.conv.in_proj", "model.layers.*.conv.out_proj"}
    assert all("beside a convolution" in reason for reason in left_out.values())


# Documents


def spec_content(llama: Path, **options: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(inspect(llama, **(SMALL | options)).to_json())
    return content


@pytest.mark.parametrize("place", [0, 1, 3, 4, 5, 6, 7])  # the last core of D alone may have any columns
def test_a_spec_that_is_not_of_one_form_is_refused(llama: Path, place: int) -> None:
    content = spec_content(llama, fusion="linear")
    content["tensors"][place]["shape"][1] += 1
    with pytest.raises(DocumentError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        AdapterSpec.from_json(seal(content), "file")


def test_a_spec_with_fusion_in_one_layer_alone_is_refused(llama: Path) -> None:
    content = spec_content(llama, fusion="linear")
    content["tensors"] = [*content["tensors"][:8], *spec_content(llama)["tensors"][7:]]
    with pytest.raises(DocumentError, match=r"tensors must be|must be followed by"):
        AdapterSpec.from_json(seal(content), "file")


# Exports


@pytest.fixture(scope="module", params=["product", "linear"])
def frozen_run(
    request: pytest.FixtureRequest, llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    options = SMALL | {"fusion": request.param}
    run = plan(llama, tmp_path_factory.mktemp("qtha") / "run", inspect=options, circuits=None, layers=None)
    train(run, text_file, max_steps=4)
    return run


@pytest.mark.usefixtures("in_process")
def test_the_graph_answers_as_the_trained_model_and_its_card_says_what_is_ours(
    frozen_run: Any, tmp_path: Path
) -> None:
    frozen, documents = frozen_run.read(FrozenAdapter), frozen_run.read_through(FrozenAdapter)
    assert frozen_run.read(WeightLayout).generator == "direct"
    result = frozen_run.read(TrainedGenerator).result
    assert result.eval_loss < result.base_loss
    context = PassContext(0, frozen_run.files, documents)
    ExportOnnx().emit(frozen, tmp_path / "out", context)
    manifest = read_manifest(tmp_path / "out")
    (check,) = VerifyAdapter(directory=str(tmp_path / "out")).run(manifest, context).engines
    assert check.engine == "onnxruntime" and check.greedy_tokens_equal and check.max_logit_difference < 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    fusion = "linear" if any(tensor.role == FUSION.name for tensor in frozen.tensors) else "product"
    assert "leaves open how" in card and "Here: RY, 2 qubits, 2 x RY" in card and f"Fusion: {fusion}." in card
    put = load_model(frozen.base, keep_dtype=False)
    put_adapter(put, FrozenArrays.open(frozen, context))
    model, parameters = attached(documents[0])
    set_adapter(parameters, load_file(frozen_run.files.get(frozen.arrays)))
    assert torch.allclose(logits(put), logits(model), atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "peft", "merged", "onnx-adapter", "genai", "gguf", "mlx"])
def test_other_formats_say_why_they_cannot(llama: Path, tmp_path: Path, name: str) -> None:
    made: RandomAdapter = random_adapter(llama, tmp_path / "store", method="qtha", rank=2)
    with pytest.raises(ExportError, match=r"found QTHA, whose circuit reads .*; use onnx$"):
        exporter_for(name, {}).emit(made.frozen, tmp_path / "out", made.context)


def test_the_command_line_takes_its_options(llama: Path, tmp_path: Path, cli: Cli) -> None:
    options = (
        "--method",
        "qtha",
        "--rank",
        2,
        "--bond-dimension",
        1,
        "--circuit-layers",
        3,
        "--fusion",
        "linear",
    )
    code, words, err = cli("plan", "--model", llama, *options, "--out", tmp_path / "run")
    assert code == 0, err
    assert "QTHA of 2 qubits on " in words
    wrong = cli.refuses("plan", "--model", llama, "--fusion", "linear", "--out", tmp_path / "other")
    assert "--fusion: expected no such option with --method lora, found linear; leave it out" in wrong
