"""The page of a run: whole, safe, the same bytes each time, and true to the documents."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qpa.cli.main import main
from qpa.documents import FrozenAdapter, TrainedGenerator, WeightLayout
from qpa.report.samples import printable
from qpa.store.run_directory import REPORT, RunDirectory
from tests.command_line import Cli
from tests.tiny_models import tiny_llama

# peft asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

VOID = {"meta", "link", "br", "hr", "img", "input"}
SHAPES = {"line", "rect", "circle", "path", "polyline"}
FEW = ("--max-new-tokens", "8")
HOSTILE = "<script>alert('a')</script> & \"b\" {{ 7 * 7 }}"


class Page(HTMLParser):
    """A parsed page; what is wrong with it is in `faults`."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.faults: list[str] = []
        self.ids: set[str] = set()
        self.targets: set[str] = set()
        self.headings: list[str] = []
        self.words: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.text = text
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self.open]
        self.faults += [f"#{target} leads nowhere" for target in self.targets - self.ids]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        if len(facts) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form") or tag in VOID - {"meta"}:
            self.faults.append(f"<{tag}>")
        self.faults += [f"<{tag} {name}>" for name in facts if name.startswith("on") or name == "src"]
        if "href" in facts:
            self.targets.add(str(facts["href"]).removeprefix("#"))
            if not str(facts["href"]).startswith("#"):
                self.faults.append(f"a link to {facts['href']}")
        if "id" in facts:
            if facts["id"] in self.ids:
                self.faults.append(f"id {facts['id']} twice")
            self.ids.add(str(facts["id"]))
        if tag == "svg" and "svg" not in self.open:
            self.pictures.append(facts)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in SHAPES:
            self.faults.append(f"<{tag}/>")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(path: Path) -> Page:
    return Page(path.read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def command(*arguments: str | Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qpa", *map(str, arguments)])
        with pytest.raises(SystemExit, match=r"^0$"):
            main()


@pytest.fixture(scope="module")
def made(base: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a planned run, a trained one, and an export of it."""
    root = tmp_path_factory.mktemp("made")
    device = ("--device-target", "generic:7")
    command("plan", "--model", base, "--out", root / "planned", "--rank", "4", "--max-params", "150", *device)
    shutil.copytree(root / "planned", root / "bard")
    command("train", root / "bard", "--data", text_file, "--max-length", "64", "--max-steps", "20")
    command("export", root / "bard", "--format", "lora", "--out", root / "export")
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """Return a trained run that a test may damage."""
    return shutil.copytree(made / "bard", tmp_path / "bard")


def test_a_trained_run_is_one_whole_page_the_same_each_time(
    cli: Cli, run: Path, made: Path, tmp_path: Path, in_process: None
) -> None:
    export = shutil.copytree(made / "export", tmp_path / "export")
    assert cli("verify", export)[0] == 0
    arguments = ("report", run, "--export", export, "--prompt", "line 1", "--prompt", HOSTILE, *FEW)
    assert cli(*arguments) == (0, f"wrote {run / REPORT}\n", "")
    text = (run / REPORT).read_bytes()
    assert cli(*arguments, "--out", tmp_path / "again.html")[0] == 0
    assert (tmp_path / "again.html").read_bytes() == text
    page = page_of(run / REPORT)
    assert page.faults == []
    assert page.headings[0] == "h1" and page.headings.count("h1") == 1
    assert len(page.pictures) == 7  # losses, account, circuit, native circuit, probabilities, lora_A, lora_B
    assert all(facts["role"] == "img" and facts["aria-label"] for facts in page.pictures)
    assert not re.search(r"url\(|@import|https?:", page.text)
    assert HOSTILE in page.shown and "alert" not in re.sub("&lt;script&gt;.*?&lt;/script&gt;", "", page.text)
    frozen = RunDirectory(run).read(FrozenAdapter)
    account, result = frozen.account, frozen.result
    for fact in (
        *(f"{account.n_generator:,}", f"{account.n_adapter:,}", f"{account.percent:.2f} %"),
        *(f"{result.base_loss:.4f}", f"{result.eval_loss:.4f}", f"{result.n_eval_tokens:,}"),
        *(
            frozen.digest,
            result.data_digest,
            "generic:7",
            "parameter-shift",
            "equal",
        ),
        f'PeftModel.from_pretrained(base, "{export}")',
        f"--lora-modules adapter={export}",
        f"qpa export {run} --format gguf --out adapters/bard-gguf",
    ):
        assert fact in page.shown, fact


def test_samples_are_those_of_qpa_generate(cli: Cli, run: Path) -> None:
    code, out, _ = cli("generate", run, "--prompt", "line 7: ", *FEW, "--json")
    (sample,) = json.loads(out)["samples"]
    assert code == 0 and sample["prompt"] == "line 7: " and sample["base"] != sample["adapted"]
    cli("report", run, "--prompt", "line 7: ", *FEW)
    shown = page_of(run / REPORT).words
    for text in (sample["base"], sample["adapted"]):
        assert any(word.strip() == text.strip() for word in shown)


def test_without_prompts_the_evaluation_split_begins(cli: Cli, run: Path, text_file: Path) -> None:
    _, out, _ = cli("generate", run, *FEW, "--json")
    (sample,) = json.loads(out)["samples"]
    assert sample["prompt"] and sample["prompt"] in text_file.read_text()


def test_a_planned_run_has_a_page_too(cli: Cli, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "planned.html"
    assert cli("report", made / "planned", "--out", out)[0] == 0
    page = page_of(out)
    assert page.faults == [] and len(page.pictures) == 3
    assert "It is planned, and not trained yet." in page.shown and "There is no adapter yet." in page.shown
    layout = RunDirectory(made / "planned").read(WeightLayout)
    assert f"{layout.account.n_generator:,} trained numbers generate" in page.shown
    assert {"verification", "loading", "training", "numbers"}.isdisjoint(page.ids)


def test_a_run_that_is_not_frozen_says_so(cli: Cli, run: Path) -> None:
    (run / FrozenAdapter.file_name()).unlink()
    assert cli("report", run)[0] == 0
    page = page_of(run / REPORT)
    assert page.faults == [] and "There is no adapter yet." in page.shown
    assert f"{RunDirectory(run).read(TrainedGenerator).result.eval_loss:.4f}" in page.shown
    assert f"run qpa freeze {run} first" in cli.refuses("generate", run, "--prompt", "a")


def test_a_control_has_no_circuit_to_draw(cli: Cli, base: Path, tmp_path: Path) -> None:
    run = tmp_path / "control"
    assert cli("plan", "--model", base, "--features", "classical", "--rank", "4", "--out", run)[0] == 0
    assert cli("report", run)[0] == 0
    page = page_of(run / REPORT)
    assert page.faults == [] and "there is nothing to draw" in page.shown and len(page.pictures) == 1


def test_samples_are_left_out_where_the_base_model_is_gone(
    cli: Cli, made: Path, base: Path, tmp_path: Path
) -> None:
    out, moved = tmp_path / "page.html", base.with_name("moved")
    base.rename(moved)
    try:
        assert cli("report", made / "bard", "--out", out)[0] == 0
        page = page_of(out)
        assert cli("report", made / "bard", "--model", moved, "--out", out, *FEW)[0] == 0
    finally:
        moved.rename(base)
    assert page.faults == [] and "Left out, since the base model does not load here." in page.shown
    assert "with the adapter" in page_of(out).shown and "Left out" not in page_of(out).shown


def test_an_export_of_another_run_is_refused(cli: Cli, run: Path, made: Path, text_file: Path) -> None:
    training = ("--data", text_file, "--max-length", "64", "--max-steps", "2", "--force")
    cli("report", run, *FEW)
    assert cli("train", run, *training)[0] == 0
    assert not (run / REPORT).exists()  # it showed another training
    assert "one of another run" in cli.refuses("report", run, "--export", made / "export")
    assert "no such directory" in cli.refuses("report", run, "--export", run / "none")
    assert not (run / REPORT).exists()


def test_a_page_in_a_run_is_the_runs_own(cli: Cli, base: Path, run: Path) -> None:
    cli("report", run, *FEW)
    assert cli("plan", "--model", base, "--rank", "2", "--out", run, "--force")[0] == 0
    assert not (run / REPORT).exists()


def test_generate_refuses_what_is_no_trained_run_or_no_prompt(cli: Cli, made: Path, tmp_path: Path) -> None:
    planned = made / "planned"
    assert f"run qpa train {planned} first" in cli.refuses("generate", planned, "--prompt", "a")
    assert "no such directory" in cli.refuses("generate", tmp_path / "none")
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"\n \n")
    assert "no line with text" in cli.refuses("generate", made / "bard", "--prompts", prompts)
    prompts.write_bytes(b"a\xff")
    assert "text in UTF-8" in cli.refuses("generate", made / "bard", "--prompts", prompts)
    assert "--max-new-tokens: expected at most" in cli.refuses(
        "generate", made / "bard", "--max-new-tokens", "999"
    )


@pytest.mark.parametrize("columns", [60, 140])
def test_answers_stand_beside_each_other_where_there_is_room(
    cli: Cli, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffline 1\n\nline 2\n")
    code, out, _ = cli("generate", made / "bard", "--prompt", "a\x1b[31mb", "--prompts", prompts, *FEW)
    assert code == 0 and "\x1b[31m" not in out
    lines = [line for line in out.splitlines() if "base model" in line]
    assert len(lines) == 3 and all(("with the adapter" in line) == (columns > 100) for line in lines)
    assert re.findall(r"^line \d", out, re.MULTILINE) == ["line 1", "line 2"]


def test_what_steers_a_terminal_is_marked_and_what_is_text_stays() -> None:
    text = "a\u00a0b\u3000c\t\u200dd\r\ne"
    assert printable(text) == text.replace("\r", "")
    assert printable("\x1b[31m\x00\x9b\udc80\r") == "\ufffd[31m" + 4 * "\ufffd"
