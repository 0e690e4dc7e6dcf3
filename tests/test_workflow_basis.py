"""qpa run with a shared basis: the plan follows it, and the trained numbers alone are exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qpa.documents import AdapterSpec
from qpa.errors import DocumentError
from qpa.passes.inspect_model import InspectModel
from qpa.serve.basis import Basis
from qpa.store.run_directory import RunDirectory
from tests.test_export_compact import calibrate
from tests.test_workflow import files_of, run

SMALL = """\
model: model
data: text.txt
seed: 5
plan: {basis: shared, max_params: 10}
train: {max_length: 32, max_steps: 2, batch_size: 2}
export: []
"""


@pytest.fixture(scope="module")
def made_once(tmp_path_factory, llama, text_file):
    """Return a directory with two bases and a run on the first of them."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        shutil.copytree(llama, "model")
        shutil.copy(text_file, "text.txt")
        for name, n_batches in (("shared", 1), ("other", 2)):
            options = {"data": ("text.txt",), "max_length": 32, "batch_size": 2, "batches": n_batches}
            Path(name).mkdir()
            calibrate(Path(name), InspectModel("model", rank=4), **options)
        Path("bard.yaml").write_text(SMALL)
        run()
    return place


@pytest.fixture
def made(made_once, tmp_path, monkeypatch):
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


UNCHANGED = ["plan: unchanged", "train: unchanged", "freeze: unchanged", "report: unchanged"]


def test_a_plan_on_a_basis_stays_until_the_basis_is_another(made):
    assert run() == UNCHANGED
    assert run("plan.basis=other", dry_run=True)[0] == (
        "plan: would be done again (plan.basis other is another)"
    )
    shutil.copytree("other", "shared", dirs_exist_ok=True)
    assert run()[0] == ("plan: again (plan.basis shared is another); the trained generator is replaced")
    spec = RunDirectory(Path("runs/bard")).read(AdapterSpec)
    assert spec.basis.digest == Basis.open(Path("other")).digest.hex()
    again = run("plan.basis=null", "plan.rank=4", dry_run=True)
    assert again[0].startswith("plan: would be done again (plan.rank default -> 4")
    assert run() == UNCHANGED


def test_a_basis_that_is_given_or_left_out_is_a_change(made):
    run("plan.basis=null", "out=runs/own")
    own = ("plan.basis=null", "out=runs/own")
    assert run(*own) == UNCHANGED
    assert "(plan.basis shared is new)" in run("out=runs/own", dry_run=True)[0]
    assert "(plan.basis is no longer given)" in run("plan.basis=null", dry_run=True)[0]


def test_a_basis_that_has_moved_is_taken_from_where_it_is(made):
    Path("shared").rename("moved")
    assert run("plan.basis=moved", dry_run=True) == UNCHANGED
    lines = run("plan.basis=moved", "train.max_steps=1")
    assert lines[:2] == [
        "plan: unchanged",
        "train: again (train.max_steps 2 -> 1); the trained generator is replaced",
    ]
    kept = files_of("runs")
    with pytest.raises(DocumentError, match="name a directory that qpa basis wrote"):
        run()
    assert files_of("runs") == kept


def test_a_run_to_go_on_from_that_was_trained_anew_is_another(made):
    further = (
        "plan.basis=null",
        "plan.rank=4",
        "plan.continue_from=runs/bard",
        "out=runs/further",
        "train.max_steps=1",
    )
    run(*further)
    assert run(*further) == UNCHANGED
    run("train.max_steps=1")
    assert "(plan.continue_from runs/bard is another)" in run(*further, dry_run=True)[0]
    assert (
        "(plan.continue_from is no longer given)" in run(*further, "plan.continue_from=null", dry_run=True)[0]
    )
