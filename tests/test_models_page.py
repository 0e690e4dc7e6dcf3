"""The table of docs/models.md is what planning finds on a tiny model of every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpa.adapters.targets import ATTENTION, EXPERTS, MLP, WORDS, part_of
from qpa.documents import AdapterSpec
from qpa.passes.inspect_model import InspectModel
from tests.small_specs import NOWHERE
from tests.tiny_architectures import MORE_ARCHITECTURES, tiny_config
from tests.tiny_models import ARCHITECTURES

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

Row = tuple[str, ...]


def planned_row(name: str, path: Path) -> Row:
    """Return the cells of an architecture: the types of layers in each part, and what is left out."""
    if name in ARCHITECTURES:
        ARCHITECTURES[name](path)
    else:
        tiny_config(name).save_pretrained(path)
    spec = InspectModel(model=str(path), rank=1).run(None, NOWHERE)
    left = ", ".join(f"`{entry.layers.rpartition('.')[2]}`" for entry in spec.left_out)
    return (*(_types(spec, part) for part in (ATTENTION, MLP, EXPERTS, None)), left)


def _types(spec: AdapterSpec, part: str | None) -> str:
    found = (t.module_type for t in spec.tensors if part_of(t.module) == part)
    return ", ".join(f"`{name}`" for name in dict.fromkeys(found))


def written_rows() -> dict[str, Row]:
    """Return the rows of the page's table by architecture, of which one row may name several."""
    lines = PAGE.read_text().partition("| architecture |")[2].splitlines()[2:]
    table = [line for line in lines[: lines.index("")] if line.startswith("|")]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table]
    return {name: cells for names, *cells in rows for name in names.split(", ")}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_the_table_says_what_planning_finds(name, tmp_path):
    assert tuple(written_rows()[name]) == planned_row(name, tmp_path / "model")


def test_the_table_has_no_other_architecture_and_the_page_every_word():
    assert written_rows().keys() == ARCHITECTURES.keys() | MORE_ARCHITECTURES.keys()
    assert all(f"| `{word}` |" in PAGE.read_text() for word in WORDS)
