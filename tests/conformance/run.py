"""Which engine reads which export of which architecture, as tables that are measured and not claimed.

For each kind of adapter and each architecture a tiny random base with a random adapter is exported in each
format that carries the kind and given to each engine of the format (`qpa.passes.verify_adapter`), which runs
in a process that cannot import qpa. A cell is
1. ok: the engine's greedy tokens are the live model's, they differ from the base model's, no tensor was
   dropped or missing, and the logits, where the engine gives them, are the live model's to rounding;
2. refused: `qpa export` wrote nothing, or the engine said no, for the reason below the table;
3. failed: anything else, with the first line of why: the engine gave wrong answers, or broke where it is not
   known to; or what was ok in the table so far is refused now.

Cells are data, in docs/conformance.jsonl: a run replaces those it measures, and draws the tables of all.

    make conformance
    python -m tests.conformance.run --out docs/conformance.md --adapters LoRA,DoRA \\
        --vllm .venv-vllm/bin/python --llama-cpp .venv-llama-cpp/bin/python --mlx .venv-mlx/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils.logging import disable_progress_bar

from qpa.documents import Manifest, Method
from qpa.documents.manifest import FORMATS
from qpa.errors import QpaError
from qpa.exporters.registry import exporter_for, formats_for
from qpa.models.probe import greedy_continuation
from qpa.passes.verify_adapter import VerifyAdapter
from tests.random_adapter import RandomAdapter, random_adapter
from tests.tiny_architectures import MORE_ARCHITECTURES
from tests.tiny_models import ARCHITECTURES as FIRST_ARCHITECTURES

ARCHITECTURES = FIRST_ARCHITECTURES | MORE_ARCHITECTURES

UNTIED = ("llama", "qwen2", "qwen3", "phi3", "mistral")
"""Architectures whose embedding is not the head's weight too."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Kind(NamedTuple):
    """A kind of adapter.

    Args:    targets: by architecture, where they are not the method's own.
             architectures: those it is for; None is all.
             scale: of the random numbers, large enough that other tokens follow.
    """

    method: Method
    targets: Mapping[str, tuple[str, ...]] = {}
    architectures: tuple[str, ...] | None = None
    scale: float = 0.3


FIRST = tuple(FIRST_ARCHITECTURES)

BESIDE_EXPERTS = {
    "qwen3-moe": ATTENTION,
    "mixtral": ("attention",),
    "gpt-oss": ("attention",),
    "deepseek-v3": ("attention", "mlp"),
    "qwen3-next": ("attention", "mlp"),
}
"""Targets of the mixtures whose experts a LoRA can be on."""

KINDS = {
    "LoRA": Kind("lora", BESIDE_EXPERTS),
    "LoRA on experts": Kind("lora", architectures=tuple(BESIDE_EXPERTS)),
    "LoRA on the embedding": Kind(
        "lora", {name: ("all-linear", "embed_tokens") for name in UNTIED}, architectures=UNTIED
    ),
    "DoRA": Kind("dora", architectures=FIRST),
    "IA3": Kind("ia3", architectures=FIRST),
    "prefix tuning": Kind("prefix", architectures=FIRST),
    "feed-forward adapter": Kind("ffa", architectures=FIRST, scale=3.0),
    "Cayley": Kind("cayley", BESIDE_EXPERTS, architectures=FIRST),
    "shared Cayley": Kind("cayley-shared", BESIDE_EXPERTS, architectures=FIRST),
    "QTHA": Kind("qtha", architectures=FIRST, scale=0.2),
}
"""The tables, by their titles."""

_NO_LORA = (
    *("falcon", "falcon-grouped", "falcon-alibi", "bloom", "gpt-j", "stablelm"),
    *("glm4", "gpt-bigcode"),
)

REFUSED_BY_ENGINE = {
    ("LoRA", "gpt2", "lora", "vllm"),
    *((kind, name, "lora", "vllm") for kind in ("LoRA", "LoRA on experts") for name in BESIDE_EXPERTS),
    ("LoRA", "llama4", "lora", "vllm"),
    *(("LoRA", name, "lora", "vllm") for name in _NO_LORA),
    *((kind, "qwen3-next", "merged", "vllm") for kind in ("LoRA", "LoRA on experts")),
    ("LoRA on the embedding", "qwen2", "lora", "vllm"),
    ("LoRA on the embedding", "mistral", "lora", "vllm"),
}
"""Cells in which the engine is known to say no: no LoRA for some architectures, none on GLM 4's fused layers
or GPT-BigCode's c_attn, on the CPU none in a mixture and no linear attention in float32, none on most
architectures' embedding."""

ENVIRONMENTS = {"vllm": "vllm", "llama.cpp": "llama_cpp", "mlx": "mlx"}
"""Options that name the Python of an engine with an environment of its own."""


CONVERT = Path(__file__).parents[1] / "llama_cpp" / "convert.py"


class Cell(NamedTuple):
    """What came of one kind of adapter and one architecture in one format and engine.

    Args:    outcome: "ok", "refused", "failed" or "not run".
             detail: of "ok" the largest difference of logits, of the others the reason.
    """

    adapter: str
    architecture: str
    format: str
    engine: str
    outcome: str
    detail: str


def main() -> int:
    """Fill the table, write it, and return 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="Markdown file for the table; cells are kept beside it as jsonl"
    )
    parser.add_argument("--adapters", default=",".join(KINDS))
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--formats", default=",".join(name for name in FORMATS if FORMATS[name].engines))
    parser.add_argument(
        "--engines",
        default=",".join(dict.fromkeys(engine for name in FORMATS for engine in FORMATS[name].engines)),
    )
    for engine, option in ENVIRONMENTS.items():
        parser.add_argument(f"--{option.replace('_', '-')}", help=f"Python of an environment with {engine}")
    options = parser.parse_args()
    disable_progress_bar()
    # peft asks transformers by a name that transformers has renamed.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    torch.set_num_threads(1)
    pythons = {engine: getattr(options, option) for engine, option in ENVIRONMENTS.items()}
    engines = options.engines.split(",")
    cells: list[Cell] = []
    asked = [(a, b) for a in options.adapters.split(",") for b in options.architectures.split(",")]
    for adapter, architecture in asked:
        for cell in cells_of(adapter, architecture, options.formats.split(","), engines, pythons):
            cells.append(cell)
            print(*cell, flush=True)
        if options.out:
            cells = no_worse(cells, read_cells(options.out))
            write_table(options.out, cells)
    n_ok, n_failed = (sum(cell.outcome == kind for cell in cells) for kind in ("ok", "failed"))
    print(f"{n_ok} ok, {n_failed} failed, {len(cells) - n_ok - n_failed} refused or not run")
    return int(n_failed > 0 or n_ok == 0)


def cells_of(
    adapter: str, architecture: str, formats: list[str], engines: list[str], pythons: dict[str, str | None]
) -> Iterator[Cell]:
    """Yield the cells of one kind of adapter and one architecture."""
    kind = KINDS[adapter]
    if architecture not in (kind.architectures or ARCHITECTURES):
        return
    with tempfile.TemporaryDirectory() as work:
        model = ARCHITECTURES[architecture](Path(work) / "model")
        alpha, targets = 12.0 if kind.method in ("lora", "dora") else None, kind.targets.get(architecture)
        store = Path(work) / "store"
        options = {"rank": 4, "alpha": alpha, "targets": targets, "scale": kind.scale}
        made = random_adapter(model, store, method=kind.method, **options)
        for name in filter(formats_for(kind.method).__contains__, formats):
            asked = [engine for engine in FORMATS[name].engines if engine in engines]
            row = (adapter, architecture)
            yield from _cells_of_format(row, name, asked, made, Path(work) / name, pythons)


def _cells_of_format(
    row: tuple[str, str],
    name: str,
    engines: list[str],
    made: RandomAdapter,
    out: Path,
    pythons: dict[str, str | None],
) -> Iterator[Cell]:
    started_s = time.monotonic()
    try:
        manifest = exporter_for(name, {}).emit(made.frozen, out, made.context)
    except QpaError as error:
        yield from (Cell(*row, name, engine, "refused", _reason(error, out)) for engine in engines)
        return
    print(f"{' '.join(row)} {name}: exported in {time.monotonic() - started_s:.1f} s", file=sys.stderr)
    for engine in engines:
        if engine in ENVIRONMENTS and not pythons[engine]:
            yield Cell(*row, name, engine, "not run", "no environment was given")
        else:
            yield _ask(row, engine, made, manifest, out, pythons.get(engine))


def _ask(
    row: tuple[str, str], engine: str, made: RandomAdapter, manifest: Manifest, out: Path, python: str | None
) -> Cell:
    base = out.with_name("base.gguf")
    if engine == "llama.cpp":
        assert python is not None
        _convert_base(made, base, Path(python).parent.parent)
    step = VerifyAdapter(directory=str(out), engines=(engine,), python=python, base_gguf=str(base))
    try:
        check = step.run(manifest, made.context).engines[0]
    except QpaError as error:
        known = (*row, manifest.format, engine) in REFUSED_BY_ENGINE
        outcome = "refused" if known else "failed"
        return Cell(*row, manifest.format, engine, outcome, _reason(error, out))
    if list(check.greedy_tokens) == base_tokens(made):
        return Cell(*row, manifest.format, engine, "failed", "the base model says the same")
    difference = check.max_logit_difference
    detail = "tokens" if difference is None else f"{difference:.0e}"
    return Cell(*row, manifest.format, engine, "ok", detail)


def _convert_base(made: RandomAdapter, out: Path, environment: Path) -> None:
    """Let llama.cpp's own converter, in its environment's source, turn the base model into GGUF."""
    source = environment / "source" / "vendor" / "llama.cpp"
    command = [sys.executable, CONVERT, source, made.frozen.base.name_or_path, out]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def _reason(error: QpaError, out: Path) -> str:
    """Return an error without the place of the temporary directory, which is another each time."""
    return str(error).replace(f"{out.parent}/", "")


def base_tokens(made: RandomAdapter) -> list[int]:
    """Return the base model's greedy continuation of the probe's prompt."""
    from safetensors.torch import load_file

    prompt = load_file(made.context.files.get(made.frozen.probe))["input_ids"]
    with torch.no_grad(), made.live.disable_adapter():
        tokens: list[int] = greedy_continuation(made.live, prompt).tolist()
    return tokens


def read_cells(out: Path) -> dict[tuple[str, ...], Cell]:
    """Return the cells kept beside the tables, by adapter, architecture, format and engine."""
    data = out.with_suffix(".jsonl")
    lines = data.read_text().splitlines() if data.exists() else []
    return {cell[:4]: cell for cell in (Cell(**json.loads(line)) for line in lines)}


def no_worse(cells: list[Cell], before: dict[tuple[str, ...], Cell]) -> list[Cell]:
    """Return the cells, failed where they are refused and were ok before."""
    return [
        cell._replace(outcome="failed")
        if cell.outcome == "refused" and cell[:4] in before and before[cell[:4]].outcome == "ok"
        else cell
        for cell in cells
    ]


def write_table(out: Path, cells: list[Cell]) -> None:
    """Write cells over those of the same place in the data beside the tables, and draw them all."""
    found = read_cells(out) | {cell[:4]: cell for cell in cells}
    order = {name: place for place, name in enumerate([*KINDS, *ARCHITECTURES, *FORMATS])}
    ordered = sorted(found.values(), key=lambda cell: [order[name] for name in cell[:3]])
    out.with_suffix(".jsonl").write_text("".join(json.dumps(cell._asdict()) + "\n" for cell in ordered))
    out.write_text(as_markdown(ordered))


def as_markdown(cells: list[Cell]) -> str:
    """Return a table for each kind of adapter, with the reasons of refusals and failures below."""
    reasons: list[str] = []
    lines = [
        "# Conformance",
        "",
        "Made by `make conformance`; `tests/conformance/run.py` says what a cell means. ok: the same greedy",
        "tokens as the live model, other ones than the base model, nothing dropped. The number is the",
        "largest difference of logits, which reach 0.4 (Gemma) to 6 here; an engine that gives none is",
        "compared by its tokens. -: not run.",
    ]
    for adapter in dict.fromkeys(cell.adapter for cell in cells):
        lines += ["", f"## {adapter}", "", *_table([c for c in cells if c.adapter == adapter], reasons)]
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _table(cells: list[Cell], reasons: list[str]) -> list[str]:
    """Return the lines of one table; new reasons are added to `reasons`."""
    columns = list(dict.fromkeys((cell.format, cell.engine) for cell in cells))
    found = {(cell.architecture, cell.format, cell.engine): cell for cell in cells}
    lines = [
        "| architecture | " + " | ".join(f"{name}: {engine}" for name, engine in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for architecture in dict.fromkeys(cell.architecture for cell in cells):
        row = [_text(found.get((architecture, *column)), reasons) for column in columns]
        lines.append(f"| {architecture} | " + " | ".join(row) + " |")
    return lines


def _text(cell: Cell | None, reasons: list[str]) -> str:
    if cell is None or cell.outcome == "not run":
        return "-"
    if cell.outcome == "ok":
        return f"ok, {cell.detail}"
    reason = cell.detail.replace("|", "/")
    if reason not in reasons:
        reasons.append(reason)
    return f"{cell.outcome} ({reasons.index(reason) + 1})"


if __name__ == "__main__":
    sys.exit(main())
