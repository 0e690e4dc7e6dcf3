"""qpa expand: from a compact adapter and its basis to a plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qpa.cli.command import Command
from qpa.cli.output import JsonOption, print_json, print_line

EXAMPLES = """
[bold]Examples[/bold]

qpa expand store/tenant-17 --basis bases/stories --out adapters/tenant-17
"""


def expand(
    compact: Annotated[Path, typer.Argument(help="File of qpa export --format compact.")],
    basis: Annotated[Path, typer.Option(help="Directory of qpa basis with which it was planned.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    json_: JsonOption = False,
) -> None:
    """Make a plain LoRA of a compact adapter, as qpa export --format lora writes it.

    The same is done on a machine without torch by python -m qpa.serve.expansion FILE BASIS OUT.
    """
    from qpa.serve.basis import Basis
    from qpa.serve.expansion import WEIGHTS_FILE
    from qpa.serve.expansion import expand as expand_file

    opened = Basis.open(basis)
    expand_file(compact, opened, out)
    n_bytes = (out / WEIGHTS_FILE).stat().st_size
    if json_:
        print_json({"out": str(out), "base": opened.base, "bytes": n_bytes})
        return
    print_line(f"wrote {out}: {n_bytes:,} bytes of {compact.stat().st_size:,}, a LoRA for {opened.base}")


COMMAND = Command(expand, EXAMPLES)
