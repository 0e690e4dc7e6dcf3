"""The LoRA exporter: its files, its refusals, and what PEFT and transformers read back."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from qpa.documents import MANIFEST_PATH, FrozenAdapter, Manifest
from qpa.errors import DocumentError, ExportError, OptionError
from qpa.exporters.cards.model_card import targets_head, vllm_rank_option
from qpa.exporters.contracts.lora import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, check_lora_contract
from qpa.exporters.directory import PROBE_FILE
from qpa.exporters.formats.lora import ExportLora
from qpa.store.atomic_files import TEMPORARY_PREFIX
from tests.random_adapter import RandomAdapter, random_adapter
from tests.tiny_models import tiny_llama

# peft asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return a rank-4 adapter with alpha 6 on a tiny Llama: a scaling of 1.5."""
    return random_adapter(llama, tmp_path_factory.mktemp("store"), rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def exported(made: RandomAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the exported directory of `made`."""
    out = tmp_path_factory.mktemp("exported") / "adapter"
    ExportLora().emit(made.frozen, out, made.context)
    return out


def _with(made: RandomAdapter, **fields: object) -> FrozenAdapter:
    return made.frozen.model_copy(update=fields)


def card_of(frozen):
    return ExportLora().card(frozen, frozen.rank)


def _with_arrays(made: RandomAdapter, tensors: dict[str, torch.Tensor]) -> FrozenAdapter:
    return _with(made, arrays=made.context.files.put("{sha256}.safetensors", save(tensors)))


def test_the_directory_holds_exactly_the_contract(exported, made):
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert files == {"README.md", CONFIG_FILE, WEIGHTS_FILE, PROBE_FILE, MANIFEST_PATH}
    assert {path.stat().st_mode & 0o777 for path in exported.rglob("*") if path.is_file()} == {0o644}
    assert exported.stat().st_mode & 0o777 == 0o755
    assert check_lora_contract(exported) == ()
    assert (exported / PROBE_FILE).read_bytes() == made.context.files.get(made.frozen.probe).read_bytes()


def test_the_config_is_explicit(exported, made):
    assert json.loads((exported / CONFIG_FILE).read_text()) == {
        "base_model_name_or_path": made.frozen.base.name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 4,
        "revision": None,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def test_the_scaling_is_folded_into_b_only(exported, made):
    with safe_open(exported / WEIGHTS_FILE, framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}
    tensors = load_file(exported / WEIGHTS_FILE)
    assert tensors.keys() == {KEY_PREFIX + path for path in made.tensors}
    for path, tensor in made.tensors.items():
        expected = tensor * 1.5 if path.endswith(".lora_B.weight") else tensor
        assert tensors[KEY_PREFIX + path].dtype == torch.float32
        assert torch.equal(tensors[KEY_PREFIX + path], expected), path


def test_a_scaling_of_one_leaves_the_bits_alone(made, tmp_path):
    tensors = {path: tensor.clone() for path, tensor in made.tensors.items()}
    path = next(path for path in tensors if path.endswith(".lora_B.weight"))
    tensors[path][0, :3] = torch.tensor([-0.0, 1e-45, 3.4e38])
    frozen = _with_arrays(made, tensors).model_copy(update={"alpha": 4.0})
    ExportLora().emit(frozen, tmp_path / "out", made.context)
    exported = load_file(tmp_path / "out" / WEIGHTS_FILE)
    for path, tensor in tensors.items():
        assert torch.equal(exported[KEY_PREFIX + path].view(torch.int32), tensor.view(torch.int32)), path


def test_the_manifest_describes_every_other_file(exported, made):
    manifest = Manifest.from_json((exported / MANIFEST_PATH).read_bytes(), MANIFEST_PATH)
    assert manifest.provenance.parent == made.frozen.digest
    assert manifest.base == made.frozen.base and manifest.account == made.frozen.account
    for entry in manifest.files:
        content = (exported / entry.file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.n_bytes, entry.sha256)


def test_the_same_adapter_gives_the_same_bytes(exported, made, tmp_path):
    other = tmp_path / "deeper" / "elsewhere"
    ExportLora().emit(made.frozen, other, made.context)
    ExportLora().emit(made.frozen, other, made.context, force=True)
    for path in exported.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (other / path.relative_to(exported)).read_bytes(), path


def _live_logits(made: RandomAdapter) -> torch.Tensor:
    with torch.no_grad():
        return made.live(input_ids=torch.arange(40)[None] + 20).logits


@pytest.mark.parametrize("engine", ["peft", "transformers"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_an_engine_reads_back_every_number(engine, base, request, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = random_adapter(request.getfixturevalue(base), tmp_path / "store", rank=3, alpha=6.0)
    ExportLora().emit(made.frozen, tmp_path / "out", made.context)
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(base), dtype=torch.float32)
    if engine == "peft":
        model = PeftModel.from_pretrained(model, tmp_path / "out")
    else:
        model.load_adapter(str(tmp_path / "out"))
    read = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    assert len(read) == len(made.tensors)
    for path, tensor in made.tensors.items():
        name = path.replace(".weight", ".default.weight")
        found = read[f"{KEY_PREFIX}{name}" if engine == "peft" else name]
        assert torch.equal(found, tensor * 2.0 if ".lora_B." in path else tensor), path
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(40)[None] + 20).logits
    live = _live_logits(made)
    assert (logits - live).abs().max() <= 1e-5 * live.abs().max()
    with torch.no_grad(), made.live.disable_adapter():
        assert (logits - made.live(input_ids=torch.arange(40)[None] + 20).logits).abs().max() > 0.1


def test_rank_32_is_exported_and_the_card_says_what_vllm_needs(llama, tmp_path):
    made = random_adapter(llama, tmp_path / "store", rank=20)
    ExportLora().emit(made.frozen, tmp_path / "out", made.context)
    assert check_lora_contract(tmp_path / "out") == ()
    assert "--max-lora-rank 32" in (tmp_path / "out" / "README.md").read_text()


def test_a_tied_head_is_refused_unless_allowed(tmp_path):
    model = tiny_llama(tmp_path / "model", tied=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        made = random_adapter(model, tmp_path / "store", targets=("q_proj", "lm_head"))
    with pytest.raises(ExportError, match="one that embedding and output head share"):
        ExportLora().emit(made.frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()
    ExportLora(allow_tied_head=True).emit(made.frozen, tmp_path / "out", made.context)
    assert check_lora_contract(tmp_path / "out") == ()


def test_an_untied_head_is_exported(llama, tmp_path):
    made = random_adapter(llama, tmp_path / "store", targets=("lm_head",))
    ExportLora().emit(made.frozen, tmp_path / "out", made.context)
    assert load_file(tmp_path / "out" / WEIGHTS_FILE).keys() == {
        f"{KEY_PREFIX}lm_head.lora_A.weight",
        f"{KEY_PREFIX}lm_head.lora_B.weight",
    }


def _first_b(made: RandomAdapter) -> str:
    return next(path for path in made.tensors if path.endswith(".lora_B.weight"))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 3e38])
def test_numbers_that_are_or_become_infinite_are_refused(made, tmp_path, number):
    broken = made.tensors | {_first_b(made): made.tensors[_first_b(made)].clone().fill_(number)}
    with pytest.raises(ExportError, match="NaN or infinity"):
        ExportLora().emit(_with_arrays(made, broken), tmp_path / "out", made.context)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_arrays_that_are_not_the_documents_are_refused(made, tmp_path, change):
    name, tensors = _first_b(made), dict(made.tensors)
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["lm_head.lora_A.weight"] = torch.ones(4, 8)
    elif change == "shape":
        tensors[name] = tensors[name].T.contiguous()
    else:
        tensors[name] = tensors[name].double()
    with pytest.raises(ExportError):
        ExportLora().emit(_with_arrays(made, tensors), tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()


def test_arrays_of_a_type_numpy_has_not_are_refused(made, tmp_path):
    tensors = made.tensors | {_first_b(made): made.tensors[_first_b(made)].bfloat16()}
    with pytest.raises(ExportError):
        ExportLora().emit(_with_arrays(made, tensors), tmp_path / "out", made.context)


def test_damaged_arrays_are_refused(llama, tmp_path):
    made = random_adapter(llama, tmp_path / "store")
    path = made.context.files.get(made.frozen.arrays)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DocumentError, match="SHA-256"):
        ExportLora().emit(made.frozen, tmp_path / "out", made.context)


def test_what_is_in_the_way_stays(made, tmp_path):
    export, out = ExportLora(), tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(ExportError, match="found a file"):
        export.emit(made.frozen, out, made.context, force=True)
    out.unlink()
    out.mkdir()
    export.emit(made.frozen, out, made.context)
    with pytest.raises(ExportError, match="`force`"):
        export.emit(made.frozen, out, made.context)
    export.emit(made.frozen, out, made.context, force=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.txt"):
        export.emit(made.frozen, out, made.context, force=True)
    (out / MANIFEST_PATH).write_text("{}")
    with pytest.raises(ExportError, match="no qpa export"):
        export.emit(made.frozen, out, made.context, force=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_parent_that_is_a_file_is_one_error(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="a directory that can be written"):
        ExportLora().emit(made.frozen, tmp_path / "file" / "out", made.context)


def test_an_error_while_writing_leaves_the_old_export(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    manifest = ExportLora().emit(made.frozen, out, made.context)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full_disk(self: Manifest) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manifest, "to_json", full_disk)
    with pytest.raises(ExportError, match="No space left"):
        ExportLora().emit(made.frozen, out, made.context, force=True)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [out]
    assert manifest == Manifest.from_json((out / MANIFEST_PATH).read_bytes(), "manifest")


KILLED = """
import os, signal, sys
from pathlib import Path
from qpa.documents import FrozenAdapter, Manifest
from qpa.exporters.formats.lora import ExportLora
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore

store, out = Path(sys.argv[1]), Path(sys.argv[2])
Manifest.to_json = lambda self: os.kill(os.getpid(), signal.SIGKILL)
frozen = FrozenAdapter.from_json((store / "frozen-adapter.json").read_bytes(), "frozen")
ExportLora().emit(frozen, out, PassContext(seed=0, files=DirectoryStore(store)))
"""


def test_a_killed_export_leaves_nothing_that_looks_complete(made, tmp_path):
    store, out = made.context.files.path, tmp_path / "out"
    (store / "frozen-adapter.json").write_bytes(made.frozen.to_json())
    killed = subprocess.run([sys.executable, "-c", KILLED, str(store), str(out)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(TEMPORARY_PREFIX)
    assert (left / WEIGHTS_FILE).is_file() and not (left / MANIFEST_PATH).exists()
    ExportLora().emit(made.frozen, out, made.context)
    assert check_lora_contract(out) == ()
    assert list(tmp_path.iterdir()) == [out]


def test_an_export_that_a_killed_replacement_had_moved_is_there_again_and_not_replaced(made, tmp_path):
    out = tmp_path / "out"
    ExportLora().emit(made.frozen, out, made.context)
    moved = tmp_path / f"{TEMPORARY_PREFIX}replaced-killed"
    moved.mkdir()
    out.rename(moved / out.name)
    with pytest.raises(ExportError, match="an existing export; pass `force`"):
        ExportLora().emit(made.frozen, out, made.context)
    assert check_lora_contract(out) == ()
    assert list(tmp_path.iterdir()) == [out]


def test_edited_extra_and_missing_files_break_the_manifest(made, tmp_path):
    out = tmp_path / "out"
    ExportLora().emit(made.frozen, out, made.context)
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert check_lora_contract(out) == ()
    card = (out / "README.md").read_bytes()
    (out / "README.md").write_bytes(card.swapcase())
    (out / "extra.txt").write_text("")
    (out / PROBE_FILE).unlink()
    findings = check_lora_contract(out)
    assert {finding.rule for finding in findings} == {"L20"}
    assert {finding.subject for finding in findings} == {"README.md", "extra.txt", PROBE_FILE}
    (out / MANIFEST_PATH).write_text("{}")
    assert [finding.rule for finding in check_lora_contract(out)] == ["L20"]


def test_the_cards_front_matter_is_yaml_for_the_hub(made):
    import yaml

    local = yaml.safe_load(card_of(made.frozen).split("---")[1])
    assert local["library_name"] == "peft" and local["tags"] == ["lora", "peft", "qpa"]
    assert "base_model" not in local
    base = made.frozen.base.model_copy(
        update={"name_or_path": "owner/Base-1.5B", "local": False, "revision": "abc"}
    )
    card = card_of(_with(made, base=base))
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/Base-1.5B"
    assert 'from_pretrained("owner/Base-1.5B", revision="abc")' in card
    assert "vllm serve owner/Base-1.5B --enable-lora --revision abc --lora-modules" in card


def test_the_card_tells_the_account_and_the_result(made):
    card = card_of(made.frozen)
    assert "| circuit angles | 24 |" in card and "| generator in total | 1,224 |" in card
    assert f"| the same LoRA without a generator | {made.frozen.account.n_adapter:,} |" in card
    assert f"| base model | 5.5000 | {np.exp(5.5):.3f} |" in card
    assert "Nothing quantum is needed" in card


def test_the_cards_account_of_a_control_adds_up(made):
    assert "|---|---:|\n| circuit angles | 24 |\n| decoder | 1,200 |\n| generator in total" in card_of(
        made.frozen
    )
    control = made.frozen.account.model_copy(update={"n_angles": 0, "n_control": 1024})
    rows = "|---|---:|\n| control | 1,024 |\n| decoder | 1,200 |\n| generator in total | 2,224 |"
    assert rows in card_of(_with(made, account=control))


def test_the_card_says_where_vllm_has_no_lora(made):
    assert "Conv1D" in card_of(_with(made, fan_in_fan_out=True))
    assert "ranks up to 512" in card_of(_with(made, rank=600))


def test_a_local_base_written_like_a_hub_id_is_not_claimed_on_the_hub(made):
    base = made.frozen.base.model_copy(update={"name_or_path": "models/base"})
    assert base.local and "base_model:" not in card_of(_with(made, base=base))


def test_the_head_is_the_one_the_base_names(made):
    path = made.frozen.tensors[0].path
    for head, is_target in ((path.rpartition(".lora_")[0], True), ("lm_head", False), (None, False)):
        base = made.frozen.base.model_copy(update={"head": head})
        assert targets_head(_with(made, base=base)) is is_target


def test_vllms_rank_option():
    assert [vllm_rank_option(rank) for rank in (1, 16, 17, 64, 65, 512, 513)] == [
        16,
        16,
        32,
        64,
        128,
        512,
        None,
    ]


# Types and padding


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_another_type_is_one_rounding_of_the_folded_numbers(made, tmp_path, dtype, kind):
    manifest = ExportLora(dtype=dtype).emit(made.frozen, tmp_path / "out", made.context)
    assert manifest.dtype == dtype
    assert check_lora_contract(tmp_path / "out") == ()
    tensors = load_file(tmp_path / "out" / WEIGHTS_FILE)
    for path, tensor in made.tensors.items():
        folded = tensor * 1.5 if path.endswith(".lora_B.weight") else tensor
        assert torch.equal(tensors[KEY_PREFIX + path], folded.to(kind)), path


def test_a_number_too_large_for_the_type_is_refused(made, tmp_path):
    broken = made.tensors | {_first_b(made): made.tensors[_first_b(made)].clone().fill_(1e5)}
    with pytest.raises(ExportError, match=r"finite float16 numbers, found one too large: 1\.5e\+05"):
        ExportLora(dtype="float16").emit(_with_arrays(made, broken), tmp_path / "out", made.context)
    ExportLora(dtype="bfloat16").emit(_with_arrays(made, broken), tmp_path / "out", made.context)


def test_padding_changes_the_rank_and_not_the_function(made, tmp_path):
    manifest = ExportLora(rank_pad=16).emit(made.frozen, tmp_path / "out", made.context)
    assert manifest.rank == 16
    assert check_lora_contract(tmp_path / "out") == ()
    assert "rank-16 LoRA" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 16)
    tensors = load_file(tmp_path / "out" / WEIGHTS_FILE)
    for a in (path for path in made.tensors if path.endswith(".lora_A.weight")):
        b = a.replace("lora_A", "lora_B")
        product = tensors[KEY_PREFIX + b] @ tensors[KEY_PREFIX + a]
        assert torch.allclose(product, 1.5 * made.tensors[b] @ made.tensors[a], rtol=0, atol=1e-6)
        assert not tensors[KEY_PREFIX + a][4:].any() and not tensors[KEY_PREFIX + b][:, 4:].any()


@pytest.mark.parametrize(
    ("options", "words"), [({"dtype": "int8"}, "dtype: expected float32"), ({"rank_pad": 0}, "rank_pad:")]
)
def test_an_option_out_of_range_is_one_error(made, tmp_path, options, words):
    with pytest.raises(OptionError, match=f"^{words}"):
        ExportLora(**options).emit(made.frozen, tmp_path / "out", made.context)
    assert list(tmp_path.iterdir()) == []
