"""Rules for the whole source, counted on its syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpa.adapters.registry import KINDS
from qpa.documents.manifest import FORMATS
from qpa.documents.verification import ENGINES

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


# Rooms

FLOORS = (
    *({"errors", "seeds", "progress", "registry", "termination"}, {"serve"}),
    *({"documents"}, {"pipeline"}, {"store"}),
    *({"compat"},),
    *({"models"}, {"adapters"}, {"circuits"}, {"generators"}, {"training"}),
    *({"explanation"}, {"passes"}, {"exporters"}),
    *({"engines"}, {"report"}, {"workflow"}, {"bench"}, {"cli"}, {"__main__"}),
)
"""A file draws only on rooms of its own floor or of one before it."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ALSO_BY_ITSELF = ("qpa.store.atomic_files", "qpa.store.disk_space")
"""Files that draw on the first floor alone, and that `qpa.serve` takes along to machines without the rest."""

SOURCE_FOLDERS = ("qpa", "passes", "exporters", "bench", "cli")


def room_of(path: Path) -> str:
    """Return the room of a file: its folder below `qpa`, or its folder at the top level."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "qpa" else parts[0]


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the modules that a file imports anywhere, and the lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def test_every_file_is_in_a_room():
    assert {room_of(path) for path in sources(*SOURCE_FOLDERS)} - {"__init__"} == FLOOR_OF.keys()


def test_imports_go_to_rooms_before_ones_own():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in sources(*SOURCE_FOLDERS)
        if room_of(path) != "__init__"
        for line, module in imported_modules(path)
        if module.startswith("qpa.")
        and module not in ALSO_BY_ITSELF
        and FLOOR_OF[module.split(".")[1]] > FLOOR_OF[room_of(path)]
    ]
    assert not found


def test_what_serves_draws_on_the_errors_and_its_own_room_alone():
    files = [*sources("qpa/serve"), *(ROOT / f"{name.replace('.', '/')}.py" for name in ALSO_BY_ITSELF)]
    found = [
        f"{path.name}:{line}: {module}"
        for path in files
        for line, module in imported_modules(path)
        if module.startswith("qpa.") and not module.startswith("qpa.serve.")
        if module not in ("qpa.errors", *ALSO_BY_ITSELF)
    ]
    assert len(files) > 8 and not found


def test_engines_import_nothing_of_qpa_where_they_run():
    engines = [path for path in sources("qpa/engines") if path.stem not in ("__init__", "engine")]
    found = [
        f"{path.name}:{line}"
        for path in engines
        for line, module in imported_modules(path)
        if module.split(".")[0] == "qpa" and not module.startswith("qpa.engines")
    ]
    assert len(engines) > 6 and not found


# One idea, one room


def files_that_say(words: set[str], *, outside: str) -> set[str]:
    """Return the files outside a folder with one of the words as a string literal."""
    return {
        str(path.relative_to(ROOT))
        for path in sources(*SOURCE_FOLDERS)
        if not path.is_relative_to(ROOT / outside)
        if words & {text for _, text in texts(ast.parse(path.read_text()))}
    }


def test_the_kinds_of_adapters_are_known_in_their_own_room():
    """LoRA's name is not counted, which is that of an export format, and of other programs' things, too."""
    assert (
        len(
            files_that_say(
                {"dora", "ia3", "prefix", "ffa", "cayley", "cayley-shared", "qtha"}, outside="qpa/adapters"
            )
        )
        <= 3
    )


def test_the_default_generator_is_known_in_its_own_room():
    assert len(files_that_say({"spectral"}, outside="qpa/generators")) <= 2


def test_formats_are_known_in_their_own_room():
    """Besides, the registry names them, and the kinds of adapters name those that carry them."""
    names = {*FORMATS} - {"lora", "peft", "merged", "onnx", "mlx"}
    found = files_that_say(names, outside="exporters")
    assert found - {f"qpa/adapters/{kind}.py" for kind in KINDS} == {"qpa/documents/manifest.py"}


def test_engines_are_known_in_their_own_room():
    """Besides, the registry names them, and formats and cards say which of them read an export."""
    names = {*ENGINES} - {"peft", "transformers", "onnxruntime", "mlx"}
    found = {name for name in files_that_say(names, outside="qpa/engines") if "exporters/" not in name}
    assert found == {"qpa/documents/verification.py"}


def test_a_folder_holds_what_its_name_says():
    passes = {path.stem.replace("_", "-") for path in sources("passes")} - {"--init--"}
    names = {
        node.value.value
        for path in sources("passes")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "name"
        if isinstance(node.value, ast.Constant)
    }
    assert passes == names
    formats = {path.stem.replace("_", "-") for path in sources("exporters/formats")} - {"--init--"}
    assert formats == {*FORMATS}
    commands = {path.stem for path in sources("cli")}
    assert {"plan", "transpile", "train", "export", "verify", "inspect", "bench"} <= commands


# Names of other libraries that are private or not documented

UNDOCUMENTED = {
    *("all_tied_weights_keys", "get_model_conversion_mapping", "rename_source_key", "WeightConverter"),
    *("BaseTunerLayer", "dequantize_module_weight", "prompt_encoder"),
}


def private_names(path: Path) -> Iterator[str]:
    """Yield names that start with an underscore and belong to another object than a file's own self."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom):
            private = [alias.name for alias in node.names if re.match("_[^_]", alias.name)]
            yield from (f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in private)
        words = {getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "name", None)}
        yield from (f"{path.relative_to(ROOT)}: {word}" for word in words & UNDOCUMENTED)


def test_private_names_are_in_compat_alone():
    rooms = (ROOT / "qpa" / "compat", ROOT / "qpa" / "engines")
    others = [p for p in sources(*SOURCE_FOLDERS) if not any(p.is_relative_to(room) for room in rooms)]
    assert [name for path in others for name in private_names(path)] == []
