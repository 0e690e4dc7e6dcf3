"""A base model whose own Python code leaves a trace when it runs."""

from __future__ import annotations

import json
from pathlib import Path

CODE = """
from pathlib import Path

from transformers import PretrainedConfig

Path({marker!r}).write_text("ran")


class TracedConfig(PretrainedConfig):
    model_type = "traced"
"""


def traced_model(path: Path) -> tuple[Path, Path]:
    """Write a model directory with Python code; return it and the file that the code makes."""
    path.mkdir()
    marker = path.with_name("the-code-ran")
    code = "configuration_traced.TracedConfig"
    classes = {name: code for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    (path / "config.json").write_text(json.dumps({"model_type": "traced", "auto_map": classes}))
    tokenizer = {"tokenizer_class": "TracedTokenizer", "auto_map": {"AutoTokenizer": [code, None]}}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (path / "configuration_traced.py").write_text(CODE.format(marker=str(marker)))
    return path, marker
