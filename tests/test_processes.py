"""Two processes train what one trains with twice the accumulation, and fail together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qpa.documents import AdapterSpec, FrozenAdapter, TrainedGenerator
from qpa.errors import OptionError, ProcessError
from qpa.passes.train_generator import TrainGenerator
from qpa.store.run_directory import METRICS, RunDirectory, list_checkpoints
from qpa.training.base import load_base
from qpa.training.processes import ALONE, Processes, join, n_started
from qpa.training.row_order import RowOrder
from tests import process_worker
from tests.test_train_generator import interrupt_after, plan, tensors, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
N = 2
OPTIONS: dict[str, Any] = {
    "max_steps": 9,
    "max_length": 32,
    "batch_size": 3,
    "save_steps": 3,
    "device": "cpu",
}

MORE: dict[str, Any] = {"packing": True, "eval_steps": 4, "keep_best": True, "max_grad_norm": 0.5}


WATCHED: dict[str, Any] = {
    **{"eval_steps": 1, "early_stopping": 1, "max_steps": 12},
    **{"lr": 0.3, "schedule": "constant", "max_grad_norm": 1.0, "weight_decay": 0.1},
}


def start(arguments: list[Any], folders: list[Path], **environment: str) -> list[subprocess.Popen[str]]:
    """Start two processes as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(N), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Return exit codes and what was written to stderr."""
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.fixture(scope="module")
def runs(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """Return runs that one process trained, two, two with a sharded base, and the one after the other."""
    root = tmp_path_factory.mktemp("processes")
    names = (
        "one",
        "two",
        "sharded",
        "ended",
        "resumed",
        "packed one",
        "packed two",
        "watched one",
        "watched two",
    )
    runs = {name: plan(llama, root / name) for name in names}
    as_one = OPTIONS | {"grad_accum": N}
    train(runs["one"], text_file, **as_one)
    train(runs["packed one"], text_file, **as_one, **MORE)
    train(runs["watched one"], text_file, **as_one | WATCHED)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        train(runs["resumed"], text_file, **as_one)
    options = {"data": str(text_file), **OPTIONS}
    jobs = [
        {"run": str(runs["two"].path), "options": options},
        {"run": str(runs["ended"].path), "options": options},
        {"run": str(runs["resumed"].path), "options": options | {"resume": True}},
        {"run": str(runs["packed two"].path), "options": options | MORE},
        {"run": str(runs["watched two"].path), "options": options | WATCHED},
    ]
    (root / "jobs.json").write_text(json.dumps(jobs))
    sharded = [{"run": str(runs["sharded"].path), "options": options}]
    (root / "sharded.json").write_text(json.dumps(sharded))
    whole = start([process_worker.__file__, root / "jobs.json"], [root, root])
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    shards = start([process_worker.__file__, root / "sharded.json"], [root, root], **fsdp)
    for code, error in finish(whole) + finish(shards):
        assert code == 0, error
    assert [path.name for path in list_checkpoints(runs["ended"].path / "checkpoints")] == [
        "step-00000003",
        "step-00000004",
    ]
    train(runs["ended"], text_file, **as_one, resume=True)
    return runs


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("two", "one"),
        ("sharded", "one"),
        ("ended", "one"),
        ("resumed", "one"),
        ("packed two", "packed one"),
        ("watched two", "watched one"),
    ],
)
def test_they_give_the_adapter_of_one_process(runs: dict[str, RunDirectory], name: str, other: str) -> None:
    """Ended and resumed: two processes, then one; and the other way around."""
    found, expected = tensors(runs[name]), tensors(runs[other])
    moved = max(float(tensor.abs().max()) for path, tensor in expected.items() if "lora_B" in path)
    assert moved > 0.05
    for path, tensor in expected.items():
        torch.testing.assert_close(found[path], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["two", "sharded", "ended", "resumed"])
def test_the_documents_are_those_of_one_process(runs: dict[str, RunDirectory], name: str) -> None:
    one, found = runs["one"].read(TrainedGenerator), runs[name].read(TrainedGenerator)
    assert found.provenance == one.provenance
    assert found.result.n_train_tokens == one.result.n_train_tokens
    assert runs[name].read(FrozenAdapter).result.eval_loss == pytest.approx(one.result.eval_loss, abs=1e-5)
    losses = [
        json.loads(line).get("eval_loss") for line in (runs[name].path / METRICS).read_text().splitlines()
    ]
    assert losses[0] == pytest.approx(one.result.base_loss) and losses[-1] == found.result.eval_loss


def test_they_evaluate_and_stop_as_one(runs: dict[str, RunDirectory]) -> None:
    one, two = (runs[f"watched {name}"].read(TrainedGenerator).result for name in ("one", "two"))
    assert (two.n_steps, two.frozen_step) == (one.n_steps, one.frozen_step)
    assert two.frozen_step < two.n_steps < WATCHED["max_steps"]
    assert two.eval_loss == pytest.approx(one.eval_loss, abs=1e-4)


def test_an_error_of_one_ends_both_with_one_line(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run = plan(llama, tmp_path / "run")
    here, elsewhere = text_file.parent, tmp_path
    words = ["-m", "qpa.cli", "train", run.path, "--data", text_file.name, "--device", "cpu"]
    (code, error), (other_code, other_error) = finish(start(words, [here, elsewhere]))
    assert (code, other_code) == (1, 1)
    assert (error + other_error).count("error:") == 1
    assert "text.txt" in other_error and "Traceback" not in error + other_error
    assert not run.has(TrainedGenerator)


def test_what_starts_from_the_base_models_weights_is_refused_where_they_are_sharded(
    llama: Path, tmp_path: Path
) -> None:
    spec = plan(llama, tmp_path / "run", inspect={"method": "dora"}).read(AdapterSpec)
    with pytest.raises(OptionError, match="method: expected an adapter that starts from none"):
        load_base(TrainGenerator(data=("text.txt",)), spec, "cpu", Processes(0, 2, is_sharded=True))


@pytest.mark.parametrize("n_rows", [1, 5, 12])
def test_the_order_of_rows_is_that_of_one_process_with_rows_without_loss_behind(n_rows: int) -> None:
    alone, padded = RowOrder(n_rows, 0, seed=3), RowOrder(n_rows, 4, seed=3)
    for epoch in range(2):
        alone.set_epoch(epoch)
        padded.set_epoch(epoch)
        order = list(alone)
        assert sorted(order) == list(range(n_rows))
        assert list(padded) == [*order, *range(n_rows, n_rows + 4)]
    assert (len(alone), len(padded)) == (n_rows, n_rows + 4)


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert n_started() == 1
    assert join("cpu") is ALONE


def test_one_process_agrees_with_itself() -> None:
    matrix = torch.ones(2, 3)
    assert ALONE.share_matrix(matrix, matrix.device) is matrix
    assert ALONE.any(True, matrix.device) and not ALONE.any(False, matrix.device)
    ALONE.check_same([matrix], "now")


def test_processes_that_hold_other_bits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(all_: list[torch.Tensor], mine: torch.Tensor) -> None:
        all_[0].copy_(mine)
        all_[1].copy_(mine + (torch.arange(len(mine)) == 1))

    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    two = Processes(rank=0, n=2)
    with pytest.raises(ProcessError, match=r"after step 3: .* found other numbers in process 1 than"):
        two.check_same([torch.zeros(3), torch.ones(2, 2)], "after step 3")


def test_a_digest_sees_numbers_that_change_places() -> None:
    from qpa.training.processes import _digest

    assert _digest(torch.tensor([1.0, 2.0])) != _digest(torch.tensor([2.0, 1.0]))
    assert _digest(torch.tensor([0.0])) != _digest(torch.tensor([-0.0]))
