"""The generator whose factors are matrix product operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qpa.adapters.matrix_product import MatrixProduct
from qpa.documents import FrozenAdapter, WeightLayout
from qpa.errors import OptionError
from qpa.exporters.formats.lora import ExportLora
from qpa.generators.generator import make_generator
from qpa.models.base_model import load_model
from qpa.pipeline.pass_protocol import PassContext
from qpa.training import session as module
from qpa.training.fitting import Fitted
from qpa.training.preparation import Session
from tests.test_adapter_kinds import inspect, layout_of, logits
from tests.test_train_generator import arrays, interrupt_after, plan, same_bits, tensors, train

MPO: dict[str, Any] = {"generator": "mpo", "circuits": None, "layers": None}


def test_the_account_is_that_of_the_cores(llama: Path) -> None:
    spec = inspect(llama, "lora", rank=4)
    layout = layout_of(spec, generator="mpo", bond_dimension=3)
    expected = sum(MatrixProduct.of(*tensor.shape, 3).n_numbers for tensor in spec.tensors)
    assert layout.account.n_own == layout.account.n_generator == expected
    assert expected == sum(p.numel() for p in make_generator(layout, 0).parameters())
    assert {t.path for t in layout.parametrized} == {t.path for t in spec.tensors}


def test_rows_vary_as_loras_do_and_columns_are_zero(llama: Path) -> None:
    layout = layout_of(inspect(llama, "lora", rank=8), generator="mpo", bond_dimension=4)
    generated = dict(zip((t.path for t in layout.tensors), make_generator(layout, 0)(), strict=True))
    scaled = [t.detach() * t.shape[1] ** 0.5 for path, t in generated.items() if "lora_A" in path]
    spread = float(torch.cat([tensor.flatten() for tensor in scaled]).std())
    assert spread == pytest.approx(3**-0.5, rel=0.3)
    assert all(bool(tensor.any()) is ("lora_A" in path) for path, tensor in generated.items())
    again, other = make_generator(layout, 0)(), make_generator(layout, 1)()
    assert all(torch.equal(a, b) for a, b in zip(generated.values(), again, strict=True))
    assert not torch.equal(generated[layout.tensors[0].path], other[0])


def test_it_starts_as_the_base_and_ends_as_a_plain_lora(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = module.fit

    def spy(session: Session, *rest: Any) -> Fitted:
        model = session.adapted.model.eval()
        with model.disable_adapter():
            base = logits(model)
        seen.append((logits(model), base))
        return original(session, *rest)

    monkeypatch.setattr(module, "fit", spy)
    run = plan(llama, tmp_path / "run", **MPO)
    frozen = train(run, text_file, max_steps=4)
    assert torch.equal(*seen[0])
    assert frozen.result.eval_loss < frozen.result.base_loss
    cores = [array for name, array in arrays(run).items()]
    assert sum(core.numel() for core in cores) == run.read(WeightLayout).account.n_generator
    ExportLora().emit(frozen, tmp_path / "out", PassContext(0, run.files, run.read_through(FrozenAdapter)))
    loaded = PeftModel.from_pretrained(load_model(frozen.base, keep_dtype=False), tmp_path / "out").eval()
    found = {name.partition("base_model.model.")[2]: p for name, p in loaded.named_parameters()}
    for tensor in frozen.tensors:
        name = tensor.path.replace(".weight", ".default.weight")
        scaling = 2 if tensor.role == "lora_B" else 1
        assert torch.equal(found[name], scaling * tensors(run)[tensor.path])


def test_a_resumed_training_ends_in_the_same_bits(
    gpt2: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = (plan(gpt2, tmp_path / name, **MPO) for name in ("whole", "halved"))
    train(whole, text_file, max_steps=4, save_steps=2)
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(halved, text_file, max_steps=4, save_steps=2)
    monkeypatch.undo()
    train(halved, text_file, max_steps=4, save_steps=2, resume=True)
    assert same_bits(tensors(whole), tensors(halved)) and same_bits(arrays(whole), arrays(halved))


def test_a_budget_chooses_the_bond_dimension(llama: Path) -> None:
    spec = inspect(llama, "lora", rank=4)
    sizes = [layout_of(spec, generator="mpo", bond_dimension=bond).account.n_generator for bond in (1, 2, 3)]
    layout = layout_of(spec, generator="mpo", max_params=str(sizes[2] - 1))
    assert layout.account.n_generator == sizes[1]
    assert [size.words for size in layout.sizes] == [f"bond dimension {bond}" for bond in (1, 2, 3)]
    with pytest.raises(OptionError, match=f"^max_params: expected at least {sizes[0]:,}"):
        layout_of(spec, generator="mpo", max_params=str(sizes[0] - 1))


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("lora", {"bond_dimension": 0}, "bond_dimension: expected a whole number of at least 1, found 0"),
        ("lora", {"bond_dimension": 2, "max_params": "5000"}, "max_params: expected no `bond_dimension`"),
        ("lora", {"circuits": 2}, "circuits: expected no such option with `generator` mpo"),
        ("lora", {"chunk_size": 64}, "chunk_size: expected no such option with `generator` mpo"),
        (
            "ia3",
            {},
            "generator: expected .*direct.* with `method` ia3, which is no product of factors, found mpo",
        ),
    ],
)
def test_other_options_and_adapters_are_refused(
    llama: Path, method: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=f"^{words}") as caught:
        layout_of(inspect(llama, method), generator="mpo", **options)
    assert "\n" not in str(caught.value)
