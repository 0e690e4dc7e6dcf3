"""The commands as a user types them: output, exit codes, one line for every bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qpa.cli.main import main
from qpa.documents import AdapterSpec, FrozenAdapter, NativeCircuit
from qpa.store.atomic_files import TEMPORARY_PREFIX
from qpa.store.run_directory import RunDirectory, list_checkpoints
from qpa.training import generator_callback
from tests.command_line import Cli

PLAN = ["--rank", "2", "--circuits", "2", "--layers", "2"]
TRAIN = ["--max-steps", "3", "--max-length", "32", "--batch-size", "2", "--device", "cpu"]


def says_what_lacks_room(line: str, file: Path | str) -> bool:
    """Return whether an error names a file of a full disk, the bytes it needs, and those that are free."""
    pattern = rf"error: {file}: expected room for at least [\d,]+ bytes, found [\d,]+ bytes free \(No space"
    return re.match(pattern, line) is not None


def files_under(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def planned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("planned") / "run"
    _main("plan", "--model", llama, "--out", out, *PLAN)
    return out


@pytest.fixture(scope="module")
def trained(planned: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(planned, out)
    _main("train", out, "--data", text_file, *TRAIN, "--save-steps", "2")
    return out


def _main(*arguments: str | Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qpa", *map(str, arguments)])
        main_code: Any = None
        try:
            main()
        except SystemExit as stop:
            main_code = stop.code
        assert not main_code


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a trained run that a test may damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_five_commands_end_in_a_verified_adapter(
    cli: Cli, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    code, out, _ = cli("plan", "--model", llama, "--out", run, *PLAN, "--json")
    account = json.loads(out)["account"]
    assert code == 0
    assert account["n_generator"] == account["n_angles"] + account["n_decoder"] < account["n_adapter"]
    code, out, err = cli("train", run, "--data", text_file, *TRAIN, "--json")
    result = json.loads(out)["result"]
    assert (code, err) == (0, "")
    assert result["eval_loss"] < result["base_loss"]
    assert cli("export", run, "--format", "lora", "--out", adapter)[0] == 0
    code, out, _ = cli("inspect", adapter, "--json")
    assert json.loads(out)["n_numbers"] == account["n_adapter"]
    assert json.loads(out)["findings"] == []
    code, out, _ = cli("verify", adapter, "--model", llama, "--json")
    assert code == 0
    engines = json.loads(out)["engines"]
    assert [engine["engine"] for engine in engines] == ["peft", "transformers"]
    assert all(engine["greedy_tokens_equal"] and engine["max_logit_difference"] <= 1e-5 for engine in engines)
    assert all(engine["max_base_difference"] > 1e-3 for engine in engines)


@pytest.mark.parametrize("command", ["plan", "transpile", "train", "export", "inspect", "verify"])
def test_every_command_has_help_with_examples(cli: Cli, command: str) -> None:
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert "Examples" in out and f"qpa {command}" in out and "--json" in out


def test_tables_show_the_account(cli: Cli, trained: Path) -> None:
    code, out, err = cli("inspect", trained)
    assert (code, err) == (0, "")
    assert all(
        words in out for words in ("circuit angles", "the adapter's own (m)", "frozen-adapter", "perplexity")
    )


@pytest.mark.parametrize(
    ("features", "names"),
    [
        ("circuit", ["circuit angles", "decoder"]),
        ("classical", ["control", "decoder"]),
        ("random", ["circuit angles", "decoder"]),
        ("bits", ["control", "decoder"]),
    ],
)
def test_the_account_adds_up_with_a_control_too(
    cli: Cli, llama: Path, tmp_path: Path, features: str, names: list[str]
) -> None:
    run = tmp_path / "run"
    cli("plan", "--model", llama, "--out", run, *PLAN, "--features", features)
    account = json.loads(cli("inspect", run, "--json")[1])["account"]
    row = r"^ +(circuit angles|control|decoder|generator, trained) +([\d,]+) *$"
    rows = re.findall(row, cli("inspect", run)[1], re.MULTILINE)
    numbers = {name: int(text.replace(",", "")) for name, text in rows}
    assert list(numbers) == [*names, "generator, trained"]
    assert sum(numbers[name] for name in names) == numbers["generator, trained"] == account["n_generator"]
    assert account["n_generator"] == account["n_angles"] + account["n_control"] + account["n_decoder"]


def test_help_imports_no_torch() -> None:
    script = "import sys; sys.argv = ['qpa', '--help']\nfrom qpa.cli.main import main\n"
    script += "try: main()\nexcept SystemExit: pass\n"
    check = "sys.exit(bool({'torch', 'transformers', 'qiskit', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", script + check], capture_output=True, check=False).returncode
        == 0
    )


def test_planning_leaves_out_packages_it_does_not_need_and_the_collector_on(
    llama: Path, tmp_path: Path
) -> None:
    script = f"""
import gc, json, sys
from qpa.cli.main import main
sys.argv = {["qpa", "plan", "--model", str(llama), "--out", str(tmp_path / "run"), *PLAN]!r}
try:
    main()
finally:
    print(json.dumps([gc.isenabled(), sorted(sys.modules)]), file=sys.stderr)
"""
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stderr
    is_on, modules = json.loads(printed)
    unneeded = {"peft", "trl", "datasets", "pandas", "sklearn", "matplotlib", "onnx", "ml_dtypes"}
    assert is_on
    assert "torch" in modules
    assert not (unneeded | {"qpa.training.session", "qpa.exporters"}) & {*modules}


@pytest.mark.parametrize(("features", "is_run"), [("circuit", True), ("signed", True), ("log-linear", False)])
def test_a_plan_shows_what_stands_in_the_circuits_place(
    cli: Cli, llama: Path, tmp_path: Path, features: str, is_run: bool
) -> None:
    options = ("--generator", "state", "--features", features)
    code, out, err = cli("plan", "--model", llama, *options, "--out", tmp_path / "run")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    assert ["features", features] in rows
    assert any(row[:1] == ["depth"] for row in rows) == is_run
    assert (["circuits", "none,", "a", "control", "in", "their", "place"] in rows) != is_run


@pytest.mark.parametrize("arguments", [["plan"], ["train"], ["frobnicate"], ["plan", "--rank", "many"]])
def test_wrong_usage_exits_with_2(cli: Cli, arguments: list[str]) -> None:
    assert cli(*arguments)[0] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "0"], "--rank: expected a whole number of at least 1, found 0"),
        (["--rank", "-3"], "--rank"),
        (["--rank", "40"], "--rank: expected at most 32"),
        (["--alpha", "0"], "--alpha"),
        (["--alpha", "nan"], "--alpha"),
        (["--method", "tarot"], "--method: expected lora"),
        (["--generator", "oracle"], "--generator"),
        (
            ["--generator", "paper", "--chunk-size", "0"],
            "--chunk-size: expected a whole number of at least 1",
        ),
        (["--chunk-size", "64"], "--generator spectral"),
        (["--chunk-size", "64", "--generator", "aligned"], "--generator aligned"),
        (["--features", "magic"], "tying, shared or own, found magic"),
        (["--vectors", "q_proj,nope"], "--vectors: expected all, none, or some of"),
        (["--rank", "1"], "--rank: expected at least 2"),
        (
            ["--rank", "3", "--circuits", "5"],
            "--circuits: expected at most 4, 2 for each layer with rank 3, found 5",
        ),
        (["--max-params", "0"], "--max-params: expected a number of parameters"),
        (["--max-params", "-3"], "--max-params: expected a number of parameters"),
        (["--max-params", "abc"], "--max-params: expected a number of parameters"),
        (["--max-params", "nan"], "--max-params: expected a number of parameters"),
        (["--max-params", "inf%"], "--max-params: expected a number of parameters"),
        (["--max-params", "1", "--generator", "spectral"], "--max-params: expected at least"),
        (["--max-params", "5000", "--circuits", "2"], "--max-params: expected neither --circuits"),
        (["--max-params", "5000", "--vectors", "none"], "--max-params: expected neither --circuits"),
        (["--max-params", "5000", "--generator", "paper"], "--max-params: expected neither --circuits"),
        (["--qubits", "25"], "--qubits: expected at most 24, found 25"),
        (["--qubits", "2"], "--qubits: expected at least"),
        (["--circuits", "0"], "--circuits"),
        (["--layers", "0"], "--layers"),
        (["--targets", "q_prok"], "the nearest names are q_proj"),
        (["--targets", ","], "--targets"),
        (["--target", "generic:2"], "found 2"),
        (["--device-target", "generic:2"], "found 2"),
        (["--target", "fake_turin"], "fake_torino"),
    ],
)
def test_plan_refuses_and_leaves_nothing(
    cli: Cli, llama: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    assert words in cli.refuses("plan", "--model", llama, "--out", tmp_path / "runs" / "x", *options)
    assert not list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else True


def test_a_budget_is_kept_and_counted(cli: Cli, llama: Path, tmp_path: Path) -> None:
    size = ["--rank", "4", "--max-params", "25%", "--json"]
    code, out, _ = cli("plan", "--model", llama, "--out", tmp_path / "run", *size)
    account = json.loads(out)["account"]
    assert code == 0
    assert 0.2 * account["n_adapter"] < account["n_generator"] <= 0.25 * account["n_adapter"]


def test_the_old_spelling_of_circuits_is_understood(cli: Cli, llama: Path, tmp_path: Path) -> None:
    for name, spelling in (("old", "--heads"), ("new", "--circuits")):
        assert cli("plan", "--model", llama, "--out", tmp_path / name, "--rank", "3", spelling, "3")[0] == 0
    assert files_under(tmp_path / "old") == files_under(tmp_path / "new")
    assert "--heads" not in cli("plan", "--help")[1]


def test_plan_refuses_what_is_no_model(cli: Cli, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "perpetuum_mobile"}')
    vision = tmp_path / "vision"
    vision.mkdir()
    (vision / "config.json").write_text('{"model_type": "vit"}')
    words = {
        tmp_path / "none": "no such directory",
        empty: "no config.json",
        broken: "",
        unknown: "perpetuum_mobile",
    }
    for path, expected in (words | {vision: "causal language model"}).items():
        assert expected in cli.refuses("plan", "--model", path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_plan_refuses_a_hub_id_that_cannot_be_reached(cli: Cli, tmp_path: Path) -> None:
    assert "nobody/nothing" in cli.refuses("plan", "--model", "nobody/nothing", "--out", tmp_path / "run")


def test_an_existing_run_needs_force(cli: Cli, llama: Path, run: Path) -> None:
    before = files_under(run)
    assert "--force" in cli.refuses("plan", "--model", llama, "--out", run, *PLAN)
    assert "--rank" in cli.refuses("plan", "--model", llama, "--out", run, "--force", "--rank", "0")
    assert files_under(run) == before
    assert cli("plan", "--model", llama, "--out", run, *PLAN, "--force")[0] == 0
    assert "frozen-adapter.json" not in files_under(run)


def test_a_directory_that_is_no_run_is_never_replaced(cli: Cli, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert "no qpa run" in cli.refuses("plan", "--model", llama, "--out", tmp_path, "--force")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


BAD_DATA = {
    "empty.txt": (b"", "an empty file"),
    "binary.txt": (b"abc\x00def" * 50, "binary data"),
    "latin.txt": ("é".encode("latin-1") * 50, "UTF-8"),
    "short.txt": (b"a", "too short"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": "b"\n', "line 2"),
    "list.jsonl": (b'{"text": "a"}\n[1]\n', "line 2"),
    "keys.jsonl": (b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "line 2"),
    "type.jsonl": (b'{"text": 3}\n', "line 1"),
    "nothing.jsonl": (b'{"words": "a"}\n', "line 1"),
    "one.jsonl": (b'{"text": "a"}\n', "at least 2 rows"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_train_refuses_bad_data_and_leaves_the_run_alone(
    cli: Cli, planned: Path, tmp_path: Path, name: str
) -> None:
    content, words = BAD_DATA[name]
    (tmp_path / name).write_bytes(content)
    before = files_under(planned)
    assert words in cli.refuses("train", planned, "--data", tmp_path / name, *TRAIN)
    assert files_under(planned) == before


def test_train_refuses_missing_data_and_missing_runs(
    cli: Cli, planned: Path, text_file: Path, tmp_path: Path
) -> None:
    assert "no such file" in cli.refuses("train", planned, "--data", tmp_path / "none.txt")
    assert "no such directory" in cli.refuses("train", tmp_path / "none", "--data", text_file)
    assert "qpa plan" in cli.refuses("train", tmp_path, "--data", text_file)
    asked = cli.refuses("train", planned, "--data", text_file, *TRAIN, "--source", "dice")
    assert asked.startswith("error: --source: expected ") and "found dice" in asked
    assert not (planned / "metrics.jsonl").exists()  # which the training would have started


def test_a_trained_run_is_not_trained_again_by_accident(cli: Cli, run: Path, text_file: Path) -> None:
    before = files_under(run)
    assert "--resume or --force" in cli.refuses("train", run, "--data", text_file, *TRAIN)
    assert files_under(run) == before
    assert cli("train", run, "--data", text_file, *TRAIN, "--save-steps", "2", "--resume")[0] == 0
    assert files_under(run)["frozen-adapter.json"] == before["frozen-adapter.json"]


def test_a_trained_run_without_a_checkpoint_is_not_said_to_be_resumable(
    cli: Cli, run: Path, text_file: Path
) -> None:
    shutil.rmtree(run / "checkpoints")
    line = cli.refuses("train", run, "--data", text_file, *TRAIN)
    assert line.endswith("found a trained one; pass --force\n")
    assert cli("train", run, "--data", text_file, *TRAIN, "--force")[0] == 0


def test_a_run_that_is_trained_again_keeps_no_arrays_of_the_training_before(
    cli: Cli, run: Path, text_file: Path
) -> None:
    before = {file.name for file in run.glob("*.safetensors")}
    assert cli("train", run, "--data", text_file, *TRAIN, "--seed", "7", "--force")[0] == 0
    documents = "".join(file.read_text() for file in run.glob("*.json"))
    after = {file.name for file in run.glob("*.safetensors")}
    assert after != before
    assert after == set(re.findall(r"\w{64}\.safetensors", documents))
    assert cli("export", run, "--out", run.parent / "adapter")[0] == 0


def test_a_trained_run_is_transpiled_for_another_device_and_exported_all_the_same(
    cli: Cli, run: Path, tmp_path: Path
) -> None:
    frozen = (run / "frozen-adapter.json").read_bytes()
    assert json.loads(cli("inspect", run, "--json")[1])["circuit"]["target"] == "none"
    code, out, err = cli("transpile", run, "--device-target", "generic:9", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["circuit"]["target"] == "generic:9"
    assert json.loads(cli("inspect", run, "--json")[1])["circuit"] == json.loads(out)["circuit"]
    assert "generic:9" in cli("transpile", run, "--target", "generic:9")[1]
    assert (run / "frozen-adapter.json").read_bytes() == frozen
    assert cli("export", run, "--out", tmp_path / "adapter")[0] == 0
    before = files_under(run)
    assert "fake_torino" in cli.refuses("transpile", run, "--device-target", "fake_turin")
    assert files_under(run) == before


def test_documents_edited_by_hand_are_refused(cli: Cli, run: Path, text_file: Path, tmp_path: Path) -> None:
    layout = run / "weight-layout.json"
    layout.write_text(layout.read_text().replace('"n_layers": 2', '"n_layers": 4'))
    for arguments in (
        ["train", run, "--data", text_file],
        ["export", run, "--out", tmp_path / "a"],
        ["inspect", run],
    ):
        assert "edited or damaged" in cli.refuses(*arguments)
    assert not (tmp_path / "a").exists()


def test_documents_of_a_newer_schema_are_refused(cli: Cli, run: Path, text_file: Path) -> None:
    spec = run / "adapter-spec.json"
    spec.write_text(
        spec.read_text().replace(f"qpa.adapter-spec/{AdapterSpec.schema_version()}", "qpa.adapter-spec/99")
    )
    assert "newer qpa" in cli.refuses("train", run, "--data", text_file)


def test_a_stage_made_from_another_plan_is_stale(cli: Cli, llama: Path, run: Path, tmp_path: Path) -> None:
    cli("plan", "--model", llama, "--out", tmp_path / "other", *PLAN, "--seed", "5")
    shutil.copy(tmp_path / "other" / "weight-layout.json", run / "weight-layout.json")
    assert "stale" in cli.refuses("export", run, "--out", tmp_path / "adapter")


def test_export_before_training_is_refused(cli: Cli, planned: Path, tmp_path: Path) -> None:
    assert "run qpa train first" in cli.refuses("export", planned, "--out", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_export_refuses_unknown_formats_and_existing_directories(cli: Cli, run: Path, tmp_path: Path) -> None:
    assert "--format: expected lora" in cli.refuses(
        "export", run, "--format", "tarot", "--out", tmp_path / "a"
    )
    assert cli("export", run, "--out", tmp_path / "a")[0] == 0
    assert "--force" in cli.refuses("export", run, "--out", tmp_path / "a")
    assert cli("export", run, "--out", tmp_path / "a", "--force")[0] == 0


def test_a_truncated_array_file_is_refused(cli: Cli, run: Path, tmp_path: Path) -> None:
    for file in run.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    assert "bytes, found" in cli.refuses("export", run, "--out", tmp_path / "adapter")


def test_verify_says_what_is_wrong_with_an_adapter(cli: Cli, run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    cli("export", run, "--out", adapter)
    assert cli("verify", adapter, "--static")[0] == 0
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    code, out, err = cli("verify", adapter, "--static")
    assert code == 1 and "L08" in out + err
    assert "name a directory that qpa export wrote" in cli.refuses("verify", tmp_path)
    assert "neither" in cli.refuses("inspect", tmp_path)


@pytest.mark.parametrize("static", [(), ("--static",)])
def test_verify_says_in_one_line_that_it_was_given_no_export(
    cli: Cli, planned: Path, tmp_path: Path, static: tuple[str, ...]
) -> None:
    any_origin = ", or a LoRA of any origin" if static else ""
    expected = f"expected a directory that qpa export wrote{any_origin}, found"
    none, file = tmp_path / "none", tmp_path / "file"
    file.touch()
    assert cli.refuses("verify", none, *static) == f"error: {none}: {expected} no such directory\n"
    assert cli.refuses("verify", file, *static) == f"error: {file}: {expected} a file\n"
    refused = cli.refuses("verify", planned, *static)
    if static:
        advice = f"export it first: qpa export {planned} --out ..."
        assert refused == f"error: {planned}: {expected} a run; {advice}\n"
    else:  # a run that is frozen could be verified
        missing = planned / "trained-generator.json"
        expected = "expected a document made by qpa train, found nothing; run qpa train first"
        assert refused == f"error: {missing}: {expected}\n"


def test_a_run_with_anything_else_in_it_is_never_replaced(cli: Cli, llama: Path, run: Path) -> None:
    (run / "thesis.tex").write_text("precious")
    before = files_under(run)
    assert "thesis.tex in it" in cli.refuses("plan", "--model", llama, "--out", run, "--force")
    assert files_under(run) == before


def test_an_interrupted_training_is_not_lost_by_accident(cli: Cli, run: Path, text_file: Path) -> None:
    (run / "trained-generator.json").unlink()
    (run / "frozen-adapter.json").unlink()
    before = files_under(run)
    assert "checkpoints of an interrupted training" in cli.refuses("train", run, "--data", text_file, *TRAIN)
    assert files_under(run) == before


def test_a_run_is_trained_by_one_process_at_a_time(cli: Cli, planned: Path, text_file: Path) -> None:
    with RunDirectory(planned).locked():
        assert "another qpa train" in cli.refuses("train", planned, "--data", text_file, *TRAIN)


@pytest.mark.parametrize("command", ["train", "transpile"])
def test_a_run_that_is_replaced_just_before_it_is_held_is_read_anew(
    cli: Cli, llama: Path, planned: Path, text_file: Path, tmp_path: Path, command: str
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(planned, run)
    _main("plan", "--model", llama, "--out", other, *PLAN, "--seed", "5")
    locked = RunDirectory.locked

    def replace_first(directory: RunDirectory) -> Any:
        shutil.rmtree(run)
        other.rename(run)
        return locked(directory)

    options = {"train": ["--data", text_file, *TRAIN], "transpile": ["--device-target", "generic:9"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "locked", replace_first)
        assert cli(command, run, *options[command])[0] == 0
    made = {"train": FrozenAdapter, "transpile": NativeCircuit}[command]
    assert RunDirectory(run).read(made).provenance.seed == 5


def test_a_run_that_is_being_trained_is_not_replaced(cli: Cli, llama: Path, run: Path) -> None:
    before = files_under(run)
    with RunDirectory(run).locked():
        line = cli.refuses("plan", "--model", llama, "--out", run, *PLAN, "--force")
    assert "expected a run that no command uses" in line
    assert files_under(run) == before


@pytest.mark.parametrize(("limit", "what"), [(2_000, "plan"), (9_000, "train"), (9_000, "export")])
def test_a_disk_that_takes_no_more_is_one_line_and_nothing_half_written(
    planned: Path, trained: Path, llama: Path, text_file: Path, tmp_path: Path, limit: int, what: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(planned, run)
    arguments = {
        "plan": ["plan", "--model", llama, "--out", tmp_path / "new", *PLAN],
        "train": ["train", run, "--data", text_file, *TRAIN, "--save-steps", "1"],
        "export": ["export", trained, "--out", tmp_path / "new"],
    }[what]
    script = f"import resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    script += "from qpa.cli.main import main; main()"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("error: ") and "too large" in done.stderr.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (run / "trained-generator.json").exists()
    assert not list(run.rglob(f"{TEMPORARY_PREFIX}*")) and not list(run.glob("checkpoints/step-*"))


def test_a_full_disk_ends_a_training_that_can_be_resumed(
    cli: Cli, planned: Path, trained: Path, text_file: Path, small_disk: Callable[[str], Path]
) -> None:
    checkpoint = list_checkpoints(trained / "checkpoints")[0]
    n_pages = [
        sum(len(content) // 4096 + 1 for content in files_under(path).values())
        for path in (planned, checkpoint)
    ]
    disk = small_disk(f"size={4 * (n_pages[0] + n_pages[1] * 3 // 2)}k")
    run = disk / "run"
    shutil.copytree(planned, run)
    options = ["train", run, "--data", text_file, *TRAIN, "--save-steps", "1"]
    line = cli.refuses(*options)
    assert says_what_lacks_room(line, rf"{run}/checkpoints/step-00000002/\S+"), line
    assert line.endswith("; free some space and run the same command with --resume\n")
    assert not list(run.rglob(f"{TEMPORARY_PREFIX}*")) and list(run.glob("checkpoints/step-*"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    code, _, err = cli(*options, "--resume")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(("n_checkpoints", "advice"), [(0, "again"), (1, "with --resume")])
def test_a_disk_that_says_it_is_full_ends_a_training_that_can_be_resumed(
    cli: Cli, planned: Path, text_file: Path, tmp_path: Path, n_checkpoints: int, advice: str
) -> None:
    """The same where no small disk can be mounted, and without a checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(planned, run)
    options = ["train", run, "--data", text_file, *TRAIN, "--save-steps", "1"]
    save_checkpoint = generator_callback.save_checkpoint

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:

        def save(root: Path, *rest: Any, **options: Any) -> Path:
            if len(list_checkpoints(root)) == n_checkpoints:
                patch.setattr(os, "fsync", full)
            return save_checkpoint(root, *rest, **options)

        patch.setattr(generator_callback, "save_checkpoint", save)
        line = cli.refuses(*options)
    assert says_what_lacks_room(line, rf"{run}/checkpoints/step-0000000{n_checkpoints + 1}/\S+"), line
    assert line.endswith(f"; free some space and run the same command {advice}\n")
    assert not list(run.rglob(f"{TEMPORARY_PREFIX}*"))
    assert cli(*options, *(["--resume"] if n_checkpoints else []))[0] == 0


def test_a_full_disk_behind_standard_output_is_named(trained: Path) -> None:
    command = [sys.executable, "-m", "qpa.cli", "inspect", str(trained)]
    with Path("/dev/full").open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: standard output or a temporary file: No space left on device\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small or read-only disk needs root")
@pytest.mark.parametrize("options", ["size=4k", "size=1m,ro"])
def test_a_full_or_read_only_disk_is_one_line_and_nothing_half_written(
    run: Path, llama: Path, tmp_path: Path, options: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    commands = (
        f'qpa() {{ "{sys.executable}" -m qpa.cli "$@"; }}',
        f"mount -t tmpfs -o {options} none {disk} || exit 77",
        f"qpa plan --model {llama} --out {disk}/run --rank 16 2>plan.err; echo $? >plan.rc",
        f"qpa export {run} --out {disk}/adapter 2>export.err; echo $? >export.rc",
        f"ls -A {disk} >left",
    )
    done = subprocess.run(["unshare", "-m", "bash", "-c", "\n".join(commands)], cwd=tmp_path, check=False)
    if done.returncode == 77:
        pytest.skip("this machine does not allow mounting")
    read = {name: (tmp_path / name).read_text() for name in ("plan.err", "export.err", "left")}
    assert (tmp_path / "export.rc").read_text() == "1\n", read
    assert read["export.err"].startswith("error: ") and read["export.err"].count("\n") == 1
    assert (tmp_path / "plan.rc").read_text() == "1\n", read
    assert read["plan.err"].startswith("error: ") and read["plan.err"].count("\n") == 1
    if options == "size=4k":
        assert says_what_lacks_room(read["plan.err"], f"{disk}/run/\\S+"), read
        assert says_what_lacks_room(read["export.err"], f"{disk}/adapter/\\S+"), read
    assert read["left"] == ""
