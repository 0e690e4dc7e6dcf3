"""The site of docs/: it is built without a network and without a warning, and needs no network to be read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.pages.commands import command_page
from docs.pages.formats import formats_page, measured_rows
from qpa.cli.main import COMMANDS
from qpa.documents.manifest import FORMATS
from qpa.pipeline.configuration import Schema

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the site, built as `make docs` builds it, where no name of a host resolves."""
    place = tmp_path_factory.mktemp("site")
    options = ("build", "--strict", "--quiet", "--config-file", "mkdocs.yml", "--site-dir", str(place))
    command = (sys.executable, "-m", "properdocs", *options)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return place


def test_every_command_has_a_page_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text()
    for name in COMMANDS:
        assert f'href="commands/{name}.html"' in home
        assert f'<h1 id="qpa-{name}">qpa {name}' in (site / "commands" / f"{name}.html").read_text()


def test_nothing_is_fetched_to_read_it(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|iframe)[^>]* src=\"(https?:[^\"]*)\"", page.read_text())
        fetched += re.findall(r"<link[^>]*href=\"(https?:[^\"]*)\"[^>]*rel=\"stylesheet\"", page.read_text())
        fetched += re.findall(r"<link[^>]*rel=\"stylesheet\"[^>]*href=\"(https?:[^\"]*)\"", page.read_text())
        assert fetched == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?https?:", style.read_text()), style


def test_shown_files_are_in_the_page_as_they_are(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "contributing.html").read_text())
    assert "class RyCzBricks(AnsatzKind)" in page and "--8&lt;--" not in page and "--8<--" not in page


def test_no_source_is_published(site: Path) -> None:
    assert list(site.rglob("*.py")) == []


def test_options_of_a_format_stand_below_its_name_in_a_file() -> None:
    assert "| `export.FORMAT.rank_pad` |" in command_page("export")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_has_every_option_with_its_place_in_a_file(name: str) -> None:
    page = command_page(name)
    for flag in COMMANDS[name].flags().values():
        assert f"| `{flag}`" in page
    for option in COMMANDS[name].options():
        assert option.key not in Schema().options or f"| `{option.key}` |" in page


def test_a_page_says_ranges_defaults_and_old_names() -> None:
    rows = {
        line.split("`")[1]: line for line in command_page("train").splitlines() if line.startswith("| `--")
    }
    assert "A whole number of at least 1. Default: `8`." in rows["--batch-size"]
    assert "formerly `--target`" in rows["--device-target"]
    assert "**Needed.**" in rows["--data"]
    before, _, after = command_page("train").partition("\n## Data\n")
    assert "| `--data` |" in after and "| `--data` |" not in before and "| `--force` |" in before


def test_the_page_of_formats_has_every_format_and_what_was_measured() -> None:
    page = formats_page()
    for name in FORMATS:
        assert f"\n## {name}\n" in page
        is_measured = any(row.startswith(f"| {name} |") for row in measured_rows())
        assert is_measured is bool(FORMATS[name].engines)
    assert all(f"\nL{number:02}  " in page for number in range(2, 20))
