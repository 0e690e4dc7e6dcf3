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
    """Fill in what the console blocks of every page show; other commands are run for what they make."""
    os.environ["COLUMNS"] = str(N_COLUMNS)
    for page in pages:
        lines = page.read_text().splitlines(keepends=True)
        in_full = page.name in IN_FULL
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "text.txt").write_text(TEXT)
            furnish(Path(place), Path(place) / "text.txt")
            with chdir(place):
                n_more = 0
                for block in read_blocks(page):
                    if block.reason or block.language not in ("sh", "console"):
                        continue
                    if block.language == "sh":
                        for words, _ in block.commands():
                            run_command(words, in_full=in_full)
                        continue
                    first, n_lines = block.line - 1 + n_more, block.text.count("\n")
                    filled = with_output(block, in_full=in_full).splitlines(keepends=True)
                    lines[first : first + n_lines] = filled
                    n_more += len(filled) - n_lines
        page.write_text("".join(lines))


def with_output(block: Block, *, in_full: bool) -> str:
    """Return a block with what its commands print now."""
    lines = re.findall(r"^\$ .*(?:\\\n.*)*$", block.text, flags=re.M)
    return "".join(f"{line}\n{output_of(line[2:], in_full=in_full)}" for line in lines)


def output_of(line: str, *, in_full: bool) -> str:
    """Return what a command prints, of one that fails with its error."""
    printed, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(errors):
        code = run_command(shlex.split(line.replace("\\\n", " "), comments=True), in_full=in_full)
    lines = (printed.getvalue() + (errors.getvalue() if code else "")).strip().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


if __name__ == "__main__":
    main([Path(name).resolve() for name in sys.argv[1:]])
