"""Rules for the whole source, counted on its syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES_IN_CLI = 60

FLAGS_OF_OTHER_PROGRAMS = {
    "exporters/cards/model_card.py": {
        "enable-lora",
        "revision",
        "trust-remote-code",
        "max-lora-rank",
        "lora-modules",
    },
    "exporters/formats/merged.py": {"trust-remote-code"},
    "exporters/formats/gguf.py": {"fuse-qkv", "outfile", "model", "lora"},
    "qpa/engines/llama_cpp_engine.py": {"outtype"},
}
"""Of vLLM and llama.cpp, in the model cards and in advice."""


def sources(*folders: str) -> list[Path]:
    """Return the files of the folders, each once: the links in qpa/ show files that lie elsewhere."""
    linked = [path for path in (ROOT / "qpa").iterdir() if path.is_symlink()]
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [path for path in found if not any(path.is_relative_to(link) for link in linked)]


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the string literals of a module and their lines, without those that stand alone: docstrings."""
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in alone:
            yield node.lineno, node.value


def test_the_sources_are_found():
    names = {
        path.relative_to(ROOT).parts[0] for path in sources("qpa", "passes", "exporters", "bench", "cli")
    }
    assert names == {"qpa", "passes", "exporters", "bench", "cli"}


@pytest.mark.parametrize("folder", ["qpa", "passes", "exporters", "bench"])
def test_nothing_below_the_command_line_knows_a_flag(folder):
    found = [
        f"{name}:{line}: --{flag}"
        for path in sources(folder)
        for name in [str(path.relative_to(ROOT))]
        for line, text in texts(ast.parse(path.read_text()))
        for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]*)", text)
        if flag not in FLAGS_OF_OTHER_PROGRAMS.get(name, ())
    ]
    assert not found


def test_functions_of_the_command_line_are_short():
    found = [
        f"{path.name}: {node.name}, {n_lines} lines"
        for path in sources("cli")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for n_lines in [(node.end_lineno or 0) - node.lineno + 1]
        if n_lines >= MAX_LINES_IN_CLI
    ]
    assert not found
