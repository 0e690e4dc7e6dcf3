"""What the site's builder calls while it reads docs/: pages and styles that are made and not written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from properdocs.structure.files import File
from pygments.formatters import HtmlFormatter

from docs.pages.commands import command_page, commands_page
from docs.pages.formats import formats_page
from qpa.cli.main import COMMANDS

STYLES = {"light": "default", "dark": "github-dark"}
"""Pygments' styles of code, by what the theme calls its two colour schemes."""


def made_pages() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every page that no file holds."""
    yield "formats.md", formats_page()
    yield "commands/index.md", commands_page()
    for name in COMMANDS:
        yield f"commands/{name}.md", command_page(name)


def on_config(config: Any) -> Any:
    """List the pages of the commands in the navigation, in the order of `qpa --help`."""
    (commands,) = (entry["Commands"] for entry in config.nav if "Commands" in entry)
    commands.extend({f"qpa {name}": f"commands/{name}.md"} for name in COMMANDS)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the colours of code in both colour schemes."""
    for name, text in (*made_pages(), ("code.css", _code_colours())):
        files.append(File.generated(config, name, content=text))
    return files


def _code_colours() -> str:
    return "\n".join(
        HtmlFormatter(style=style).get_style_defs(f'[data-bs-theme="{scheme}"] .highlight')
        for scheme, style in STYLES.items()
    )
