"""The cards of all formats: every field is filled in, and the code in them runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from qpa.documents.manifest import FORMATS
from qpa.exporters.cards.model_card import CARDS
from qpa.exporters.registry import exporter_for
from tests.random_adapter import RandomAdapter, random_adapter
from tests.tiny_architectures import tiny

# peft asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ELSEWHERE = ("gguf", "mlx")
"""Formats whose engine has an environment of its own, so that their code is only compiled here."""


@pytest.fixture(scope="module")
def lora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return a random LoRA on a tiny Llama."""
    return random_adapter(llama, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def dora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return a random DoRA on a tiny Llama."""
    return random_adapter(llama, tmp_path_factory.mktemp("store"), method="dora")


def test_every_format_has_a_card_and_every_card_its_format():
    assert {file.stem for file in CARDS.glob("*.md")} == {*FORMATS}


@pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name].is_file])
def test_a_card_is_complete_and_its_code_runs(name, lora, dora, tmp_path):
    made = dora if name == "peft" else lora
    out = tmp_path / "out"
    exporter_for(name, {}).emit(made.frozen, out, made.context)
    card = (out / "README.md").read_text()
    assert not re.search(r"\$\w|\$\{", card)
    front, text = card.split("---\n")[1:3]
    assert yaml.safe_load(front)["tags"][-1] == "qpa"
    assert text.startswith("\n# ") and text.count("\n## ") == 3 and card.endswith("\n")
    programs = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(programs) == card.count("```python") == (2 if name == "lora" else 1)
    for program in programs:
        code = compile(program.replace("path/to/this/directory", str(out)), name, "exec")
        if name not in ELSEWHERE:
            exec(code, {})


def test_a_card_writes_the_kind_as_its_authors_do(dora):
    card = exporter_for("peft", {}).card(dora.frozen, 4)
    assert "\nA rank-4 DoRA for " in card


@pytest.mark.parametrize(
    ("name", "targets", "layer"),
    [("deepseek-v3", ("q_a_proj", "kv_b_proj"), "kv_b_proj"), ("gpt-bigcode", None, "c_attn")],
)
def test_a_card_says_what_vllm_would_leave_out(name, targets, layer, tmp_path):
    made = random_adapter(tiny(name, tmp_path / "model"), tmp_path / "store", targets=targets)
    card = exporter_for("lora", {}).card(made.frozen, 4)
    assert f"vLLM: it would leave the LoRA on `{layer}` out without a word; merge the adapter first." in card
    assert "vllm serve" not in card
