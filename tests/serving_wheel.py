"""The wheel of the distribution qpa-serve, built from the folder serve/."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build_wheel(work: Path, *, unpacked: bool = False) -> Path:
    """Return the wheel, or a folder with what is in it, for PYTHONPATH."""
    work.mkdir(parents=True)
    source = work / "source"
    shutil.copytree(
        ROOT / "serve", source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    )
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "-w", str(work), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = work.glob("qpa_serve-*.whl")
    if not unpacked:
        return wheel
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    return work / "site"
