"""What `pip install` puts on a machine."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from qpa.documents.verification import ENGINES

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "qpa", "passes", "exporters", "bench", "cli")

SHIPPED = ("qpa", "passes", "exporters", "bench", "cli")
NOT_SHIPPED = ("tests", "benchmarks", "demo", "docs")

NOT_IMPORTED = {
    "mypy": "make lint",
    "ruff": "make lint",
    "pytest-xdist": "make test",
    "properdocs-theme-mkdocs": "make docs: mkdocs.yml names it",
    "pymdown-extensions": "make docs: mkdocs.yml names it",
    "qiskit-qasm3-import": "qiskit.qasm3.loads does not work without it",
    "qpa": "the extras of the package itself",
}
"""What is declared without an import of it, and why."""

IN_ENVIRONMENTS_OF_THEIR_OWN = {
    "mlx",
    "openai",
    *(ENGINES[name].package for name in ENGINES if ENGINES[name].own_environment),
}
"""Engines that the worker runs in another Python, and what they consist of or depend on."""


def declared(*extras: str) -> set[str]:
    """Return the normalized names of the distributions that the package asks for, with some of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(line for e in extras for line in project["optional-dependencies"][e]),
    ]
    return {normalized(re.split(r"[\[<>=]", line)[0]) for line in lines}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(folders: Iterable[str]) -> set[str]:
    """Return the top-level modules that some folders import, other than Python's and the repository's own."""
    own = {*sys.stdlib_module_names, *SHIPPED, *NOT_SHIPPED}
    links = {path for path in (ROOT / "qpa").iterdir() if path.is_symlink()}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {name for file in files if not links & {*file.parents} for name in imports(file)}
    return found - own


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def distributions(modules: Iterable[str]) -> dict[str, set[str]]:
    """Return the normalized names of the distributions that bring each module.

    One that is not installed, such as that of an extra, is taken to have the module's name.
    """
    known = packages_distributions()
    return {module: {normalized(name) for name in known.get(module, (module,))} for module in modules}


def test_everything_that_is_imported_is_declared():
    shipped = imported(SHIPPED) - IN_ENVIRONMENTS_OF_THEIR_OWN
    wanted = declared("ibm", "genai", "ray", "torchao")
    assert {module for module, names in distributions(shipped).items() if not names & wanted} == set()
    # convert.py runs in llama.cpp's source, and what pennylane is compared with is an extra of its own.
    others = imported(NOT_SHIPPED) - shipped - IN_ENVIRONMENTS_OF_THEIR_OWN - {"conversion", "pennylane"}
    wanted = declared("ibm", "genai", "docs", "dev", "tensorboard")
    assert {module for module, names in distributions(others).items() if not names & wanted} == set()


@pytest.mark.parametrize(("extras", "folders"), [((), SHIPPED), (("dev", "docs"), (*SHIPPED, *NOT_SHIPPED))])
def test_everything_that_is_declared_is_imported_or_has_its_reason(extras, folders):
    used = set().union(*distributions(imported(folders)).values())
    assert declared(*extras) - used - NOT_IMPORTED.keys() == set()
    assert not NOT_IMPORTED.keys() & set().union(*distributions(imported(SHIPPED)).values())


def test_the_wheel_installs_only_the_package_qpa_with_everything_in_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        ignore = shutil.ignore_patterns("__pycache__")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
    ]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("qpa-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"qpa"}
    links = {path for path in (ROOT / "qpa").iterdir() if path.is_symlink()}
    files = {
        str(path.relative_to(ROOT))
        for folder in SOURCES[3:]
        for pattern in ("*.py", "*.md", "*.j2", "*.css")
        for path in (ROOT / folder).rglob(pattern)
        if not links & {*path.parents}
    }
    expected = {name if name.startswith("qpa/") else f"qpa/{name}" for name in files}
    assert expected == {name for name in names if name.endswith((".py", ".md", ".j2", ".css"))}
    assert "qpa/py.typed" in names
