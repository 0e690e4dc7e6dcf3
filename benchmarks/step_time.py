"""Step time and peak memory of a generated adapter against plain LoRA.

Measured: one training step = forward, backward, optimizer step, zero_grad. Plain LoRA steps with torch's
fused AdamW, the Trainer's default; QPA with `GeneratedAdapterOptimizer`. Both train the same PEFT adapter
(`qpa plan`'s defaults, every linear layer but the head) of the same model on the same batch, and take turns
on it step by step in one process: all that differs is the optimizer's step. One model, because two would
differ in where their memory lies. Neither clips gradients nor runs a schedule, which cost both the same.

"QPA / LoRA" is the median of paired ratios of whole steps, with quartiles. "of parts" is steadier on a noisy
machine: 1 + (QPA's optimizer step - LoRA's) / LoRA's whole step, from medians of optimizer steps timed in
turns by themselves. Targets: at most 1.05 for a model of 6 million parameters at 8 x 256 tokens, at most 1.02
for GPT-2-small at 4 x 256.

Peak memory is that of two steps in a child process of its own. On CPU it is the peak of what torch allocates
from before the optimizer is made, summed from its profiler's records: exact, and the same in every run. The
process's peak resident memory without the profiler stands beside it (Linux only); it varies by a hundred
megabytes between equal runs, so nothing is concluded from it. It is VmHWM and not ru_maxrss, which a child
inherits from its parent through fork and exec. On CUDA it is torch's own counter, max_memory_allocated.
"generator" is the generator's trainable parameters, 4 bytes each, the unit to judge the difference by. In the
difference are these, their two moments, a copy of the initial adapter, the generator's outputs and the states
the circuits save for the backward pass, less the two moments of LoRA's own optimizer.

    python -m benchmarks.step_time --model <directory of the 6M model> [--dtype bf16] [--device cuda]
    python -m benchmarks.step_time --cases gpt2
    python -m benchmarks.scale --until plan --keep <directory>    (a model of Qwen3-0.6B's shape)
    python -m benchmarks.step_time --model <directory>/model --cases model --dtype bf16 --batch 1x128
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.paired import markdown, spread, spread_of_ratios, time_in_turns
from qpa.adapters.attach import adapter_parameters, attach_adapter
from qpa.adapters.parameter_view import AdapterParameter, leaf_of
from qpa.compat.torch_ import allocations
from qpa.documents import AdapterSpec, WeightLayout
from qpa.generators.chunks import kept_rows
from qpa.generators.generator import make_generator
from qpa.models.base_model import load_model
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.pipeline import Pipeline
from qpa.store.run_directory import DirectoryStore
from qpa.training.optimizer import GeneratedAdapterOptimizer

LORA, QPA = "LoRA", "QPA"
BATCHES = {"model": (8, 256), "gpt2": (4, 256)}
N_PEAK_STEPS = 2
RESIDENT = "VmHWM"


class Setup(NamedTuple):
    """A PEFT model with its adapter, a batch, and the layout that can generate the adapter."""

    model: Any
    adapter: list[AdapterParameter]
    layout: WeightLayout
    batch: Tensor
    bf16: bool

    def optimizer(self, kind: str) -> torch.optim.Optimizer:
        """Return a new optimizer of the adapter: LoRA's, or ours with a new generator."""
        if kind == LORA:
            return torch.optim.AdamW(
                [leaf_of(p) for p in self.adapter], lr=1e-4, weight_decay=0.0, fused=True
            )
        return GeneratedAdapterOptimizer(self.adapter, make_generator(self.layout, 0), lr=1e-4, angle_lr=1e-4)

    def gradients(self) -> None:
        """Run forward and backward on the batch."""
        with torch.autocast(self.batch.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(input_ids=self.batch, labels=self.batch, use_cache=False).loss
        loss.backward()

    def wait(self) -> None:
        """Wait until the device has done what it was asked to."""
        if self.batch.is_cuda:
            torch.cuda.synchronize()


def main() -> None:
    """Print a table of step times and one of peak memory."""
    options = _options()
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(json.dumps(_peak(options.cases[0], options.peak_of, options)))
        return
    print(f"torch {torch.__version__}, {options.device}, {options.dtype}, {options.threads} threads\n")
    if not options.peaks_only:
        print(_step_times(options))
    print(f"\nPeak memory, MB of 10^6 bytes\n\n{_peaks(options)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step time and peak memory of QPA against LoRA.")
    parser.add_argument("--model", help="Directory for the case 'model', 8 x 256 tokens.")
    parser.add_argument("--cases", nargs="+", choices=tuple(BATCHES), help="Default: those there are.")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", help="Rows and tokens of the case 'model', such as 1x128.")
    parser.add_argument("--peaks-only", action="store_true", help="Measure no times.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget-s", type=float, default=120.0, help="Per case, beyond three rounds.")
    parser.add_argument("--peak-of", choices=(LORA, QPA), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cases = options.cases or (["model", "gpt2"] if options.model else ["gpt2"])
    if "model" in options.cases and not options.model:
        parser.error("the case 'model' needs --model")
    return options


def _step_times(options: argparse.Namespace) -> str:
    header = (
        "case",
        "LoRA step, ms",
        "QPA / LoRA",
        "of parts",
        "LoRA's optimizer, ms",
        "QPA's optimizer, ms",
    )
    return markdown(header, [_step_time(case, options) for case in options.cases])


def _step_time(case: str, options: argparse.Namespace) -> tuple[str, ...]:
    setup = _set_up(case, options)
    optimizers = {kind: setup.optimizer(kind) for kind in (LORA, QPA)}
    whole_s = time_in_turns(
        {kind: _step(setup, optimizer) for kind, optimizer in optimizers.items()},
        n_rounds=options.rounds,
        budget_s=options.budget_s,
    )
    setup.gradients()
    own_s = time_in_turns(
        {kind: _optimizer_step(setup, optimizer) for kind, optimizer in optimizers.items()},
        n_rounds=options.rounds,
        budget_s=options.budget_s,
    )
    whole, lora, qpa = (
        spread([1e3 * s for s in times]) for times in (whole_s[LORA], own_s[LORA], own_s[QPA])
    )
    ratio = spread_of_ratios(whole_s[QPA], whole_s[LORA]).text(4)
    of_parts = f"{1 + (qpa.median - lora.median) / whole.median:.3f}"
    return (_case_name(case, setup.batch), whole.text(), ratio, of_parts, lora.text(), qpa.text())


def _step(setup: Setup, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        setup.gradients()
        optimizer.step()
        optimizer.zero_grad()
        setup.wait()

    return step


def _optimizer_step(setup: Setup, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.step()
        setup.wait()

    return step


def _peaks(options: argparse.Namespace) -> str:
    header = ("case", "LoRA", "QPA", "QPA / LoRA", "difference", "generator", "difference / generator")
    return markdown(header, [row for case in options.cases for row in _peak_rows(case, options)])


def _peak_rows(case: str, options: argparse.Namespace) -> list[tuple[str, ...]]:
    peaks = {kind: _peak_in_child(case, kind, options) for kind in (LORA, QPA)}
    generator = peaks[QPA]["generator"]
    rows = []
    for counter in peaks[LORA].keys() - {"generator"}:
        lora, qpa = peaks[LORA][counter], peaks[QPA][counter]
        numbers = [f"{value / 1e6:.2f}" for value in (lora, qpa, qpa - lora, generator)]
        numbers.insert(2, f"{qpa / lora:.3f}")
        ratio = "not exact enough" if counter == RESIDENT else f"{(qpa - lora) / generator:.2f}"
        rows.append((f"{case}, {counter}", *numbers, ratio))
    return sorted(rows)


def _peak_in_child(case: str, kind: str, options: argparse.Namespace) -> dict[str, int]:
    arguments = ["--cases", case, "--peak-of", kind, "--threads", str(options.threads)]
    arguments += ["--dtype", options.dtype, "--device", options.device]
    arguments += ["--model", options.model] if options.model else []
    arguments += ["--batch", options.batch] if options.batch else []
    child = subprocess.run(
        (sys.executable, "-m", "benchmarks.step_time", *arguments),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peaks: dict[str, int] = json.loads(child.stdout)
    return peaks


def _peak(case: str, kind: str, options: argparse.Namespace) -> dict[str, int]:
    """Return peaks in bytes, by the name of what counted them, and the generator's size."""
    setup = _set_up(case, options)
    generator = {"generator": 4 * setup.layout.account.n_generator}
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _run_steps(setup, kind)
        return {"max_memory_allocated": torch.cuda.max_memory_allocated(), **generator}
    starts_at_zero = [not bool(parameter.detach().any()) for parameter in setup.adapter]
    _run_steps(setup, kind)
    resident = _peak_resident()
    # Ours keeps a copy of what an adapter starts from, of all but zeros.
    for parameter in (p for p, is_zero in zip(setup.adapter, starts_at_zero, strict=True) if is_zero):
        parameter.detach().zero_()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        _run_steps(setup, kind)
    return {"torch allocations": _peak_of_allocations(profile), **resident, **generator}


def _peak_resident() -> dict[str, int]:
    """Return this process's peak resident memory in bytes, nothing where the system does not tell."""
    status = Path("/proc/self/status")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.is_file() else {}
    return {RESIDENT: 1024 * int(fields[RESIDENT].split()[0])} if RESIDENT in fields else {}


def _run_steps(setup: Setup, kind: str) -> None:
    step = _step(setup, setup.optimizer(kind))
    for _ in range(N_PEAK_STEPS):
        step()


def _peak_of_allocations(profile: torch.profiler.profile) -> int:
    """Return the largest sum of what was allocated and not yet freed, in bytes, from the records' start."""
    now = peak = 0
    for n_bytes in allocations(profile):
        now += n_bytes
        peak = max(peak, now)
    return peak


def _set_up(case: str, options: argparse.Namespace) -> Setup:
    bf16 = options.dtype == "bf16"
    with tempfile.TemporaryDirectory() as folder:
        directory = _gpt2_config(Path(folder)) if case == "gpt2" else options.model
        context = _plan(directory, Path(folder))
        spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
        base = _random_gpt2(directory, bf16) if case == "gpt2" else load_model(spec.base, keep_dtype=bf16)
    model = attach_adapter(base.to(options.device), spec, kept_rows(layout)).train()
    named = adapter_parameters(model, spec)
    torch.manual_seed(0)
    n_rows, n_tokens = BATCHES[case]
    if case == "model" and options.batch:
        n_rows, n_tokens = map(int, options.batch.split("x"))
    batch = torch.randint(model.config.vocab_size, (n_rows, n_tokens)).to(options.device)
    return Setup(model, [named[tensor.path] for tensor in layout.tensors], layout, batch, bf16)


def _plan(directory: str, folder: Path) -> PassContext:
    passes = Pipeline(InspectModel(model=directory), PlanLayout())
    return passes.run(None, PassContext(seed=0, files=DirectoryStore(folder)))


def _gpt2_config(folder: Path) -> str:
    from transformers import GPT2Config

    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(folder)  # its defaults are GPT-2-small
    return str(folder)


def _random_gpt2(directory: str, bf16: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if bf16 else torch.float32)


def _case_name(case: str, batch: Tensor) -> str:
    return f"{case}, {batch.shape[0]} x {batch.shape[1]}"


if __name__ == "__main__":
    main()
