"""What the documents say, where a test can tell."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from demo.picture import draw, main, read_layer
from docs.pages.blocks import read_blocks
from docs.pages.hooks import made_pages
from qpa.cli.flags import flag_of
from qpa.store.run_directory import RunDirectory
from tests.test_train_generator import plan, train

ROOT = Path(__file__).resolve().parents[1]
MADE = {name for name, _ in made_pages()}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SVG = "{http://www.w3.org/2000/svg}"


def test_the_readme_is_short_and_the_glossary_defines_what_it_says() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1500
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    words = re.findall(r"^\| (\w+) \|", glossary, flags=re.M)
    assert words[:10] == [
        *("word", "circuit", "window", "direction", "chunk"),
        *("generator", "adapter", "measurement", "account", "context"),
    ]
    assert len(set(words)) == len(words) - 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        in_site = os.path.relpath((page.parent / target).resolve(), ROOT / "docs")
        assert (page.parent / target).exists() or in_site in MADE, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_documents_imports_what_is_there(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
        if block.startswith("--8<--"):
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("qpa"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_picture_is_drawn_from_a_real_run(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plan(llama, tmp_path / "run", inspect={"rank": 4}, circuits=None, layers=None)
    train(run, text_file)
    layer = read_layer(RunDirectory.open(run.path), "model.layers.1.self_attn.o_proj")
    picture = draw(layer)
    assert draw(layer) == picture
    texts = [text.text for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    assert "circuit 2 of 2" in texts
    assert f"{len(layer.probabilities)} probabilities" in texts
    assert f"lora_A [4, {layer.a.shape[1]}]" in texts
    bits = f"{layer.groups[0][0].states[layer.groups[0][1]]:0{layer.layout.ansatz.n_qubits}b}"
    assert any(text.startswith(f"|{bits}>") for text in texts)
    expected = (
        "expected a layer with lora_A and lora_B, such as model.layers.0.self_attn.q_proj, found no nope"
    )
    assert refusal(monkeypatch, run.path) == f"error: {run.path}: {expected}"
    none = tmp_path / "none"
    expected = f"expected a run directory, found no such directory; make one: qpa plan --out {none}"
    assert refusal(monkeypatch, none) == f"error: {none}: {expected}"


def refusal(monkeypatch: pytest.MonkeyPatch, run: Path) -> object:
    """Ask for the picture of a layer that no model has; return what the program ends with."""
    monkeypatch.setattr(sys, "argv", ["demo.picture", str(run), "nope", str(run / "out.svg")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not (run / "out.svg").exists()
    return stop.value.code


def test_the_committed_picture_is_one() -> None:
    root = ElementTree.parse(ROOT / "docs" / "one-layer.svg").getroot()
    assert root.tag == f"{SVG}svg" and "o_proj" in root.find(f"{SVG}title").text


def named_places() -> list[tuple[str, str]]:
    """Return every dotted name of qpa in backticks, in the source and in the documents, with its file."""
    folders = ("qpa", "passes", "exporters", "bench", "cli", "demo", "benchmarks")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    links = [path for path in (ROOT / "qpa").iterdir() if path.is_symlink()]
    own = [path for path in files if not any(path.is_relative_to(link) for link in links)]
    return [
        (str(path.relative_to(ROOT)), name)
        for path in (*own, *PAGES)
        for name in re.findall(r"`(qpa(?:\.\w+)+)(?:\(\))?`", path.read_text())
    ]


def resolves(name: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for n_parts in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:n_parts]))
        except ModuleNotFoundError:
            continue
        for part in parts[n_parts:]:
            if not hasattr(thing, part) and part not in getattr(thing, "__annotations__", {}):
                return False
            thing = getattr(thing, part, None)
        return True
    return False


def test_names_in_backticks_are_there() -> None:
    places = named_places()
    assert len(places) > 50
    assert [place for place in places if not resolves(place[1])] == []


def quoted_lines() -> list[str]:
    """Return the error lines that the page of troubleshooting shows without a command that prints them."""
    blocks = read_blocks(ROOT / "docs" / "troubleshooting.md")
    return [line for block in blocks if block.language == "text" for line in block.text.splitlines()]


def words_of_source() -> str:
    """Return every text in the source, values in it as three dots and options as flags."""
    folders = ("qpa", "passes", "exporters", "cli")
    texts = []
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append("".join(map(str, parts)))
    return re.sub(r"`(\w+)`", lambda name: flag_of(name[1]), "\n".join(texts))


def test_error_lines_that_are_quoted_are_those_of_the_source() -> None:
    source = words_of_source()
    assert len(quoted_lines()) > 8
    for line in quoted_lines():
        _, _, said = line.partition(": expected ")
        expected, _, rest = said.partition(", found ")
        parts = [expected, *rest.split("; ", maxsplit=1)]
        assert [part for part in parts if part not in ("...", "") and part not in source] == [], line
