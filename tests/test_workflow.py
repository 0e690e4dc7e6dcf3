"""qpa run does what is not done, leaves out what is unchanged, and says why it does something again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qpa.documents import AdapterSpec, FrozenAdapter, ResolvedConfiguration, TrainedGenerator
from qpa.errors import ConfigurationError, DirectoryError, DiskFullError, DocumentError, ExportError, QpaError
from qpa.passes.inspect_model import InspectModel
from qpa.pipeline.configuration import read_configuration
from qpa.store.run_directory import CHECKPOINTS, RunDirectory, list_checkpoints
from qpa.training import checkpoints
from qpa.workflow import inputs
from qpa.workflow.changes import changed_options
from qpa.workflow.inputs import read_inputs
from qpa.workflow.run import run_configuration
from tests.conftest import answer_in_process
from tests.test_processes import finish, start
from tests.tiny_models import tiny_llama

GOLDEN = Path(__file__).parent / "golden"
SMALL = """\
model: model
data: text.txt
seed: 5
plan: {rank: 4, circuits: 1}
train: {max_length: 32, max_steps: 4, batch_size: 2, save_steps: 2}
"""


@pytest.fixture
def place(tmp_path, monkeypatch, llama, text_file):
    """Return a working directory with a model, a text and bard.yaml."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "model")
    shutil.copy(text_file, "text.txt")
    Path("bard.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def made(place, in_process, made_once):
    """Return a working directory in which the run is made already."""
    shutil.copytree(made_once, place, dirs_exist_ok=True)
    return place


@pytest.fixture(scope="module")
def made_once(tmp_path_factory, llama, text_file):
    """Return a directory with the run of bard.yaml, made once for all tests."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        shutil.copytree(llama, "model")
        shutil.copy(text_file, "text.txt")
        Path("bard.yaml").write_text(SMALL)
        answer_in_process(patch)
        run()
    return place


def run(*sets, file="bard.yaml", **options):
    """Run a configuration; return the lines that were said."""
    lines = []
    run_configuration(read_configuration(Path(file), sets), say=lines.append, **options)
    return lines


def files_of(directory):
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in sorted(Path(directory).rglob("*"))
        if file.is_file()
    }


def names(lines):
    return [line.partition(":")[0] for line in lines]


UNCHANGED = ["plan: unchanged", "train: unchanged", "freeze: unchanged", "export lora: unchanged"]
ALL_UNCHANGED = [*UNCHANGED, "verify lora: unchanged", "report: unchanged"]


# What is done


def test_a_run_is_made_verified_and_then_left_as_it_is(made):
    before = files_of("runs")
    assert {"runs/bard/exports/lora/qpa/verification.json"} <= {f"runs/{name}" for name in before}
    assert run() == ALL_UNCHANGED
    assert files_of("runs") == before
    assert not list(Path("runs/bard").glob(".qpa*"))


def test_the_resolved_configuration_gives_the_same_bytes(made):
    before = files_of("runs/bard")
    shutil.copy("runs/bard/configuration.json", "kept.json")
    shutil.rmtree("runs")
    run(file="kept.json")
    assert files_of("runs/bard") == before
    assert run(file="runs/bard/configuration.json") == ALL_UNCHANGED
    document = ResolvedConfiguration.from_json(Path("kept.json").read_bytes(), "kept.json")
    trained = RunDirectory.open(Path("runs/bard")).read(TrainedGenerator)
    assert document.trained.document == trained.digest
    assert (document.value("train.batch_size"), document.value("seed"), document.formats) == (2, 5, ("lora",))
    assert {one.option for one in document.inputs} == {"plan.model", "train.data"}
    assert {"torch", "transformers", "python"} <= {package.name for package in document.packages}


def test_the_steps_by_hand_give_the_same_adapter(made, cli):
    by_hand = ("--rank", "4", "--circuits", "1", "--seed", "5", "--out", "runs/hand")
    assert cli("plan", "--model", "model", *by_hand)[0] == 0
    steps = ("--max-length", "32", "--max-steps", "4", "--batch-size", "2")
    assert cli("train", "runs/hand", "--data", "text.txt", *steps)[0] == 0
    frozen = [RunDirectory.open(Path("runs", name)).read(FrozenAdapter) for name in ("hand", "bard")]
    assert (frozen[0].arrays, frozen[0].probe) == (frozen[1].arrays, frozen[1].probe)


@pytest.mark.parametrize(
    ("option", "done", "reason"),
    [
        ("train.max_steps=3", "train", "train.max_steps 4 -> 3"),
        ("train.lr=1e-3", "train", "train.lr default -> 0.001"),
        ("seed=6", "plan", "seed 5 -> 6"),
        ("plan.rank=3", "plan", "plan.rank 4 -> 3"),
        ("freeze.source=shots", "freeze", "freeze.source default -> shots"),
        ("export.lora.dtype=bfloat16", "export lora", "export.dtype float32 -> bfloat16"),
        ("verify.engine=peft", "verify lora", "verify.engine default -> peft"),
    ],
)
def test_what_changed_is_said_and_done_again_with_what_follows(made, option, done, reason):
    lines = run(option, dry_run=True)
    stages = ["plan", "train", "freeze", "export lora", "verify lora", "report"]
    first = stages.index(done)
    assert lines[:first] == [f"{name}: unchanged" for name in stages[:first]]
    assert lines[first] == f"{done}: would be done again ({reason})"
    followers = lines[first + 1 :]
    assert all("would be done" in line for line in followers) or done == "export lora"


def test_a_changed_training_is_done_again_to_the_bits_of_a_new_one(made):
    lines = run("train.max_steps=3")
    assert lines[1] == "train: again (train.max_steps 4 -> 3); the trained generator is replaced"
    assert names(lines) == [
        *("plan", "train", "train", "freeze", "export lora", "export lora", "verify lora", "report"),
    ]
    assert "export lora: again (another adapter is in it)" in lines
    fresh = run("train.max_steps=3", "out=runs/fresh")
    assert fresh[-2].startswith("verify lora: the trained model's answers in peft, transformers")
    one, other = files_of("runs/bard"), files_of("runs/fresh")
    for files in (one, other):
        del files["configuration.json"], files["report.html"]  # which name the directory
    assert one == other
    assert run("train.max_steps=3")[1] == "train: unchanged"


def test_another_device_leaves_what_was_trained_exactly(made):
    lines = run("plan.device_target=generic:9")
    assert lines[0] == "plan: again (plan.device_target none -> generic:9)"
    assert lines[2:-1] == [*UNCHANGED[1:], "verify lora: unchanged"]
    assert lines[-1] == "report: runs/bard/report.html"


def test_a_device_that_ran_the_circuits_does_not_leave_it(place):
    noisy = ("train.source=noisy", "train.shots=64", "plan.device_target=generic:9", "train.max_steps=1")
    run(*noisy, "export=[]")
    again = run(*noisy, "export=[]", "plan.layouts=2", dry_run=True)
    assert again[0] == "plan: would be done again (plan.layouts 1 -> 2)"
    changed = run(*noisy, "export=[]", "plan.optimization_level=0")
    assert changed[2].startswith("train: again (the device's circuit changed); the trained generator")
    assert again[1] == "train: unchanged"  # what is known before the plan is made


def test_data_that_changed_is_trained_on(made):
    text = Path("text.txt").read_text()
    os.utime("text.txt", (1, 1))
    assert run(dry_run=True)[1] == "train: unchanged"
    Path("text.txt").write_text(text.replace("make", "give"))
    reason = "the content of train.data text.txt changed"
    assert run(dry_run=True)[1] == f"train: would be done again ({reason})"
    assert run("export=[]")[1] == f"train: again ({reason}); the trained generator is replaced"
    Path("text.txt").rename("moved.txt")
    assert run("data=moved.txt", dry_run=True)[1] == "train: unchanged"


def test_a_base_model_that_was_trained_on_is_another(made):
    other = tiny_llama(made / "other", seed=1)
    shutil.copy(other / "model.safetensors", "model/model.safetensors")
    lines = run(dry_run=True)
    assert lines[:2] == [
        "plan: unchanged",
        "train: would be done again (the content of plan.model model changed)",
    ]


def test_several_formats_are_exported_and_verified_each(made):
    formats = ("export.lora.dtype=bfloat16", "export.merged.out=merged", "export.gguf.out=as-gguf")
    lines = run(*formats)
    assert names(lines)[3:] == [
        *("export lora", "export lora", "verify lora", "export merged", "verify merged"),
        *("export gguf", "verify gguf", "report"),
    ]
    assert lines[-2] == (
        "verify gguf: the files keep the contract; llama.cpp is not installed, so nothing was asked "
        "for its answers"
    )
    assert Path("merged/model.safetensors").is_file() and Path("as-gguf/adapter.gguf").is_file()
    assert run(*formats)[3:-2] == [
        *("export lora: unchanged", "verify lora: unchanged", "export merged: unchanged"),
        *("verify merged: unchanged", "export gguf: unchanged"),
    ]


def test_the_page_is_written_anew_when_what_it_shows_is_asked_for_otherwise(made):
    Path("prompts.txt").write_text("line 7\n\nline 8\n")
    lines = run("report.prompts=prompts.txt", "generate.max_new_tokens=3")
    assert lines == [*ALL_UNCHANGED[:-1], "report: runs/bard/report.html"]
    assert "line 8" in Path("runs/bard/report.html").read_text()
    assert run("report.prompts=prompts.txt", "generate.max_new_tokens=3") == ALL_UNCHANGED


def test_the_default_format_is_the_plainest_of_the_kind(place, in_process):
    lines = run("plan.method=ia3", "plan.rank=null", "plan.circuits=null", "train.max_steps=1", dry_run=True)
    assert names(lines)[-3:] == ["export peft", "verify peft", "report"]


def test_nothing_is_exported_where_none_is_asked_for(place):
    assert names(run("export=[]", dry_run=True)) == ["plan", "train", "freeze", "report"]
    assert not Path("runs").exists()


# What is interrupted


class Killed(BaseException):
    """Ends a process as a signal does, without anything being tidied up in qpa."""


@pytest.fixture
def killed_after(monkeypatch):
    """Return a function after which a training is killed behind its checkpoint of a step."""

    def at(step):
        save = checkpoints.save_checkpoint

        def save_and_die(root, model, optimizer, state, **others):
            path = save(root, model, optimizer, state, **others)
            if state.global_step == step:
                raise Killed
            return path

        monkeypatch.setattr("qpa.training.generator_callback.save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            run()
        monkeypatch.setattr("qpa.training.generator_callback.save_checkpoint", save)

    return at


def test_an_interrupted_training_goes_on_by_itself_to_the_same_bits(
    place, in_process, killed_after, made_once
):
    killed_after(2)
    assert [path.name for path in list_checkpoints(Path("runs/bard", CHECKPOINTS))] == ["step-00000002"]
    assert run(dry_run=True)[1] == "train: would be done"
    lines = run()
    assert lines[:2] == ["plan: unchanged", "train: goes on from step 2"]
    assert files_of("runs/bard") == files_of(made_once / "runs/bard")


def test_an_interrupted_training_of_other_options_or_data_starts_anew(place, killed_after):
    killed_after(2)
    other = "train: from the start, not from the checkpoints of another training (train.lr default -> 0.01)"
    assert run("train.lr=0.01", "export=[]")[1] == other
    shutil.rmtree("runs")
    killed_after(2)
    Path("text.txt").write_text(Path("text.txt").read_text().replace("make", "give"))
    lines = run("export=[]")
    step = Path("runs/bard/checkpoints/step-00000002")
    assert lines[1:3] == [
        "train: goes on from step 2",
        f"train: from the start, since {step} is of other data",
    ]
    assert lines[3].startswith("train: 4 steps")


def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(made, monkeypatch):
    kept = files_of("runs/bard")

    def full(path, content):
        raise DiskFullError(path, len(content), 0, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("qpa.workflow.resolved.write_file", full)
        with pytest.raises(DiskFullError, match="free some space and run the same command again"):
            run("train.max_steps=3")
    assert files_of("runs/bard").items() == kept.items() - {("report.html", kept["report.html"])}
    with monkeypatch.context() as patch:
        patch.setattr("qpa.store.run_directory.write_file", full)
        with pytest.raises(DiskFullError):
            run("plan.rank=3")
    assert run("train.max_steps=3")[1].startswith("train: again (train.max_steps 4 -> 3)")


# Several processes


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_run_a_configuration_and_one_leaves_it_as_it_is(place):
    sets = ("--set", "verify.engine=peft", "--set", "train.device=cpu")
    for code, error in finish(start(["-m", "qpa", "run", "bard.yaml", *sets], [place, place])):
        assert code == 0, error
    kept = Path("runs/bard/configuration.json")
    assert ResolvedConfiguration.from_json(kept.read_bytes(), str(kept)).trained.n_processes == 2
    assert run("verify.engine=peft", "train.device=cpu") == ALL_UNCHANGED
    run("train.grad_accum=2", "train.device=cpu", "out=runs/one", "export=[]")
    two, one = (_adapter(Path("runs", name)) for name in ("bard", "one"))
    for path, tensor in one.items():
        torch.testing.assert_close(two[path], tensor, atol=1e-5, rtol=1e-4)


def _adapter(path):
    directory = RunDirectory.open(path)
    return load_file(directory.files.get(directory.read(FrozenAdapter).arrays))


# What is refused


def test_two_runs_at_once_are_refused(made):
    with (
        RunDirectory(Path("runs/bard")).locked(),
        pytest.raises(DirectoryError, match="runs/bard: expected a run that no"),
    ):
        run()


@pytest.mark.parametrize("gone", ["trained-generator.json", "arrays", "export", "measurement.json"])
def test_what_vanished_is_made_again(made, gone):
    run_ = RunDirectory(Path("runs/bard"))
    name = run_.read(TrainedGenerator).arrays.file if gone == "arrays" else gone
    file = Path(
        "runs/bard/exports/lora/adapter_model.safetensors" if gone == "export" else f"runs/bard/{name}"
    )
    file.unlink()
    lines = run()
    stage = {"export": "export lora", "measurement.json": "freeze"}.get(gone, "train")
    expected = {"arrays": f"train: again ({file} is gone); the trained generator is replaced"}
    expected["export"] = f"export lora: again ({file} is gone)"
    if gone in expected:
        assert expected[gone] in lines
    assert f"{stage}: unchanged" not in lines
    assert file.is_file()
    assert run() == ALL_UNCHANGED


def test_data_that_vanished_is_named_and_the_training_kept(made):
    kept = files_of("runs/bard")
    Path("text.txt").unlink()
    for sets in ((), ("plan.rank=3",)):
        with pytest.raises(
            ConfigurationError, match=r"^bard.yaml, line 2, data: expected .*, found no such file"
        ):
            run(*sets)
    assert files_of("runs/bard") == kept


def test_a_model_that_vanished_is_named_and_the_training_kept(made):
    kept = files_of("runs/bard")
    shutil.rmtree("model")
    with pytest.raises(ConfigurationError, match=r"^bard.yaml, line 1, model: expected .*, found no such"):
        run("plan.rank=3")
    assert files_of("runs/bard") == kept


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("plan.rank=null", "plan.alpha=2", "plan.method=ia3", "export=peft"), "plan.alpha: "
         "expected no such option with plan.method ia3"),
        (("plan.max_params=0", "plan.circuits=null"), "plan.max_params: expected a number of "
         "parameters such as 5000"),
        (("train.bf16=true", "train.fp16=true", "plan.rank=3"), "train.fp16: expected one of train.bf16 and "
         "train.fp16, found both"),
        (("export=lora,peft",), "export.peft: expected lora, merged, onnx, onnx-adapter, genai, "
         "gguf, mlx or compact, which carry"),
        (("export.onnx.dtype=float16",), "export.onnx.dtype: expected float32 with format onnx, "
         "found float16"),
        (("freeze.mitigation=readout",), "freeze.mitigation: expected none for the source exact, "
         "found readout"),
        (("export.lora.out=model",), "model: expected a new or empty directory, found a directory "
         "that is no qpa export"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_before_anything_is_replaced(made, sets, message):
    kept = files_of("runs/bard")
    with pytest.raises(QpaError) as caught:
        run("train.max_steps=3", *sets)
    assert message in str(caught.value)
    assert files_of("runs/bard") == kept


def test_an_export_of_another_run_is_not_replaced(made):
    run("out=runs/other", "export.lora.out=shared")
    with pytest.raises(
        ExportError, match="shared: expected a new directory, found an existing export; pass `force`"
    ):
        run("export.lora.out=shared")
    assert run("out=runs/other", "export.lora.out=shared")[3] == "export lora: unchanged"


def test_a_run_of_another_command_is_replaced_only_on_request(place, cli):
    assert (
        cli(
            "plan", "--model", "model", "--rank", "4", "--circuits", "1", "--seed", "5", "--out", "runs/bard"
        )[0]
        == 0
    )
    assert run("export=[]", dry_run=True)[0] == "plan: unchanged"
    assert cli("train", "runs/bard", "--data", "text.txt", "--max-steps", "1")[0] == 0
    with pytest.raises(
        DirectoryError, match="a run that qpa run made, found one that another command has trained"
    ):
        run("export=[]")
    lines = run("export=[]", force=True)
    assert names(lines) == ["plan", "train", "freeze", "report"]


def test_a_generator_that_another_command_trained_is_not_taken_for_the_runs_own(made, cli):
    small = ("--max-length", "32", "--max-steps", "4", "--batch-size", "2", "--save-steps", "2")
    Path("other.txt").write_text("One line says this. " * 99)
    assert cli("train", "runs/bard", "--data", "other.txt", "--force", *small)[0] == 0
    assert run(dry_run=True)[1] == "train: would be done again (another command trained it)"


@pytest.mark.parametrize("name", ["adapter-spec.json", "weight-layout.json", "configuration.json"])
def test_a_damaged_document_is_named_and_nothing_is_replaced(made, name):
    file = Path("runs/bard", name)
    file.write_bytes(file.read_bytes().replace(b'"seed": 5', b'"seed": 6'))
    kept = files_of("runs/bard")
    with pytest.raises(DocumentError, match=rf"{name}: expected digest .*`force` makes the whole run anew"):
        run()
    assert files_of("runs/bard") == kept
    assert names(run(force=True, dry_run=True)) == [
        "plan",
        "train",
        "freeze",
        "export lora",
        "verify lora",
        "report",
    ]


def test_a_directory_that_is_no_run_is_left_alone(place):
    with pytest.raises(
        DirectoryError, match="model: expected a run, or a new directory, found a directory that"
    ):
        run("out=model")
    with pytest.raises(DirectoryError, match=r"text\.txt: expected a run, or a new directory, found a file"):
        run("out=text.txt")


def test_force_does_everything_anew_to_the_same_bytes(made):
    before = files_of("runs/bard")
    lines = run(force=True)
    assert names(lines) == ["plan", "train", "freeze", "export lora", "verify lora", "report"]
    assert files_of("runs/bard") == before


def test_an_option_that_an_older_document_does_not_know_counts_as_its_default():
    spec = AdapterSpec.from_json((GOLDEN / "adapter-spec-1/llama.json").read_bytes(), "llama.json")
    now = InspectModel(**{one.name: one.value for one in spec.provenance.options})
    known = tuple(one for one in spec.provenance.options if one.name != "revision")
    older = spec.provenance.model_copy(update={"options": known})
    assert changed_options(older, now, older.seed) == []
    assert changed_options(older, replace(now, revision="v1"), 0) == [
        f"seed {older.seed} -> 0",
        "plan.revision default -> v1",
    ]


# Inputs


def test_a_large_file_is_told_by_its_length_and_blocks_all_over_it(place, monkeypatch):
    monkeypatch.setattr(inputs, "_BLOCK_BYTES", 4)
    monkeypatch.setattr(inputs, "_N_BLOCKS", 8)
    monkeypatch.setattr(inputs, "_WHOLE_BYTES", 32)
    content = bytes(range(200)) * 5
    digests = set()
    for changed in (content, content[:-1], content[:-1] + b"x", b"x" + content[1:], content[::-1]):
        Path("large.txt").write_bytes(changed)
        (found,) = [
            one
            for one in read_inputs(read_configuration(Path("bard.yaml"), ["data=large.txt"]))
            if one.option == "train.data"
        ]
        digests.add(found.digest)
    assert len(digests) == 5


def test_a_directory_is_told_by_its_names_and_files(place):
    def digest():
        found = read_inputs(read_configuration(Path("bard.yaml")))
        return next(one.digest for one in found if one.option == "plan.model")

    first = digest()
    Path("model/.cache").mkdir()
    Path("model/.cache/lock").write_text("x")
    assert digest() == first
    Path("model/config.json").rename("model/other.json")
    assert digest() != first


# The command


def test_the_command_prints_a_line_a_stage_or_json(made, cli):
    code, out, _ = cli("run", "bard.yaml")
    assert (code, out.splitlines()[:4]) == (0, UNCHANGED)
    code, out, _ = cli("run", "bard.yaml", "--json", "--set", "freeze.source=shots", "--dry-run")
    stages = json.loads(out)["stages"]
    assert [stage["name"] for stage in stages] == [
        "plan",
        "train",
        "freeze",
        "export lora",
        "verify lora",
        "report",
    ]
    assert stages[1]["why"] is None and stages[2]["why"] == "freeze.source default -> shots"


def test_the_command_names_line_and_file(place, cli):
    Path("bad.yaml").write_text(SMALL.replace("max_steps", "max_step"))
    assert cli.refuses("run", "bad.yaml") == (
        "error: bad.yaml, line 5: expected an option of train, found max_step; did you mean max_steps?\n"
    )
    assert cli.refuses("run", "bard.yaml", "--set", "train.max_steps=no").startswith(
        "error: --set, train.max_steps: expected a whole number of at least 1, found no"
    )


def test_init_prints_what_run_takes(place, cli):
    code, out, _ = cli(
        "init", "--model", "model", "--data", "text.txt", "--out", "runs/x", "--set", "train.max_steps=3"
    )
    assert code == 0
    Path("new.yaml").write_text(out)
    found = read_configuration(Path("new.yaml"))
    assert dict(found.values) == {
        "plan.model": "model",
        "train.data": ("text.txt",),
        "out": "runs/x",
        "train.max_steps": 3,
    }
    assert names(run(file="new.yaml", dry_run=True))[0] == "plan"
    assert cli.refuses("init", "--set", "train.max_step=3").startswith(
        "error: --set: expected an option of train"
    )
