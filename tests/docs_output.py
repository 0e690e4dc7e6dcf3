"""Write into the pages what their commands print: what stands below a `$` line of a console block.

    python -m tests.docs_output docs/troubleshooting.md

The commands are run as the tests run them, on a tiny model (`tests.docs_commands`); those of `IN_FULL` as
they stand, which takes minutes.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

from docs.pages.blocks import Block, read_blocks
from tests.docs_commands import N_COLUMNS, furnish, run_command

IN_FULL = ("quickstart.md",)
"""Pages whose commands are run as a reader runs them."""

TEXT = "".join(f"line {n}: {n % 7} and {n % 3} make {n % 21}.\n" for n in range(95))


def main(pages: list[Path]) -> None:
    """Fill in the output of every page's console blocks."""
    os.environ["COLUMNS"] = str(N_COLUMNS)
    for page in pages:
        blocks = [block for block in read_blocks(page) if block.language == "console" and not block.reason]
        text = page.read_text()
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "text.txt").write_text(TEXT)
            furnish(Path(place), Path(place) / "text.txt")
            with chdir(place):
                for block in blocks:
                    text = text.replace(block.text, with_output(block, in_full=page.name in IN_FULL))
        page.write_text(text)


def with_output(block: Block, *, in_full: bool) -> str:
    """Return a block with what its commands print now."""
    lines = re.findall(r"^\$ .*(?:\\\n.*)*$", block.text, flags=re.M)
    return "".join(f"{line}\n{output_of(line[2:], in_full=in_full)}" for line in lines)


def output_of(line: str, *, in_full: bool) -> str:
    """Return what a command prints, its error last."""
    printed, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(errors):
        run_command(shlex.split(line.replace("\\\n", " "), comments=True), in_full=in_full)
    lines = (printed.getvalue() + errors.getvalue()).splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


if __name__ == "__main__":
    main([Path(name).resolve() for name in sys.argv[1:]])
