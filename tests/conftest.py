"""What many tests share: tiny base models, a text, and a quiet, offline process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

from tests.command_line import Cli
from tests.tiny_models import tiny_gpt2, tiny_llama

ASSETS = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep tests from competing for cores, and sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a tiny Llama."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a tiny GPT-2."""
    return tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of 3,000 bytes with some structure to learn."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"line {number}: {number % 7} and {number % 3} make {number % 21}.\n" for number in range(95))
    )
    return path


@pytest.fixture(scope="session")
def assets() -> Path:
    """Return the folder with real small models and texts; skip where it is not beside the checkout."""
    if not ASSETS.is_dir():
        pytest.skip("no folder with real models and texts beside the checkout")
    return ASSETS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function from tmpfs's mount options to a new disk; skip where nothing can be mounted.

    What it is for is also tested without a disk, in tests/test_disk_space.py.
    """
    disk = tmp_path / "disk"

    def mount(options: str) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root, and a machine that allows it")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return the command line, run in this process."""
    return Cli(monkeypatch, capsys)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the worker answer in this process, which has imported the engines already."""
    answer_in_process(monkeypatch)


def answer_in_process(patch: pytest.MonkeyPatch) -> None:
    """Let the worker answer in this process for as long as the patch lasts."""
    from qpa.engines import worker
    from qpa.passes import verify_adapter

    def run(command: list[str], *, input: str, **_: object) -> subprocess.CompletedProcess[str]:
        answer = worker.answer_probe(json.loads(input))
        return subprocess.CompletedProcess(command, 0, json.dumps(answer), "")

    patch.setattr(verify_adapter.subprocess, "run", run)
