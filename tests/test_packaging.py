"""What `pip install` puts on a machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "qpa", "passes", "exporters", "bench", "cli")


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
        for pattern in ("*.py", "*.md")
        for path in (ROOT / folder).rglob(pattern)
        if not links & {*path.parents}
    }
    expected = {name if name.startswith("qpa/") else f"qpa/{name}" for name in files}
    assert expected == {name for name in names if name.endswith((".py", ".md"))}
    assert "qpa/py.typed" in names
