"""The rules that a PEFT directory of another kind than LoRA keeps, as qpa exports it.

L23  adapter_config.json says what `qpa.exporters.formats.peft` writes for the kind and nothing else, so that
     no field changes what the tensors mean.
L24  The tensors are those of the kind, named and shaped as the config says.
L25  Every number is finite and of a floating-point type.

What is right for a kind, the kind says (`qpa.adapters.peft_directory`).

Source: ours; what PEFT 0.21 reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qpa.adapters.peft_directory import Fields
from qpa.adapters.registry import KINDS
from qpa.compat.peft_ import CONFIG_FILE
from qpa.documents.base import JsonObject
from qpa.documents.finding import Finding, several, short
from qpa.errors import DocumentError, one_of
from qpa.exporters.contracts.lora import check_numbers, read_config, read_tensor_file


def check_peft_contract(directory: Path, method: str) -> Iterator[Finding]:
    """Yield what an exported directory breaks of the rules of this module.

    Args:    method: of the adapter, as the manifest says.
    """
    try:
        config, file = read_config(directory), read_tensor_file(directory)
    except DocumentError as error:
        yield Finding("L23", short(error.subject), short(error.expected), short(error.found))
        return
    rules = KINDS[method].peft
    if rules is None:
        known = [KINDS[name].title for name in KINDS if KINDS[name].peft is not None]
        yield Finding("L23", CONFIG_FILE, one_of(known), short(method))
        return
    findings = list(_check_fields(config, rules.fields))
    yield from findings
    if not findings:
        yield from rules.check(config, file)
    yield from check_numbers("L25", file)


def _check_fields(config: JsonObject, fields: Fields) -> Iterator[Finding]:
    if unknown := sorted(config.keys() - fields.keys()):
        yield Finding("L23", CONFIG_FILE, "only the fields that qpa writes", f"{several(unknown)} as well")
    for name, is_right in fields.items():
        if name not in config or not is_right(config[name]):
            found = short(config[name]) if name in config else "none"
            yield Finding("L23", f"{CONFIG_FILE} {name}", "what qpa writes there", found)
