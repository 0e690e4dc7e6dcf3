"""Every block of commands or Python in README.md and docs/ is run, on models so small that it takes a second.

A page's blocks are run in their order, in a directory that has what the pages name. The pages' own words
stay: a model that they name is a directory of that name with a tiny model in it, and options are added to
commands that would run for long (`tests.docs_commands`). What a block shows of a command's output is compared
with what the command prints, but for numbers; `...` stands for anything.

What is not run:
1. A block behind the comment `<!-- not run: why -->`: its commands are read, and their options must be there.
2. The commands of docs/results.md, a dated log of measurements that took hours: they are read likewise.
3. Programs that are neither qpa nor the demonstration: they stand in blocks with such a comment, and `OTHERS`
   says what is checked of how they are called.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from docs.pages.blocks import Block, read_blocks, shape
from docs.pages.commands import examples
from qpa.cli.main import COMMANDS
from tests.docs_commands import N_COLUMNS, furnish, is_run, run_command

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
ONLY_READ = ("docs/results.md",)
N_NOT_RUN = 15
"""Blocks behind a comment that says why they are not run: a new one should be a decision."""

USAGE_ERROR: Any = typer.BadParameter.__base__  # Typer has its own copy of click
PLACEHOLDER = re.compile(r"<[^<>]*>")
BLOCKS = [
    (name, block)
    for name, page in PAGES.items()
    for block in read_blocks(page)
    if block.language in ("sh", "console", "python")
]


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Return a directory with the models and the text, and a trained run and its export."""
    place = tmp_path_factory.mktemp("furnished")
    furnish(place, text_file)
    return place


@pytest.mark.parametrize("name", [name for name in PAGES if name not in ONLY_READ])
def test_blocks_run(
    name: str, furnished: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    blocks = [block for page, block in BLOCKS if page == name and not block.reason]
    if not blocks:
        pytest.skip("no block that is run")
    place = tmp_path / "place"
    shutil.copytree(furnished, place)
    for taken in made_by(blocks):
        shutil.rmtree(place / taken, ignore_errors=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", str(N_COLUMNS))
    names: dict[str, Any] = {}
    for block in blocks:
        where = f"{name}:{block.line}"
        if block.language == "python":
            run_python(block, where, names)
        else:
            for words, output in block.commands():
                check_command(words, output, where, capsys, is_compared=block.is_compared)


def made_by(blocks: list[Block]) -> Iterator[str]:
    """Yield the directories that commands of a page make: they must not be there before."""
    for block in blocks:
        if block.language != "python":
            for words, output in block.commands():
                if words[0] == "qpa" and "--out" in words and "error: " not in output:
                    yield words[words.index("--out") + 1]


def run_python(block: Block, where: str, names: dict[str, Any]) -> None:
    """Run a block after those before it; a block that shows a file of the repository has only to name one."""
    shown = re.fullmatch(r'--8<-- "(.+)"\s*', block.text)
    if shown:
        assert (ROOT / shown[1]).is_file(), where
    else:
        exec(compile(block.text, where, "exec"), names)


def check_command(words: list[str], output: str, where: str, capsys: Any, *, is_compared: bool) -> None:
    """Run a command, and compare what it prints, but for its numbers, with what the page shows."""
    capsys.readouterr()
    code = run_command(words)
    printed = capsys.readouterr()
    expected_code = 1 if "error: " in output else 2 if "Usage: " in output else 0
    assert code == expected_code, f"{where}: {' '.join(words)}\n{printed.err}"
    if output and is_compared:
        expected, found = shape(output), shape(printed.out + (printed.err if code else ""))
        assert fnmatchcase(found, expected.replace("[", "[[]").replace("...", "*")), f"{where}: {found}"


@pytest.mark.parametrize("where", [f"{name}:{block.line}" for name, block in BLOCKS])
def test_commands_have_the_options_they_use(where: str) -> None:
    (block,) = [block for name, block in BLOCKS if f"{name}:{block.line}" == where]
    if block.language == "python":
        if "--8<--" not in block.text:
            compile(block.text, where, "exec")
        return
    for words, _ in read_only(block).commands():
        OTHERS.get(words[0], check_options_of)(words, where)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_have_the_options_they_use(name: str) -> None:
    for words, _ in Block("sh", examples(COMMANDS[name]), 0).commands():
        check_options_of(words, f"qpa {name} --help")


def read_only(block: Block) -> Block:
    """Return a block with one word for everything that is to be filled in."""
    return replace(block, text=PLACEHOLDER.sub("placeholder", block.text))


def check_options_of(words: list[str], where: str) -> None:
    """Check that a command of qpa takes these arguments, without running it."""
    assert words[0] == "qpa" and words[1] in COMMANDS, f"{where}: {words}"
    words = words[: words.index(">")] if ">" in words else words
    command = typer.main.get_command(COMMANDS[words[1]].for_typer())
    try:
        command.make_context(words[1], list(words[2:]))
    except USAGE_ERROR as error:
        pytest.fail(f"{where}: {' '.join(words)}: {error.format_message()}")


def check_make(words: list[str], where: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert words[1] in targets, where


def check_pip(words: list[str], where: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[1] == "install", where
    for extra in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        assert {*extra.split(",")} <= extras.keys(), where


def check_python(words: list[str], where: str) -> None:
    assert words[1] == "-m" and importlib.util.find_spec(words[2]), where


def check_launcher(words: list[str], where: str) -> None:
    """Check the options of a launcher of several processes, and of the command of qpa that it starts."""
    is_accelerate = words[:2] == ["accelerate", "launch"]
    parser = launch_command_parser() if is_accelerate else get_args_parser()
    start = words.index("-m")
    parser.parse_args(words[2 if is_accelerate else 1 : start + 2])
    assert words[start + 1] == "qpa", where
    check_options_of(words[start + 1 :], where)


def check_nothing(words: list[str], where: str) -> None:
    """Let a program of other people be."""


OTHERS: dict[str, Callable[[list[str], str], None]] = {
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "vllm": check_nothing,
    "accelerate": check_launcher,
    "torchrun": check_launcher,
    "python3": check_python,
    ".": check_nothing,
    "export": check_nothing,
}
"""Programs that pages name besides qpa, and what is checked of how they are called."""


def test_what_is_not_run_is_counted_and_says_why() -> None:
    not_run = [(name, block.line, block.reason) for name, block in BLOCKS if block.reason]
    assert len(not_run) == N_NOT_RUN, not_run
    assert all(len(reason.split()) > 2 for *_, reason in not_run), not_run


@pytest.mark.parametrize("where", [f"{name}:{block.line}" for name, block in BLOCKS])
def test_a_command_that_is_not_run_is_in_a_block_that_says_so(where: str) -> None:
    ((name, block),) = [(name, block) for name, block in BLOCKS if f"{name}:{block.line}" == where]
    if block.language != "python" and not block.reason and name not in ONLY_READ:
        assert [words for words, _ in block.commands() if not is_run(words)] == []
