"""A configuration file to fill in: every option with its default, and what it is for."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from qpa.pipeline.configuration import EXPORT, Schema
from qpa.pipeline.options import Option

_WIDTH = 100
_HEAD = """\
# A configuration for qpa run. What has a # before its name is as it says; take the # away to change it.
# Paths are relative to the directory where qpa runs.
"""


def template(values: Mapping[str, object]) -> str:
    """Return a configuration file with all options.

    Options that must be given stand on top, and all others are commented out unless a value is given.

    Args:    values: by key, such as "plan.model".
    """
    schema = Schema()
    top = schema.top()
    lines = [_HEAD, *_options({key: schema.options[key] for key in top}, values, "")]
    for section in schema.sections:
        if section == EXPORT:
            lines += _formats(schema, values)
            continue
        inside = {k: one for k, one in schema.options.items() if k.startswith(f"{section}.") and k not in top}
        lines += ["", f"{section}:", *_options(inside, values, "  ")]
    return "\n".join(lines) + "\n"


def _formats(schema: Schema, values: Mapping[str, object]) -> Iterator[str]:
    """Yield the formats, each with its options."""
    yield from (
        "",
        f"{EXPORT}:",
        "  # Each of these is written; by default the plainest that carries the adapter.",
    )
    asked = {key.split(".")[1] for key in values if key.startswith(f"{EXPORT}.")}
    formats = dict.fromkeys(key.split(".")[1] for key in schema.options if key.startswith(f"{EXPORT}."))
    for format_ in formats:
        yield f"  {'' if format_ in asked else '# '}{format_}:"
        prefix = f"{EXPORT}.{format_}."
        yield from _options({k: o for k, o in schema.options.items() if k.startswith(prefix)}, values, "    ")


def _options(options: Mapping[str, Option], values: Mapping[str, object], indent: str) -> Iterator[str]:
    for key, one in options.items():
        text = re.sub(r"`(\w+)`", r"\1", one.full_help())
        meaning = re.sub(r"`(\w+)`", r"\1", one.default_text())
        if one.shown_default and meaning:
            text = f"{text} Default: {meaning}."
        mark = f"{indent}# "
        yield from textwrap.wrap(
            text, _WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False
        )
        given = values.get(key)
        is_set = one.is_required or given is not None
        yield f"{indent if is_set else mark}{one.name}:{_plain(one.default if given is None else given)}"


def _plain(value: Any) -> str:
    """Return a value as YAML on the rest of a line; nothing for None."""
    if value is None:
        return ""
    value = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return " " + text.removesuffix("...\n").strip()
