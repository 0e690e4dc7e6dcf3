"""A page for every command of qpa, made from the fields that are its options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from qpa.cli.command import Command
from qpa.cli.flags import flag_of, with_flags
from qpa.cli.main import COMMANDS, app
from qpa.pipeline.configuration import Schema
from qpa.pipeline.options import Option

HEADER = "| option | what it is | in a file |\n|---|---|---|"


def command_page(name: str) -> str:
    """Return the page of a command as Markdown."""
    command = COMMANDS[name]
    click_command = typer.main.get_command(command.for_typer())
    by_name = {option.name: option for option in command.options()}
    arguments = [p for p in click_command.params if p.param_type_name == "argument"]
    flags = [p for p in click_command.params if p.param_type_name == "option"]
    needed = [f"{p.opts[0]} {p.name.upper()}" for p in flags if p.required]
    usage = ["qpa", name, *(_place(p) for p in arguments), *needed, "[OPTIONS]"]
    groups: dict[str, list[str]] = {"Options": []}  # first, as in help
    for p in flags:
        row = _row(p, by_name.get(p.name), command.flags())
        groups.setdefault(p.rich_help_panel or "Options", []).append(row)
    parts = [
        f"# qpa {name}",
        (command.function.__doc__ or "").replace("\n    ", "\n"),
        f"```text\n{' '.join(usage)}\n```",
        *_argument_list(arguments),
        "## Examples",
        f"```sh\n{examples(command)}\n```",
        *(part for group, rows in groups.items() for part in (f"## {group}", "\n".join([HEADER, *rows]))),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def commands_page() -> str:
    """Return the page that lists all commands, and what they have in common."""
    rows = [
        f"| [qpa {name}]({name}.md) | {(command.function.__doc__ or '').strip().splitlines()[0]} |"
        for name, command in COMMANDS.items()
    ]
    common = [f"| `{p.opts[0]}` | {_cell(p.help)} |" for p in typer.main.get_command(app).params]
    return "\n".join(
        [
            "# Commands",
            "",
            "Every command takes `--help`, which says what its page here says.",
            "",
            *("| command | what it does |", "|---|---|", *rows, ""),
            "These options stand before the command's name, as in `qpa --debug train runs/bard`:",
            "",
            *("| option | what it is |", "|---|---|", *common, ""),
            "A command ends with exit code 0 when it is done; with 1 on bad input or a failed check, after",
            "one line on stderr; and with 2 when the command line itself cannot be read: an unknown or",
            "missing option, or a value that is no number.",
            "",
        ]
    )


def examples(command: Command) -> str:
    """Return the examples of a command, one a line; a remark in brackets becomes a comment."""
    paragraphs = [part.strip() for part in command.examples.split("\n\n")]
    lines = [" ".join(part.split()) for part in paragraphs if part and not part.startswith("[bold]")]
    return "\n".join(re.sub(r" \(([^)]*)\)$", r"   # \1", line) for line in lines)


def _place(argument: Any) -> str:
    word = argument.name.upper()
    return word if argument.required else f"[{word}]"


def _argument_list(arguments: list[Any]) -> Iterator[str]:
    if arguments:
        yield "\n".join(f"* `{_place(argument)}`: {_cell(argument.help or '')}" for argument in arguments)


def _row(parameter: Any, option: Option | None, flags: dict[str, str]) -> str:
    """Return the row of an option, from its field where it has one."""
    names = [f"`{parameter.opts[0]}`", *_old_names(option)]
    text = _cell(parameter.help or "")
    if parameter.required:
        text = f"**Needed.** {text}"
    if option is not None:
        text += _range(option) + _default(option, flags)
    elif isinstance(parameter.show_default, str):
        text += f" Default: {_cell(parameter.show_default)}."
    elif not parameter.is_flag and parameter.default not in (None, ...):
        text += f" Default: {_code(str(parameter.default))}."
    return f"| {', '.join(names)} | {text} | {file_key(option) if option else ''} |"


def file_key(option: Option) -> str:
    """Return where an option stands in a configuration file, as code; "" where it does not stand in one."""
    keys = {re.sub(r"^export\.[\w-]+\.", "export.FORMAT.", key) for key in Schema().options}
    for key in (option.key, f"{option.section}.FORMAT.{option.name}"):
        if key in keys:
            return f"`{key}`"
    return ""


def _old_names(option: Option | None) -> Iterator[str]:
    for name in option.old_names if option else ():
        yield f"formerly `{flag_of(name)}`"


def _range(option: Option) -> str:
    bounds = (option.at_least, option.above, option.at_most)
    if option.kind not in (int, float) or bounds == (None, None, None):
        return ""
    words = option.range_words()
    return f" {words[0].upper()}{words[1:]}."


def _default(option: Option, flags: dict[str, str]) -> str:
    text = with_flags(option.default_text(), flags)
    return f" Default: {_code(text)}." if text else ""


def _code(text: str) -> str:
    """Return one word as code, and several as they are."""
    return f"`{text}`" if " " not in text else _cell(text)


def _cell(text: str) -> str:
    """Return a text as it may stand in a cell of a table."""
    plain = " ".join(text.split()).replace("|", "\\|")
    return re.sub(r"<([\w-]+)>", r"&lt;\1&gt;", plain)
