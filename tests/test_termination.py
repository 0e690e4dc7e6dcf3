"""SIGTERM: a training saves and ends with 143, other commands end at once, and a second one kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from qpa.store.run_directory import RunDirectory, list_checkpoints
from qpa.termination import Terminated, deferring_sigterm, ending_on_sigterm
from qpa.training.generator_callback import GeneratorCallback
from tests.command_line import Cli
from tests.test_train_generator import plan, same_bits, tensors

OPTIONS = ("--max-steps", 6, "--max-length", 32, "--batch-size", 2, "--device", "cpu")


def _terminate(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send SIGTERM at the start of a step, counted from 0."""
    original = GeneratorCallback.on_step_begin

    def ask(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, args, state, control, **rest)

    monkeypatch.setattr(GeneratorCallback, "on_step_begin", ask)


def test_a_training_saves_its_step_and_exits_with_143_and_goes_on_to_the_same_bits(
    llama: Path, text_file: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ended = plan(llama, tmp_path / "whole"), plan(llama, tmp_path / "ended")
    assert cli("train", whole.path, "--data", text_file, *OPTIONS)[0] == 0
    with monkeypatch.context() as patch:
        _terminate(patch, 3)
        code, out, err = cli("train", ended.path, "--data", text_file, *OPTIONS)
    saved = ended.path / "checkpoints" / "step-00000004"
    assert (code, out) == (143, "")
    assert err.splitlines()[-1] == f"terminated: saved {saved}, go on with --resume"
    assert list_checkpoints(ended.path / "checkpoints") == [saved]
    assert cli("train", ended.path, "--data", text_file, *OPTIONS, "--resume")[0] == 0
    assert same_bits(tensors(RunDirectory(ended.path)), tensors(RunDirectory(whole.path)))


def test_elsewhere_the_first_sigterm_ends_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as end, ending_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 143
    signal.signal(signal.SIGTERM, before)


def test_a_block_that_defers_hears_of_it_and_leaves_the_handler_as_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ending_on_sigterm():
        with deferring_sigterm() as asks_to_end:
            assert not asks_to_end()
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


TWICE = """
import os, signal, time
from qpa.termination import deferring_sigterm
with deferring_sigterm() as asks_to_end:
    os.kill(os.getpid(), signal.SIGTERM)
    assert asks_to_end()
    print("heard", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_second_sigterm_kills() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("heard\n", -signal.SIGTERM)


def test_in_another_thread_nothing_is_changed() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with deferring_sigterm() as asks_to_end:
            found.append((signal.getsignal(signal.SIGTERM), asks_to_end()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(before, False)]
