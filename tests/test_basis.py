"""qpa basis, plans on a basis, and trainings that take their directions from it and settle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qpa.adapters.attach import initial_adapter
from qpa.documents import AdapterSpec, FrozenAdapter, SharedBasis, TrainedGenerator, WeightLayout
from qpa.errors import DocumentError
from qpa.generators.canonical import canonical_adapter
from qpa.generators.chunks import basis_names, basis_shapes
from qpa.serve.basis import Basis
from qpa.serve.compact import Compact
from qpa.store.run_directory import RunDirectory
from qpa.training.attach_run import attach_run
from tests.test_attach_run import batches_of
from tests.test_train_generator import interrupt_after

DATA = ("--max-length", "32", "--batch-size", "2", "--device", "cpu")
READ = (*DATA, "--batches", "8")


@pytest.fixture
def shared(cli, llama, text_file, tmp_path):
    """Return a basis of rank 4 of the tiny Llama, made by the command."""
    out = tmp_path / "basis"
    code, _, err = cli("basis", "--model", llama, "--data", text_file, "--rank", 4, "--out", out, *READ)
    assert code == 0, err
    return out


def planned(cli, llama, shared, out, *options):
    code, _, err = cli("plan", "--model", llama, "--basis", shared, "--out", out, *options)
    assert code == 0, err
    return RunDirectory(out)


def trained(cli, run, text_file, *options):
    arguments = ("--data", text_file, "--max-steps", 6, "--save-steps", 3, *DATA, *options)
    code, _, err = cli("train", run.path, *arguments)
    assert code == 0, err
    return load_file(run.files.get(run.read(FrozenAdapter).arrays))


def arrays_of(run):
    return load_file(run.files.get(run.read(TrainedGenerator).arrays))


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_directory_opens_and_says_what_it_was_made_of(shared, llama, cli, text_file, tmp_path):
    basis = Basis.open(shared)
    document = SharedBasis.from_json((shared / "basis.json").read_bytes(), "basis.json")
    assert (basis.base, basis.scale) == (str(llama), 2.0)
    assert [bank.name for bank in document.banks] == [text_file.name]
    assert document.banks[0].n_batches == 8 and len(document.tensors) == len(basis.shapes)
    arrays = load_file(basis.arrays)
    spec = AdapterSpec.from_json((shared / "adapter-spec.json").read_bytes(), "spec")
    first = initial_adapter(spec)
    for a, b in spec.pairs:
        assert torch.equal(arrays[f"initial.{a.path}"], first[a.path])
        rows = arrays[a.path]
        assert rows.shape == a.shape and arrays[b.path].shape == b.shape
        assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-4)
    again = tmp_path / "again"
    assert cli("basis", "--model", llama, "--data", text_file, "--rank", 4, "--out", again, *READ)[0] == 0
    assert sorted(file.read_bytes() for file in again.iterdir()) == sorted(
        file.read_bytes() for file in shared.iterdir()
    )


def test_the_directions_are_those_of_a_training_on_the_same_data(cli, llama, text_file, shared, tmp_path):
    run = tmp_path / "own"
    assert cli("plan", "--model", llama, "--rank", 4, "--max-params", 30, "--out", run)[0] == 0
    own = RunDirectory(run)
    trained(cli, own, text_file)
    found, directions = arrays_of(own), load_file(Basis.open(shared).arrays)
    names = basis_names(own.read(WeightLayout))
    assert len(names) == 28
    assert all(torch.equal(found[name], directions[path]) for path, name in names.items())


@pytest.fixture
def other_file(text_file, tmp_path):
    """Return a text of other words than `text_file`."""
    path = tmp_path / "other.txt"
    path.write_text("".join(chr(ord("a") + (ord(c) * 7 + 3) % 26) for c in text_file.read_text()))
    return path


@pytest.fixture
def banks(cli, llama, text_file, other_file, tmp_path):
    """Return a basis with directions of two kinds of text, of which the second is `text_file`."""
    out = tmp_path / "banks"
    data = f"{other_file},{text_file}"
    code, _, err = cli("basis", "--model", llama, "--data", data, "--rank", 4, "--out", out, *READ)
    assert code == 0, err
    return out


def test_each_name_of_data_gives_a_bank_of_its_own(shared, banks, other_file, text_file):
    basis = Basis.open(banks)
    assert basis.banks == (other_file.name, text_file.name)
    alone, first = load_file(Basis.open(shared).arrays), load_file(basis.arrays)
    for path in basis.shapes:
        assert torch.equal(first[f"bank.1.{path}"], alone[path])
        assert not torch.equal(first[path], alone[path])


def test_a_training_takes_the_bank_that_suits_its_data(
    cli, llama, text_file, shared, banks, other_file, tmp_path
):
    run = planned(cli, llama, banks, tmp_path / "run", "--max-params", 30)
    on_one = planned(cli, llama, shared, tmp_path / "one", "--max-params", 30)
    assert same_bits(trained(cli, run, text_file), trained(cli, on_one, text_file))
    bank = run.read(TrainedGenerator).bank
    assert (bank.number, bank.name) == (1, text_file.name)
    assert bank.slope_share == pytest.approx(1, abs=1e-3)
    other = planned(cli, llama, banks, tmp_path / "other", "--max-params", 30)
    trained(cli, other, other_file)
    assert other.read(TrainedGenerator).bank.name == other_file.name
    alone = tmp_path / "alone"
    arguments = ("--data", other_file, "--rank", 4, "--out", alone, *READ)
    assert cli("basis", "--model", llama, *arguments)[0] == 0
    unlike = planned(cli, llama, alone, tmp_path / "unlike", "--max-params", 30)
    code, out, _ = cli("train", unlike.path, "--data", text_file, "--max-steps", 2, *DATA)
    assert code == 0 and "no kind of text in the basis is like the data" in " ".join(out.split())
    code, out, _ = cli("inspect", run.path)
    assert code == 0 and f"{text_file.name} (bank 1), 100% as steep as the data's own" in out


def test_a_bank_is_remembered_over_an_interruption_and_expanded(
    cli, llama, text_file, banks, tmp_path, monkeypatch
):
    run = planned(cli, llama, banks, tmp_path / "run", "--max-params", 30)
    interrupt_after(monkeypatch, 3)
    assert cli("train", run.path, "--data", text_file, "--max-steps", 6, "--save-steps", 3, *DATA)[0] == 130
    monkeypatch.undo()
    trained(cli, run, text_file, "--resume")
    assert run.read(TrainedGenerator).bank.number == 1
    compact, plain, expanded = (tmp_path / name for name in ("store/tenant", "plain", "expanded"))
    assert cli("export", run.path, "--format", "compact", "--out", compact)[0] == 0
    assert cli("export", run.path, "--format", "lora", "--out", plain)[0] == 0
    assert Compact.read(compact).bank == 1
    code, _, err = cli("expand", compact, "--basis", banks, "--out", expanded)
    assert code == 0, err
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (expanded / name).read_bytes() == (plain / name).read_bytes()


def test_banks_of_files_of_one_name_are_told_apart_and_the_same_file_is_refused(
    cli, llama, text_file, other_file, tmp_path
):
    for place, file in (("plays", text_file), ("code", other_file)):
        (tmp_path / place).mkdir()
        shutil.copy(file, tmp_path / place / "train.txt")
    data = ",".join(str(tmp_path / place / "train.txt") for place in ("plays", "code"))
    out = tmp_path / "named"
    code, _, err = cli("basis", "--model", llama, "--data", data, "--rank", 2, "--out", out, *READ)
    assert code == 0, err
    assert Basis.open(out).banks == ("plays/train.txt", "code/train.txt")
    again = cli.refuses("basis", "--model", llama, "--data", f"{text_file},{text_file}", *READ)
    assert "--data: expected names of data that differ" in again


def test_more_kinds_of_text_than_a_compact_file_can_number_are_refused(cli, llama, text_file):
    data = ",".join([str(text_file)] * 129)
    assert "--data: expected at most 128 names" in cli.refuses("basis", "--model", llama, "--data", data)


def test_without_out_the_name_ends_in_the_digest(cli, llama, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--model", llama, "--data", text_file, "--rank", 2, "--batches", 1, *DATA, "--json")
    code, out, err = cli("basis", *arguments)
    assert code == 0, err
    found = json.loads(out)
    assert found["basis"] == f"bases/{llama.name}-{found['digest'][:12]}"
    assert Basis.open(Path(found["basis"])).digest.hex() == found["digest"]


def test_other_kinds_and_a_place_that_is_taken_are_refused(cli, llama, text_file, shared):
    asked = ("basis", "--model", llama, "--data", text_file)
    assert "--method: expected lora" in cli.refuses(*asked, "--method", "dora")
    assert "expected a new directory" in cli.refuses(*asked, "--out", shared)


def test_a_plan_is_that_of_the_basis(cli, llama, shared, tmp_path):
    run = planned(cli, llama, shared, tmp_path / "run", "--max-params", 30, "--seed", 5)
    spec = run.read(AdapterSpec)
    of_basis = AdapterSpec.from_json((shared / "adapter-spec.json").read_bytes(), "spec")
    assert (spec.tensors, spec.rank, spec.seed) == (of_basis.tensors, 4, of_basis.seed)
    assert spec.basis.digest == Basis.open(shared).digest.hex()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", "8"), "--rank: expected 4, as of the basis, found 8"),
        (("--alpha", "3"), "--alpha: expected 8.0, as of the basis, found 3.0"),
        (("--targets", "q_proj"), "--targets: expected the layers of the basis, found others"),
        (("--method", "dora"), "--method: expected lora, as of the basis, found dora"),
        (
            ("--continue-from", "runs/none"),
            "expected one of --basis and --continue-from",
        ),
    ],
)
def test_what_contradicts_the_basis_is_refused(cli, llama, shared, tmp_path, options, message):
    out = tmp_path / "run"
    assert message in cli.refuses("plan", "--model", llama, "--basis", shared, "--out", out, *options)
    assert not out.exists()


def test_another_model_is_refused(cli, gpt2, shared, tmp_path):
    found = cli.refuses("plan", "--model", gpt2, "--basis", shared, "--out", tmp_path / "run")
    assert "--model: expected the base model of the basis" in found or "targets" in found


@pytest.mark.parametrize("sizes", [("--max-params", "30"), ("--circuits", "2"), ("--max-params", "1")])
def test_a_training_takes_the_directions_and_settles(cli, llama, text_file, shared, tmp_path, sizes):
    run = planned(cli, llama, shared, tmp_path / "run", *sizes)
    frozen = trained(cli, run, text_file)
    arrays, layout, spec = arrays_of(run), run.read(WeightLayout), run.read(AdapterSpec)
    directions = load_file(Basis.open(shared).arrays)
    for path, name in basis_names(layout).items():
        n_rows, n_columns = arrays[name].shape
        assert torch.equal(arrays[name], directions[path][:n_rows, :n_columns])
    assert same_bits(frozen, canonical_adapter(spec, layout, arrays, initial_adapter(spec)))
    live = load_file(run.files.get(run.read(TrainedGenerator).adapter))
    assert same_bits(frozen, live)
    result = run.read(FrozenAdapter).result
    assert result.eval_loss < result.base_loss
    assert cli("verify", run.path)[0] == 0
    assert cli("freeze", run.path)[0] == 0
    assert same_bits(load_file(run.files.get(run.read(FrozenAdapter).arrays)), frozen)


def test_an_interrupted_training_goes_on_to_the_same_bits(
    cli, llama, text_file, shared, tmp_path, monkeypatch
):
    whole = planned(cli, llama, shared, tmp_path / "whole", "--max-params", 30)
    expected = trained(cli, whole, text_file)
    halved = planned(cli, llama, shared, tmp_path / "halved", "--max-params", 30)
    interrupt_after(monkeypatch, 3)
    assert (
        cli("train", halved.path, "--data", text_file, "--max-steps", 6, "--save-steps", 3, *DATA)[0] == 130
    )
    monkeypatch.undo()
    shutil.rmtree(shared)  # the checkpoint has the directions
    found = trained(cli, halved, text_file, "--resume")
    assert same_bits(found, expected)


def test_a_basis_that_has_moved_is_named_again(cli, llama, text_file, shared, tmp_path):
    run = planned(cli, llama, shared, tmp_path / "run", "--max-params", 30)
    moved = tmp_path / "elsewhere"
    shared.rename(moved)
    train = ("train", run.path, "--data", text_file, "--max-steps", 2, *DATA)
    assert "say where it is now: --basis" in cli.refuses(*train)
    document = json.loads((moved / "basis.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(moved, other)
    (other / "basis.json").write_text(json.dumps(document))
    assert "with which it was planned" in cli.refuses(*train, "--basis", other)
    code, _, err = cli(*train, "--basis", moved)
    assert code == 0, err


def test_a_training_without_a_basis_refuses_one(cli, llama, text_file, shared, tmp_path):
    run = tmp_path / "run"
    assert cli("plan", "--model", llama, "--rank", 4, "--max-params", 30, "--out", run)[0] == 0
    train = ("train", run, "--data", text_file, "--max-steps", 2, *DATA, "--basis", shared)
    assert "--basis: expected none, since the plan has no basis" in cli.refuses(*train)


def test_a_loop_of_the_users_own_takes_the_directions_too(cli, llama, text_file, banks, tmp_path):
    run = planned(cli, llama, banks, tmp_path / "run", "--max-params", 30)
    batches = batches_of(llama, text_file, 8)
    attached = attach_run(run.path, batches, device="cpu")
    directions = load_file(Basis.open(banks).arrays)
    for path in basis_shapes(run.read(WeightLayout)):
        found = attached.generator.basis(path)
        n_rows, n_columns = found.shape
        assert torch.equal(found, directions[f"bank.1.{path}"][:n_rows, :n_columns])
    moved = tmp_path / "moved"
    banks.rename(moved)
    with pytest.raises(DocumentError, match="say where it is now"):
        attach_run(run.path, batches, device="cpu")
    attach_run(run.path, batches, basis=moved, device="cpu")
