"""What comes from outside runs through the pipeline, and no file of qpa is edited for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qpa.adapters.registry import KINDS
from qpa.circuits.ansatz import ANSATZE
from qpa.circuits.circuit import Circuit
from qpa.circuits.gradients.adjoint import Adjoint
from qpa.circuits.gradients.estimator import GRADIENTS
from qpa.circuits.sources.exact import ExactSimulator
from qpa.circuits.sources.source import SOURCES
from qpa.documents import (
    TENSOR_RULES,
    AdapterSpec,
    FrozenAdapter,
    LogicalCircuit,
    Manifest,
    Measurement,
    NativeCircuit,
    Role,
    TensorRules,
    TrainedGenerator,
    Verification,
    WeightLayout,
)
from qpa.documents.manifest import FORMATS
from qpa.documents.verification import ENGINES
from qpa.engines.engine import EngineRecord
from qpa.errors import DocumentError, ExportError, OptionError
from qpa.exporters.formats.merged import ExportMerged
from qpa.exporters.registry import exporter_for, formats_for
from qpa.generators.features.kind import FEATURES
from qpa.generators.generator import GENERATORS, make_generator
from qpa.generators.parametrizations.kind import PARAMETRIZATIONS
from qpa.passes import planning_pipeline, training_pipeline, verification_pipeline
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.train_generator import TrainGenerator
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.pipeline.pass_protocol import PassContext
from qpa.registry import Registry
from qpa.store.run_directory import METRICS, DirectoryStore, RunDirectory
from qpa.training.objectives.objective import OBJECTIVES
from tests.command_line import Cli
from tests.outside.adapter_kind import BIAS, BitFit
from tests.outside.ansatz import RyCzBricks
from tests.outside.export_format import FACTORS_FILE, ExportNpz
from tests.outside.features import SlopesKind
from tests.outside.generator import TiedKind
from tests.outside.gradient import CentralDifference
from tests.outside.objective import SmoothedLabels
from tests.outside.parametrization import OneColumn, OneColumnKind
from tests.outside.source import QiskitSampler


@contextmanager
def added(registry: Registry[Any], name: str, thing: Any) -> Iterator[None]:
    """Let qpa know a thing for a while."""
    registry.add(name, thing)
    try:
        yield
    finally:
        registry.remove(name)


def plan(model: Path, out: Path, inspect: dict[str, Any] | None = None, **layout: Any) -> RunDirectory:
    """Plan an adapter of rank 2 on the tiny model."""
    out.mkdir(parents=True)
    run = RunDirectory(out)
    passes = (InspectModel(str(model), **{"rank": 2, **(inspect or {})}), PlanLayout(**layout))
    planning_pipeline(*passes, TranspileCircuit()).run(None, PassContext(0, run.files), run.write)
    return run


def train(run: RunDirectory, data: Path, **options: Any) -> FrozenAdapter:
    """Train the plan for two steps, and freeze it."""
    step = TrainGenerator(data=str(data), max_steps=2, max_length=32, batch_size=2, device="cpu", **options)
    context = PassContext(0, run.files, run.read_through(NativeCircuit))
    return training_pipeline(step).run(None, context, run.write).document(FrozenAdapter)


def export_and_verify(run: RunDirectory, out: Path, format_: str = "lora") -> Verification:
    """Export a frozen adapter, and ask the engines of the format."""
    documents = run.read_through(FrozenAdapter)
    exporter = exporter_for(format_, {})
    manifest = exporter.emit(documents[-1], out, PassContext(0, run.files, documents))
    assert isinstance(manifest, Manifest)
    context = PassContext(0, DirectoryStore(out))
    return verification_pipeline(VerifyAdapter(str(out))).run(manifest, context).document(Verification)


# An ansatz


def test_an_ansatz_from_outside(llama: Path, text_file: Path, tmp_path: Path, in_process: None) -> None:
    with added(ANSATZE, RyCzBricks.name, RyCzBricks()):
        run = plan(llama, tmp_path / "run", ansatz=RyCzBricks.name, layers=2)
        assert run.read(LogicalCircuit).ansatz.kind == RyCzBricks.name
        assert "cz q[0], q[1];" in (run.path / "logical-circuit.qasm").read_text()
        before = make_generator(run.read(WeightLayout), 0).chunk_features.angles.detach().clone()
        train(run, text_file)
        after = load_file(run.files.get(run.read(TrainedGenerator).arrays))["chunk_features.angles"]
        assert float((after - before).abs().max()) > 1e-3
        assert export_and_verify(run, tmp_path / "out").engines


# A source


def test_a_source_from_outside(llama: Path, text_file: Path, tmp_path: Path, in_process: None) -> None:
    with added(SOURCES, QiskitSampler.name, QiskitSampler):
        run = plan(llama, tmp_path / "run", circuits=1)
        frozen = train(run, text_file, source=QiskitSampler.name, gradient="parameter-shift")
        measurement = run.read(Measurement)
        assert (measurement.source, measurement.shots) == (QiskitSampler.name, 512)
        assert measurement.n_executions == 512 and 0 < measurement.distance < 0.5
        assert (frozen.source, frozen.shots) == (QiskitSampler.name, 512)
        # Circuits that are measured once more give other numbers: the frozen adapter is not the live one.
        assert frozen.arrays != run.read(TrainedGenerator).adapter
        assert frozen.probe != run.read(TrainedGenerator).probe
        assert export_and_verify(run, tmp_path / "out").engines


# A gradient estimator


def test_a_gradient_estimator_from_outside(
    llama: Path, text_file: Path, tmp_path: Path, in_process: None
) -> None:
    with added(GRADIENTS, CentralDifference.name, CentralDifference):
        run = plan(llama, tmp_path / "run", circuits=1)
        train(run, text_file, gradient=CentralDifference.name)
        assert run.read(TrainedGenerator).gradient == CentralDifference.name
        assert export_and_verify(run, tmp_path / "out").engines
        circuit = Circuit(run.read(LogicalCircuit).ansatz)
    angles, cotangent = torch.rand(2, circuit.n_angles).double(), torch.rand(2, circuit.n_states).double()
    exact = Adjoint().vjp(ExactSimulator(), circuit, angles, None, cotangent)
    found = CentralDifference(0).vjp(ExactSimulator(), circuit, angles, None, cotangent)
    torch.testing.assert_close(found, exact, atol=1e-3, rtol=1e-2)


# A generator


def test_a_generator_from_outside(llama: Path, text_file: Path, tmp_path: Path, in_process: None) -> None:
    with added(GENERATORS, TiedKind.name, TiedKind()):
        run = plan(llama, tmp_path / "run", generator=TiedKind.name)
        layout = run.read(WeightLayout)
        assert layout.generator == TiedKind.name
        assert layout.account.n_generator < layout.account.n_adapter
        train(run, text_file)
        adapter = load_file(run.files.get(run.read(FrozenAdapter).arrays))
        first, second = (adapter[f"model.layers.{layer}.self_attn.q_proj.lora_B.weight"] for layer in (0, 1))
        assert bool(first.any()) and torch.equal(first, second)
        assert export_and_verify(run, tmp_path / "out").engines


def test_features_from_outside(llama: Path, text_file: Path, tmp_path: Path, in_process: None) -> None:
    with added(FEATURES, SlopesKind.name, SlopesKind()):
        run = plan(llama, tmp_path / "run", generator="state", features=SlopesKind.name)
        assert run.read(WeightLayout).account.n_generator == 4
        train(run, text_file)
        slopes = load_file(run.files.get(run.read(TrainedGenerator).arrays))["chunk_features.slopes"]
        assert bool(slopes.all())
        assert export_and_verify(run, tmp_path / "out").engines


def test_a_parametrization_from_outside(
    llama: Path, text_file: Path, tmp_path: Path, in_process: None
) -> None:
    generator = added(GENERATORS, OneColumnKind.name, OneColumnKind())
    with generator, added(PARAMETRIZATIONS, OneColumn.name, OneColumn()):
        run = plan(llama, tmp_path / "run", generator=OneColumnKind.name)
        layout = run.read(WeightLayout)
        assert layout.account.n_generator == sum(tensor.shape[0] for tensor in layout.parametrized)
        train(run, text_file)
        adapter = load_file(run.files.get(run.read(FrozenAdapter).arrays))
        first, second = adapter[layout.parametrized[0].path].unbind(1)
        assert bool(first.any()) and torch.equal(first, second)
        assert export_and_verify(run, tmp_path / "out").engines


# An export format, and the engine that reads it


def test_an_export_format_and_its_engine_from_outside(
    llama: Path, text_file: Path, tmp_path: Path, cli: Cli
) -> None:
    run = plan(llama, tmp_path / "run", circuits=1)
    train(run, text_file)
    out = tmp_path / "out"
    with added(FORMATS, ExportNpz.name, ExportNpz), added(ENGINES, NUMPY.name, NUMPY):
        code, words, err = cli("export", run.path, "--format", ExportNpz.name, "--out", out)
        assert code == 0, err
        assert f"next: qpa verify {out}" in words
        assert cli("verify", out, "--static") == (0, f"{out}: keeps the contract\n", "")
        (check,) = json.loads(cli("verify", out, "--json")[1])["engines"]
        assert check["engine"] == NUMPY.name and check["greedy_tokens_equal"]
        shown = json.loads(cli("inspect", out, "--json")[1])
        assert (shown["format"], shown["findings"]) == (ExportNpz.name, [])
        assert FACTORS_FILE in shown["files"] and shown["verification"]["engines"] == [check]
        assert f"{out}: {ExportNpz.name}" in cli("inspect", out)[1]
        factors = dict(np.load(out / FACTORS_FILE))
        np.savez(out / FACTORS_FILE, **{name: array[:1] for name, array in factors.items()})
        (line, *_) = cli("verify", out, "--static")[1].splitlines()
        assert line.startswith("N02 ")
    assert f"found {ExportNpz.name}" in cli.refuses("export", run.path, "--format", "npz", "--out", out)
    assert "format must be lora, peft, " in cli.refuses("inspect", out)


NUMPY = EngineRecord(
    "numpy", package="numpy", file=str(Path(__file__).parent / "outside" / "numpy_engine.py")
)
"""The record of the engine; the worker is told its file."""


# An adapter kind


def test_an_adapter_kind_from_outside(llama: Path, text_file: Path, tmp_path: Path, in_process: None) -> None:
    with added(KINDS, BitFit.name, BitFit()):
        run = plan(llama, tmp_path / "run", {"method": BitFit.name, "rank": None})
        spec, layout = run.read(AdapterSpec), run.read(WeightLayout)
        assert {tensor.role for tensor in spec.tensors} == {BIAS.name} and len(spec.tensors) == 14
        assert layout.generator == BitFit.default_generator
        frozen = train(run, text_file)
        biases = load_file(run.files.get(frozen.arrays))
        assert all(bool(biases[tensor.path].any()) for tensor in frozen.tensors)
        with pytest.raises(
            ExportError, match=r"expected LoRA, DoRA, IA3, Cayley or shared Cayley, found BitFit; use onnx$"
        ):
            export_and_verify(run, tmp_path / "merged", "merged")
        verification = export_and_verify(run, tmp_path / "out", "onnx")
        assert [check.engine for check in verification.engines] == ["onnxruntime"]
    with pytest.raises(
        DocumentError,
        match=r"found method: .* bitfit is not lora, dora, ia3, prefix, ffa, cayley, cayley-shared or qtha",
    ):
        run.read(AdapterSpec)


def test_a_kind_from_outside_cannot_give_a_known_role_another_meaning() -> None:
    class Wide(BitFit):
        name = "wide"
        rules = TensorRules(roles=(Role("lora_B", "row"),), check=BitFit.rules.check)

    with pytest.raises(OptionError, match="expected a name that is free, found lora_B"):
        KINDS.add(Wide.name, Wide())
    assert Wide.name not in KINDS and Wide.name not in TENSOR_RULES


def test_a_format_from_outside_may_carry_a_kind_that_does_not_know_it() -> None:
    class Other(ExportMerged):
        name = "other"
        kinds = ("prefix",)

    with added(FORMATS, Other.name, Other):
        assert formats_for("prefix") == (*KINDS["prefix"].formats, "other")
        assert formats_for("ia3") == KINDS["ia3"].formats


# An objective


def test_an_objective_from_outside(llama: Path, text_file: Path, tmp_path: Path, in_process: None) -> None:
    run = plan(llama, tmp_path / "run")
    plain = train(run, text_file)
    with added(OBJECTIVES, SmoothedLabels.name, SmoothedLabels):
        frozen = train(run, text_file, objective=SmoothedLabels.name)
    trained = run.read(TrainedGenerator)
    assert ("objective", SmoothedLabels.name) in {(o.name, o.value) for o in trained.provenance.options}
    assert frozen.result.data_digest == plain.result.data_digest
    assert frozen.result.n_eval_tokens == plain.result.n_eval_tokens
    assert frozen.result.base_loss != pytest.approx(plain.result.base_loss, rel=1e-3)
    assert frozen.result.eval_loss < frozen.result.base_loss
    assert frozen.arrays != plain.arrays
    lines = [json.loads(line) for line in (run.path / METRICS).read_text().splitlines()]
    assert lines[-1]["eval_loss"] == frozen.result.eval_loss
    assert 0 <= lines[-1]["eval_accuracy"] <= 1
    assert export_and_verify(run, tmp_path / "out").engines


EVERY_REGISTRY = (
    *(ANSATZE, SOURCES, GRADIENTS, GENERATORS, FEATURES, PARAMETRIZATIONS, OBJECTIVES),
    *(FORMATS, ENGINES, KINDS, TENSOR_RULES),
)


@pytest.mark.parametrize("registry", EVERY_REGISTRY)
def test_nothing_from_outside_stays(registry: Registry[Any]) -> None:
    names = {RyCzBricks.name, QiskitSampler.name, CentralDifference.name, TiedKind.name, BitFit.name, "other"}
    names |= {SlopesKind.name, OneColumn.name, OneColumnKind.name}
    assert not {*names, SmoothedLabels.name, ExportNpz.name, NUMPY.name} & {*registry}
