"""qpa verify: is an export the function that was trained, and a frozen adapter what was measured?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.command import Command, Makers
from qpa.cli.output import JsonOption, print_json, print_line, print_table, progress_bar

if TYPE_CHECKING:
    from qpa.passes.verify_adapter import VerifyAdapter

EXAMPLES = """
[bold]Examples[/bold]

qpa verify adapters/bard --model ./models/stories260K

qpa verify adapters/bard --static

qpa verify runs/bard

qpa verify store/tenant-17 --basis bases/stories
"""


def makers() -> Makers:
    """Return the pass whose options `qpa verify` takes."""
    from qpa.passes.verify_adapter import VerifyAdapter

    return {"step": VerifyAdapter}


def verify(
    step: VerifyAdapter,
    static: Annotated[
        bool, typer.Option("--static", help="Only check the files, of an export or of a LoRA of any origin.")
    ] = False,
    basis: Annotated[Path | None, typer.Option(help="Basis of a compact adapter, to expand it.")] = None,
    json_: JsonOption = False,
) -> None:
    """Load an export with engines that know nothing of qpa, in a fresh process, and compare answers.

    Of a run, compute the frozen adapter once more from the recorded counts, and compare bit for bit.

    A compact adapter records no answers to compare with: it is expanded, and the LoRA's files are checked.
    """
    from qpa.documents import AdapterSpec
    from qpa.errors import DirectoryError, OptionError
    from qpa.serve.compact import is_compact

    if step.engines == ("all",):
        step = replace(step, engines=None)
    if is_compact(Path(step.directory)):
        _refuse_engines(step, "for a compact adapter, which records no answers to compare with")
        _verify_compact(Path(step.directory), basis, static=static, as_json=json_)
    elif basis is not None and not Path(step.directory).exists():
        raise DirectoryError(step.directory, "a compact adapter", "no such file")
    elif basis is not None:
        raise OptionError("basis", "a compact adapter, which is a file", step.directory, "leave it out")
    elif (Path(step.directory) / AdapterSpec.file_name()).is_file() and not static:
        _refuse_engines(step, "for a run, which is compared with its own counts")
        _verify_run(Path(step.directory), as_json=json_)
    elif static:
        _refuse_engines(step, "beside --static, which asks no engine")
        _verify_static(Path(step.directory), as_json=json_)
    else:
        _verify_engines(step, as_json=json_)


def _verify_run(path: Path, *, as_json: bool) -> None:
    from qpa.documents import FrozenAdapter
    from qpa.passes.freeze_adapter import check_frozen
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.report.rows import number
    from qpa.store.run_directory import RunDirectory

    directory = RunDirectory.open(path)
    documents = directory.read_through(FrozenAdapter)
    context = PassContext(documents[0].provenance.seed, directory.files, documents)
    measurement, n_tensors = check_frozen(context)
    if as_json:
        print_json({"run": str(path), "source": measurement.source, "n_tensors": n_tensors})
        return
    given = "the recorded counts give" if measurement.counts else f"the {measurement.source} source gave"
    print_line(f"{path}: {given} this adapter, {number(n_tensors)} tensors")


def _verify_compact(file: Path, basis: Path | None, *, static: bool, as_json: bool) -> None:
    """Check a compact adapter; with `static` also without its basis, and then it is not expanded."""
    from qpa.errors import OptionError
    from qpa.exporters.contracts.compact import check_compact
    from qpa.exporters.contracts.export import broken_contract
    from qpa.serve.basis import Basis
    from qpa.serve.expansion import read

    compact, _ = read(file)
    if basis is None and not static:
        expected = f"the directory of basis {compact.basis.hex()[:12]}.., to expand the adapter"
        raise OptionError("basis", expected, "none", "or pass --static to check the file alone")
    findings = () if basis is None else check_compact(file, Basis.open(basis))
    if as_json:
        words = [str(finding) for finding in findings]
        print_json({"adapter": str(file), "expanded": basis is not None, "findings": words})
    if findings:
        raise broken_contract(file, findings)
    if not as_json:
        what = f"{sum(map(len, compact.arrays)):,} numbers for basis {compact.basis.hex()[:12]}.."
        did = "not expanded" if basis is None else "which expand to a LoRA that keeps the contract"
        print_line(f"{file}: {what}, {did}; it records no answers to ask engines for")


def _refuse_engines(step: VerifyAdapter, reason: str) -> None:
    """Refuse options of engines where none is asked."""
    from qpa.errors import OptionError

    engines = None if step.engines is None else ",".join(step.engines)
    asked = {"model": step.model, "engines": engines, "python": step.python, "base_gguf": step.base_gguf}
    for name, value in asked.items():
        if value is not None:
            raise OptionError(name, f"nothing {reason}", value, "leave it out")


def _verify_static(directory: Path, *, as_json: bool) -> None:
    from qpa.documents.manifest import check_no_run
    from qpa.exporters.contracts.export import broken_contract, check_contract

    check_no_run(directory, "a directory that qpa export wrote, or a LoRA of any origin")
    findings = check_contract(directory)
    if as_json:
        print_json({"adapter": str(directory), "findings": [str(finding) for finding in findings]})
    else:
        for finding in findings[1:]:
            print_line(str(finding))
    if findings:
        raise broken_contract(directory, findings)
    if not as_json:
        print_line(f"{directory}: keeps the contract")


def _verify_engines(step: VerifyAdapter, *, as_json: bool) -> None:
    from qpa.documents.verification import VERIFICATION_PATH
    from qpa.report.exports import (
        VERIFICATION_HEADER,
        verification_json,
        verification_rows,
        verification_title,
    )
    from qpa.store.run_directory import DirectoryStore
    from qpa.workflow.exporting import ask_engines

    directory = Path(step.directory)
    with progress_bar() as progress:
        manifest, document = ask_engines(step, progress)
    kept, why_not = True, ""
    try:
        DirectoryStore(directory).put(VERIFICATION_PATH, document.to_json())
    except OSError as error:
        kept, why_not = False, error.strerror or type(error).__name__
    if as_json:
        content = {"adapter": str(directory), "dtype": manifest.dtype, "kept": kept}
        print_json(content | verification_json(document))
        return
    title = f"{directory}: {verification_title(manifest.dtype, step.tolerance)}"
    print_table(title, verification_rows(document), VERIFICATION_HEADER)
    path = directory / VERIFICATION_PATH
    print_line(f"wrote {path}" if kept else f"{path} could not be written: {why_not}")


COMMAND = Command(verify, EXAMPLES, makers)
