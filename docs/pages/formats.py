"""The page of the export formats, made from their registry and from what `make conformance` measured."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from qpa.adapters.registry import KINDS
from qpa.cli.flags import flag_of
from qpa.documents.manifest import FORMATS
from qpa.documents.verification import ENGINES
from qpa.exporters.format import Format
from qpa.pipeline.options import options_of

CELLS = Path(__file__).parents[1] / "conformance.jsonl"

OPENING = """\
# Formats

`qpa export RUN --format NAME --out DIRECTORY` writes a trained adapter for programs that know nothing of
qpa. A *format* says which files are in the directory and what their numbers mean. An *engine* is a
program that computes with the model, such as vLLM. A [compact](#compact) adapter is a file, which only qpa's
own code expands to a LoRA. Every directory holds besides

* `README.md`: what the adapter is, how well it did, and the code that loads it in each engine;
* `qpa/manifest.json`: every file with its SHA-256 digest, and which run it came from;
* `qpa/probe.safetensors`: a few tokens with the trained model's own answer, which `qpa verify` asks the
  engines for.

The same run gives the same bytes. The option `--dtype` rounds what is written, once; training is not
affected."""

MEASURED = """\
## What was measured

For each architecture a tiny model with random weights and a random adapter is exported in each format,
and each engine is asked for its answers. *ok* means the same greedy tokens as the model that was
trained, with logits that agree to rounding, and no tensor dropped. *refused* means that qpa or the
engine said no, with its reason. Every cell with its reason is in [the table of
conformance](conformance.md), which `make conformance` fills in."""


def formats_page() -> str:
    """Return the page as Markdown."""
    exporters = [(name, cast(type[Format], FORMATS[name])) for name in FORMATS]
    rows = [
        f"| [{name}](#{name}) | {exporter.words} | {_engines(exporter)} |" for name, exporter in exporters
    ]
    parts = [
        OPENING,
        "\n".join(["| format | what it is | engines |", "|---|---|---|", *rows]),
        *(part for name, exporter in exporters for part in _of_format(name, exporter)),
        MEASURED,
        "\n".join(["| format | engine | ok | refused | other |", "|---|---|---|---|---|", *measured_rows()]),
        "## Rules of a LoRA directory",
        "`qpa verify DIRECTORY --static` checks these on a LoRA directory of any origin, without a model.",
        _contract("lora"),
    ]
    return "\n\n".join(parts) + "\n"


def measured_rows() -> Iterator[str]:
    """Yield a row for each format and engine: how many architectures and kinds of adapter came out how."""
    cells = [json.loads(line) for line in CELLS.read_text().splitlines()]
    counts: dict[tuple[str, str], Counter[str]] = {}
    for cell in cells:
        counts.setdefault((cell["format"], cell["engine"]), Counter())[cell["outcome"]] += 1
    for (format_, engine), found in counts.items():
        others = found.total() - found["ok"] - found["refused"]
        yield f"| {format_} | {engine} | {found['ok']} | {found['refused']} | {others} |"


def _of_format(name: str, exporter: type[Format]) -> Iterator[str]:
    kinds = [KINDS[kind].title for kind in KINDS if name in KINDS[kind].formats]
    options = [f"`{flag_of(option.name)}`" for option in options_of(exporter)]
    files = ", ".join(f"`{file}`" for file in exporter.files)
    yield f"## {name}"
    yield "\n".join(
        [
            f"* Files: {files}.",
            f"* Adapters: {', '.join(kinds)}.",
            f"* Types of numbers: {', '.join(exporter.dtypes)}.",
            f"* Options: {', '.join(options)} (see [qpa export](commands/export.md)).",
        ]
    )
    yield f"```text\n{_documentation(exporter)}\n```"


def _engines(exporter: type[Format]) -> str:
    return ", ".join(
        f"{name} (in an environment of its own)" if ENGINES[name].own_environment else name
        for name in exporter.engines
    )


def _documentation(exporter: Any) -> str:
    """Return what the module of an exporter says of the files, up to its sources."""
    text = inspect.getdoc(inspect.getmodule(exporter)) or ""
    return text.partition("\nSource:")[0].strip()


def _contract(name: str) -> str:
    text = import_module(f"qpa.exporters.contracts.{name}").__doc__ or ""
    return f"```text\n{text[text.index('L01') :].partition('Source:')[0].strip()}\n```"
