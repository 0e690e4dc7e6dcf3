"""An adapter that goes on from a frozen one starts as that, and ends as one plain adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qpa.adapters.attach import adapter_parameters
from qpa.documents import AdapterSpec, FrozenAdapter, Measurement, read_manifest
from qpa.errors import DocumentError, OptionError
from qpa.exporters.formats.lora import ExportLora
from qpa.passes import verification_pipeline
from qpa.passes.freeze_adapter import check_frozen
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import METRICS, DirectoryStore, RunDirectory
from qpa.training import session as module
from qpa.training.fitting import Fitted
from qpa.training.preparation import Session
from tests.test_train_generator import interrupt_after, plan, same_bits, tensors, train

LAYOUTS: dict[str, dict[str, Any]] = {
    "spectral": {},
    "all vectors": {"spectrum": False},
    "aligned": {"generator": "aligned"},
    "paper": {"generator": "paper", "circuits": None, "chunk_size": 64},
    "mpo": {"generator": "mpo", "circuits": None, "layers": None},
    "state": {"generator": "state", "circuits": None, "layers": None},
}


def continued(parent: RunDirectory, out: Path, **options: Any) -> RunDirectory:
    model = Path(parent.read(AdapterSpec).base.name_or_path)
    inspect = {"rank": None, "continue_from": str(parent.path), **options.pop("inspect", {})}
    return plan(model, out, inspect=inspect, **options)


def first_line(run: RunDirectory) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((run.path / METRICS).read_text().splitlines()[0])
    return line


@pytest.fixture(scope="module")
def parent(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = plan(llama, tmp_path_factory.mktemp("parent") / "run")
    train(run, text_file)
    return run


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_it_starts_where_the_other_ended_and_goes_on(
    parent: RunDirectory,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: dict[str, Any],
) -> None:
    """Whatever generates it: before the first step, with all bases set, every number is the parent's."""
    starts: list[dict[str, torch.Tensor]] = []
    original = module.fit

    def spy(session: Session, *rest: Any) -> Fitted:
        live = adapter_parameters(session.adapted.model, session.context.document(AdapterSpec))
        starts.append({path: parameter.detach().clone() for path, parameter in live.items()})
        return original(session, *rest)

    monkeypatch.setattr(module, "fit", spy)
    run = continued(parent, tmp_path / "run", **layout)
    frozen = train(run, text_file)
    assert same_bits(starts[0], tensors(parent))
    before = parent.read(FrozenAdapter).result
    assert first_line(run)["start_loss"] == pytest.approx(before.eval_loss, rel=1e-6)
    assert frozen.result.base_loss == before.base_loss
    assert frozen.result.eval_loss < before.eval_loss
    spec = run.read(AdapterSpec)
    assert spec.parent is not None and spec.parent.digest == parent.read(FrozenAdapter).digest
    assert (frozen.rank, frozen.alpha) == (2, 4.0)
    context = PassContext(0, run.files, run.read_through(FrozenAdapter))
    assert check_frozen(context)[1] == len(spec.tensors)


def test_the_result_is_one_plain_adapter_that_engines_load(
    parent: RunDirectory, text_file: Path, tmp_path: Path
) -> None:
    run = continued(parent, tmp_path / "run")
    train(run, text_file)
    documents = run.read_through(FrozenAdapter)
    out = tmp_path / "lora"
    ExportLora().emit(documents[-1], out, PassContext(0, run.files, documents))
    manifest = read_manifest(out)
    verify = VerifyAdapter(directory=str(out), engines=("peft", "transformers"))
    verification_pipeline(verify).run(
        manifest, PassContext(0, DirectoryStore(out), (manifest,)), lambda document: None
    )


def test_it_is_resumed_to_the_same_bits(
    parent: RunDirectory, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = continued(parent, tmp_path / "whole"), continued(parent, tmp_path / "halved")
    train(whole, text_file)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(halved, text_file)
    train(halved, text_file, resume=True)
    assert same_bits(tensors(whole), tensors(halved))
    assert (halved.path / METRICS).read_bytes() == (whole.path / METRICS).read_bytes()


@pytest.mark.parametrize(
    ("method", "rank"), [("dora", 2), ("ia3", None), ("prefix", 2), ("ffa", 2), ("cayley", 4)], ids=str
)
def test_other_kinds_go_on_too(
    llama: Path, text_file: Path, tmp_path: Path, method: str, rank: int | None
) -> None:
    layout = {"circuits": None, "layers": None}
    first = plan(llama, tmp_path / "first", inspect={"method": method, "rank": rank}, **layout)
    before = train(first, text_file).result
    run = continued(first, tmp_path / "second", inspect={"method": method}, **layout)
    after = train(run, text_file).result
    assert first_line(run)["start_loss"] == pytest.approx(before.eval_loss, rel=1e-6)
    assert after.eval_loss < before.eval_loss
    assert tuple(t.ref for t in run.read(AdapterSpec).tensors) == first.read(FrozenAdapter).tensors


def test_a_preference_is_learned_against_the_parent(parent: RunDirectory, tmp_path: Path) -> None:
    data = tmp_path / "preferences.jsonl"
    rows = [{"prompt": f"say {n}: ", "chosen": f"{n} yes", "rejected": f"{n} no."} for n in range(12)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    run = continued(parent, tmp_path / "run")
    result = train(run, data, objective="dpo", max_length=64).result
    assert first_line(run)["start_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert result.base_loss != pytest.approx(0.693147, abs=1e-6)  # the base is not the reference
    assert result.eval_loss < 0.693


@pytest.mark.parametrize(
    ("inspect", "message"),
    [
        ({"rank": 4}, "rank: expected 2, as of the adapter to continue, found 4"),
        ({"alpha": 1.0}, r"alpha: expected 4.0, as of the adapter to continue, found 1.0"),
        ({"targets": ("q_proj",)}, "targets: expected the layers of the adapter to continue, found others"),
        ({"method": "dora"}, "method: expected lora, as of the adapter to continue, found dora"),
    ],
)
def test_what_does_not_fit_the_parent_is_refused(
    parent: RunDirectory, tmp_path: Path, inspect: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        continued(parent, tmp_path / "run", inspect=inspect)


def test_another_base_and_a_run_that_is_not_frozen_are_refused(
    parent: RunDirectory, llama: Path, gpt2: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="model: expected the base of the adapter to continue"):
        plan(gpt2, tmp_path / "gpt2", inspect={"continue_from": str(parent.path), "rank": None})
    with pytest.raises(DocumentError):
        continued(plan(llama, tmp_path / "planned"), tmp_path / "run")
    with pytest.raises(DocumentError, match="no such directory"):
        plan(llama, tmp_path / "other", inspect={"continue_from": str(tmp_path / "none")})


def test_the_parents_values_are_checked_when_they_are_read(
    parent: RunDirectory, text_file: Path, tmp_path: Path
) -> None:
    run = continued(parent, tmp_path / "run")
    spec = run.read(AdapterSpec)
    assert spec.parent is not None
    assert same_bits(load_file(run.files.get(spec.parent.arrays)), tensors(parent))
    file = run.path / spec.parent.arrays.file
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DocumentError, match="SHA-256"):
        train(run, text_file)
    assert not run.has(Measurement)
