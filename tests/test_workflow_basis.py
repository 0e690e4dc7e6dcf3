"""qpa run with a shared basis: the plan follows it, and the trained numbers alone are exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qpa.documents import AdapterSpec
from qpa.errors import ConfigurationError, ExportError
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
export: compact
"""
FILE = Path("runs/bard/exports/compact/bard")
UNCHANGED = [f"{name}: unchanged" for name in ("plan", "train", "freeze", "export compact", "report")]
"""No engine is asked: a file of numbers records no answers."""


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
    """Return a working directory of one's own with all that."""
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The plan


def test_a_plan_stays_until_its_basis_is_another(made):
    assert run() == UNCHANGED
    assert "(plan.basis other is another)" in run("plan.basis=other", dry_run=True)[0]
    assert "(plan.basis is no longer given)" in run("plan.basis=null", "export=[]", dry_run=True)[0]
    shutil.copytree("other", "shared", dirs_exist_ok=True)
    lines = run()
    assert lines[0] == "plan: again (plan.basis shared is another); the trained generator is replaced"
    assert f"export compact: {FILE}" in lines
    spec = RunDirectory(Path("runs/bard")).read(AdapterSpec)
    assert spec.basis.digest == Basis.open(Path("other")).digest.hex()
    assert run(dry_run=True) == UNCHANGED


def test_a_basis_that_has_moved_is_taken_from_where_it_is(made):
    Path("shared").rename("moved")
    assert run("plan.basis=moved", dry_run=True) == UNCHANGED
    lines = run("plan.basis=moved", "train.max_steps=1")
    assert lines[:2] == [
        "plan: unchanged",
        "train: again (train.max_steps 2 -> 1); the trained generator is replaced",
    ]
    kept = files_of("runs")
    with pytest.raises(ConfigurationError, match="expected a file or directory, found no such file"):
        run()
    assert files_of("runs") == kept


def test_a_run_to_go_on_from_that_was_trained_anew_is_another(made, cli):
    plain = ("plan.basis=null", "out=runs/further", "export=[]", "train.max_steps=1")
    further = (*plain, "plan.continue_from=runs/bard")
    run(*further)
    refusal = "Not for this adapter: `format` compact: expected an adapter planned on a shared basis"
    assert refusal in Path("runs/further/report.html").read_text()
    assert "expected an export of runs/further" in cli.refuses("report", "runs/further", "--export", FILE)
    assert "(plan.basis shared is new)" in run("out=runs/further", dry_run=True)[0]
    assert "(plan.continue_from is no longer given)" in run(*plain, dry_run=True)[0]
    shutil.rmtree("runs/bard")
    run("train.max_steps=1", "export=[]")
    assert "(plan.continue_from runs/bard is another)" in run(*further, dry_run=True)[0]


# The trained numbers alone


@pytest.mark.usefixtures("in_process")
def test_what_is_exported_expands_to_the_plain_lora_and_is_left_as_it_is(made, cli):
    lines = run("export=lora,compact", "verify.engine=peft")
    assert lines[4].startswith("verify lora: the trained model's answers in peft")
    assert lines[5] == "export compact: unchanged"
    assert cli("expand", FILE, "--basis", "shared", "--out", "plain")[0] == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert Path("plain", name).read_bytes() == Path("runs/bard/exports/lora", name).read_bytes()
    page = Path("runs/bard/report.html").read_text()
    assert f"{FILE}, compact" in page and "bytes, float32: what this run gives" in page
    assert f"qpa.serve.load(base, &quot;{FILE}&quot;" in page


def test_a_file_that_is_not_what_the_run_gives_is_written_again(made):
    content = FILE.read_bytes()
    (layout,) = FILE.parent.glob("layouts/*")
    FILE.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    layout.write_bytes(b"{}")
    assert run()[3:5] == ["export compact: again (another adapter is in it)", f"export compact: {FILE}"]
    assert FILE.read_bytes() == content and len(layout.read_bytes()) > 100
    layout.unlink()
    assert run(dry_run=True)[3] == "export compact: would be done again (another adapter is in it)"
    FILE.unlink()
    assert run(dry_run=True)[3] == "export compact: would be done"


def test_another_type_or_place_is_a_change(made):
    reason = "export compact: would be done again (export.dtype float32 -> int16)"
    assert run("export.compact.dtype=int16", dry_run=True)[3] == reason
    stored = ("export.compact.out=store/tenant-17", "export.compact.dtype=int16")
    assert run(*stored)[3] == "export compact: store/tenant-17"
    assert run(*stored, dry_run=True) == UNCHANGED
    assert Path("store/tenant-17").stat().st_size < FILE.stat().st_size
    assert run("export.compact.out=store/tenant-17")[3:5] == [
        "export compact: again (export.dtype int16 -> float32)",
        "export compact: store/tenant-17",
    ]


def test_what_is_in_the_way_is_refused_before_anything_is_made(made):
    Path("store").mkdir()
    Path("store/mine").write_text("mine")
    shutil.copy(FILE, "store/taken")
    kept = files_of(".")
    for name, words in (("mine", "a file that is no compact adapter"), ("taken", "pass `force` to replace")):
        with pytest.raises(ExportError, match=words):
            run(f"export.compact.out=store/{name}", "train.max_steps=3")
    assert files_of(".") == kept


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (("plan.basis=null",), "plan.basis: expected a directory of qpa basis, for compact, found none"),
        (("plan.method=dora",), "export.compact: expected peft, .* which carry the adapter, found compact"),
        (("export.compact.dtype=float16",), "export.compact.dtype: expected float32 or int16, found float16"),
    ],
)
def test_what_has_no_compact_form_is_refused_before_anything_is_made(made, sets, words):
    kept = files_of(".")
    with pytest.raises(ConfigurationError, match=words):
        run(*sets)
    assert files_of(".") == kept


def test_a_plan_that_cannot_be_exported_or_measured_leaves_the_trained_one(made):
    kept = files_of("runs/bard")
    with pytest.raises(ExportError, match="numbers that are expanded without torch"):
        run("plan.generator=state", "plan.features=network", "plan.max_params=null", "plan.control_size=8")
    with pytest.raises(ConfigurationError, match="shots: expected none, since no circuit of the plan is"):
        run("plan.generator=state", "plan.features=own", "train.source=shots", "train.shots=100", "export=[]")
    assert files_of("runs/bard") == kept
    with pytest.raises(ConfigurationError, match="no such file: bases/none"):
        run("plan.basis=bases/none", dry_run=True)


def test_a_stray_file_in_the_basis_trains_nothing_again(made):
    Path("shared/notes.txt").write_text("a note")
    assert run()[:2] == UNCHANGED[:2]


def test_a_run_that_is_killed_while_it_exports_goes_on(made, monkeypatch):
    content = FILE.read_bytes()
    shutil.rmtree(FILE.parent)

    def killed(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qpa.exporters.formats.compact.write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not FILE.exists()
    assert run()[2:4] == ["freeze: unchanged", f"export compact: {FILE}"]
    assert FILE.read_bytes() == content


# qpa verify, inspect


def test_a_compact_file_says_what_is_in_it(made, cli):
    code, out, _ = cli("inspect", FILE, "--json")
    facts = json.loads(out)
    assert (code, facts["n_numbers"], facts["bank"], facts["are_probabilities"]) == (0, 10, 0, False)
    assert facts["basis"] == Basis.open(Path("shared")).digest.hex()
    assert [path.stem for path in FILE.parent.glob("layouts/*")] == [facts["layout"]]
    code, out, _ = cli("inspect", FILE)
    assert code == 0 and facts["layout"][:20] in out
    assert "--gradients: expected a run" in cli.refuses("inspect", FILE, "--gradients")
    assert "found neither" in cli.refuses("inspect", "text.txt")


def test_a_compact_file_is_verified_by_expanding_it(made, cli):
    code, out, _ = cli("verify", FILE, "--basis", "shared")
    assert code == 0 and out.startswith(f"{FILE}: 10 numbers for basis ")
    assert "which expand to a LoRA that keeps the contract; it records no answers" in out.replace("\n", " ")
    code, out, _ = cli("verify", FILE, "--static", "--json")
    assert (code, json.loads(out)) == (0, {"adapter": str(FILE), "expanded": False, "findings": []})
    assert "--basis: expected the directory of basis" in cli.refuses("verify", FILE)
    assert "with which bard was trained" in cli.refuses("verify", FILE, "--basis", "other")
    assert "--model: expected nothing for a compact adapter" in cli.refuses(
        "verify", FILE, "--model", "model"
    )
    assert "--basis: expected a compact adapter" in cli.refuses("verify", "runs/bard", "--basis", "shared")
    content = FILE.read_bytes()
    FILE.write_bytes(content[:-3])
    for options in (("--static",), ("--basis", "shared")):
        assert "cut short" in cli.refuses("verify", FILE, *options)
    FILE.write_bytes(content)
    next(FILE.parent.glob("layouts/*")).unlink()
    assert "copy it from where bard was exported" in cli.refuses("verify", FILE, "--static")
