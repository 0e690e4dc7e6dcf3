"""qpa verify: is an exported directory the function that was trained?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpa.cli.output import JsonOption, print_json, print_line, print_table, split_names

if TYPE_CHECKING:
    from qpa.passes.verify_adapter import VerifyAdapter

EXAMPLES = """
[bold]Examples[/bold]

qpa verify adapters/bard --model ./models/stories260K

qpa verify adapters/bard --static
"""


def verify(
    directory: Annotated[Path, typer.Argument(help="Adapter directory.")],
    model: Annotated[
        str | None, typer.Option(help="Base model to verify with.  [default: the one it was trained on]")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="Engines that read the format, separated by commas: peft, transformers, onnxruntime, "
            "onnxruntime-genai, vllm, llama.cpp, mlx; all: those installed."
        ),
    ] = "all",
    python: Annotated[
        str | None,
        typer.Option(help="Python of the environment that has the engines.  [default: this one]"),
    ] = None,
    base_gguf: Annotated[str | None, typer.Option(help="The base model as GGUF, for llama.cpp.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Only check the files: the manifest's; of a LoRA of any origin.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Load an export with engines that know nothing of qpa, in a fresh process, and compare answers."""
    if static:
        _refuse_with_static(model, engine, python, base_gguf)
        _verify_static(directory, json_)
        return
    from qpa.passes.verify_adapter import VerifyAdapter

    step = VerifyAdapter(
        directory=str(directory),
        model=model,
        engines=None if engine == "all" else split_names(engine),
        python=python,
        base_gguf=base_gguf,
        trust_remote_code=trust_remote_code,
    )
    _verify_engines(step, directory, json_)


def _refuse_with_static(model: str | None, engine: str, python: str | None, base_gguf: str | None) -> None:
    from qpa.errors import OptionError

    given = {"--model": model, "--engine": engine if engine != "all" else None}
    given |= {"--python": python, "--base-gguf": base_gguf}
    for option, value in given.items():
        if value is not None:
            raise OptionError(option, "nothing beside --static, which asks no engine", value, "leave one out")


def _verify_static(directory: Path, as_json: bool) -> None:
    from qpa.errors import VerificationError
    from qpa.exporters.contracts.export import check_contract

    findings = check_contract(directory)
    if as_json:
        print_json({"adapter": str(directory), "findings": [str(finding) for finding in findings]})
    else:
        for finding in findings[1:]:
            print_line(str(finding))
    if findings:
        raise VerificationError(
            str(directory), "the contract to be kept", f"{len(findings)} findings: {findings[0]}"
        )
    if not as_json:
        print_line(f"{directory}: keeps the contract")


def _verify_engines(step: VerifyAdapter, directory: Path, as_json: bool) -> None:
    from qpa.cli.output import progress_bar
    from qpa.documents import Verification, read_manifest
    from qpa.documents.verification import VERIFICATION_PATH
    from qpa.passes import verification_pipeline
    from qpa.pipeline.pass_protocol import PassContext
    from qpa.report.facts import VERIFICATION_HEADER, verification_json, verification_rows
    from qpa.store.run_directory import DirectoryStore

    manifest, files = read_manifest(directory), DirectoryStore(directory)
    with progress_bar() as progress:
        context = PassContext(manifest.provenance.seed, files, (), progress)
        document = verification_pipeline(step).run(manifest, context).document(Verification)
    kept, why_not = True, ""
    try:
        files.put(VERIFICATION_PATH, document.to_json())
    except OSError as error:
        kept, why_not = False, error.strerror or type(error).__name__
    if as_json:
        print_json({"adapter": str(directory), "kept": kept, **verification_json(document)})
        return
    title = f"{directory}: the same function as the trained model"
    print_table(title, verification_rows(document), VERIFICATION_HEADER)
    path = directory / VERIFICATION_PATH
    print_line(f"wrote {path}" if kept else f"{path} could not be written: {why_not}")
