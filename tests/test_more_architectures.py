"""The whole pipeline on more architectures: plan, train two steps, freeze, export, ask the engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qpa.documents import FrozenAdapter, Manifest
from qpa.exporters.formats.lora import ExportLora
from qpa.exporters.formats.merged import ExportMerged
from qpa.passes.freeze_adapter import FreezeAdapter
from qpa.passes.inspect_model import InspectModel
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.synthesize_circuit import SynthesizeCircuit
from qpa.passes.train_generator import TrainGenerator
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.pipeline import Pipeline
from qpa.store.run_directory import DirectoryStore
from tests.tiny_architectures import MORE_ARCHITECTURES

# peft asks transformers by a name that transformers has renamed, and looks for patterns among modules only.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", MORE_ARCHITECTURES)
def test_an_adapter_is_planned_trained_frozen_and_served(name, text_file, tmp_path):
    model = MORE_ARCHITECTURES[name](tmp_path / "model")
    passes = (
        InspectModel(model=str(model), rank=2),
        PlanLayout(),
        SynthesizeCircuit(),
        TranspileCircuit(),
        TrainGenerator(data=str(text_file), max_steps=2, batch_size=4, max_length=32, lr=0.05),
        MeasureCircuit(),
        FreezeAdapter(),
    )
    start = PassContext(seed=0, files=DirectoryStore(tmp_path / "run"))
    context = Pipeline(*passes).run(None, start)
    frozen = context.document(FrozenAdapter)
    assert frozen.result.eval_loss < frozen.result.base_loss
    for exporter in (ExportLora(), ExportMerged()):
        out = tmp_path / exporter.name
        manifest = exporter.emit(frozen, out, context)
        engines = tuple(engine for engine in exporter.engines if engine != "vllm")
        check_engines(manifest, context, out, engines, load_file(context.files.get(frozen.probe)))


def check_engines(
    manifest: Manifest,
    context: PassContext,
    out: Path,
    engines: tuple[str, ...],
    probe: dict[str, torch.Tensor],
) -> None:
    """Check that engines answer as the live model, and neither miss nor drop a tensor."""
    verification = VerifyAdapter(directory=str(out), engines=engines).run(manifest, context)
    assert [check.engine for check in verification.engines] == [*engines]
    for check in verification.engines:
        assert check.max_logit_difference <= 2e-5 * probe["logits"].abs().max()
        assert check.max_base_difference >= 10 * check.max_logit_difference
        assert list(check.greedy_tokens) == probe["greedy"].tolist()
        assert check.missing_keys == check.unexpected_keys == ()
