import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ddp_worker

WORKER = Path(ddp_worker.__file__)
N_RANKS = 2


def start_all_ranks(model, folder):
    """Start one process a rank; return them and the files they will write their adapters to."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    files = [folder / f"adapter-{rank}.pt" for rank in range(N_RANKS)]
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, model, folder / "meeting", str(rank), str(N_RANKS), file],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    return processes, files


def read_adapters(processes, files):
    """Wait for all ranks and return each one's adapter."""
    errors = [process.communicate(timeout=120)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_train_the_adapter_of_one(llama, tmp_path):
    processes, files = start_all_ranks(llama, tmp_path)
    try:
        alone = ddp_worker.train(llama)
        first, second = read_adapters(processes, files)
    finally:
        for process in processes:
            process.kill()
    assert first.keys() == second.keys() == alone.keys()
    for path, tensor in alone.items():
        assert torch.equal(first[path], second[path])
        torch.testing.assert_close(first[path], tensor, atol=1e-5, rtol=1e-4)
    spec, _ = ddp_worker.plan_adapter(llama)
    moved = [alone[tensor.path] for tensor in spec.tensors if tensor.role == "lora_B"]
    assert min(float(tensor.abs().max()) for tensor in moved) > 0.01
