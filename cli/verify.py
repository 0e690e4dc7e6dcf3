"""qpa verify: is an exported directory the function that was trained?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qpa.cli.output import JsonOption, print_json, print_line, print_table

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
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Only check the files against the LoRA contract; any origin.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Load an adapter with PEFT and with transformers in a fresh process and compare with the live model."""
    if static:
        _verify_static(directory, json_)
    else:
        _verify_engines(directory, model, trust_remote_code, json_)


def _verify_static(directory: Path, as_json: bool) -> None:
    from qpa.errors import VerificationError
    from qpa.exporters.lora_contract import check_lora_contract

    findings = check_lora_contract(directory)
    if as_json:
        print_json({"adapter": str(directory), "findings": [str(finding) for finding in findings]})
    else:
        for finding in findings[1:]:
            print_line(str(finding))
    if findings:
        raise VerificationError(
            str(directory), "the LoRA contract to be kept", f"{len(findings)} findings: {findings[0]}"
        )
    if not as_json:
        print_line(f"{directory}: keeps the LoRA contract")


def _verify_engines(directory: Path, model: str | None, trust_remote_code: bool, as_json: bool) -> None:
    from qpa.cli.output import progress_bar
    from qpa.documents import Verification, read_manifest
    from qpa.passes import verification_pipeline
    from qpa.passes.verify_adapter import VerifyAdapter
    from qpa.pipeline import PassContext
    from qpa.run_directory import DirectoryStore

    manifest = read_manifest(directory)
    with progress_bar() as progress:
        context = PassContext(manifest.provenance.seed, DirectoryStore(directory), (), progress)
        step = VerifyAdapter(directory=str(directory), model=model, trust_remote_code=trust_remote_code)
        document = verification_pipeline(step).run(manifest, context).document(Verification)
    if as_json:
        print_json(
            {"adapter": str(directory), **document.model_dump(mode="json", include={"engines", "tolerance"})}
        )
        return
    rows = [
        (
            check.engine,
            f"{check.max_logit_difference:.1e}",
            f"{check.max_base_difference:.1e}",
            "equal" if check.greedy_tokens_equal else "differ",
            "none",
        )
        for check in document.engines
    ]
    header = ("engine", "logits - live", "logits - base", "greedy tokens", "missing or unexpected keys")
    print_table(f"{directory}: the same function as the trained model", rows, header)
