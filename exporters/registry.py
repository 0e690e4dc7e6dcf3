"""The formats of `qpa export`, by name; a format's module is loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module

from qpa.errors import OptionError
from qpa.exporters.directory import Exporter

FORMATS = {
    "lora": "qpa.exporters.formats.lora:ExportLora",
    "peft": "qpa.exporters.formats.peft:ExportPeft",
    "merged": "qpa.exporters.formats.merged:ExportMerged",
    "onnx": "qpa.exporters.formats.onnx:ExportOnnx",
    "onnx-adapter": "qpa.exporters.formats.onnx_adapter:ExportOnnxAdapter",
    "genai": "qpa.exporters.formats.genai:ExportGenai",
    "gguf": "qpa.exporters.formats.gguf:ExportGguf",
    "mlx": "qpa.exporters.formats.mlx:ExportMlx",
}
"""Module and class of each format."""


def exporter_for(name: str, options: Mapping[str, object]) -> Exporter:
    """Return the exporter of a format.

    Args:    options: by field name; None is for those the user did not give.
    Raises:  OptionError: an unknown format, or an option that it does not have.
    """
    if name not in FORMATS:
        raise OptionError("--format", ", ".join(FORMATS), name)
    module, _, kind = FORMATS[name].partition(":")
    exporter = getattr(import_module(module), kind)
    given = {option: value for option, value in options.items() if value is not None}
    known = {field.name for field in fields(exporter)}
    for option in sorted(given.keys() - known):
        text = "--" + option.replace("_", "-")
        raise OptionError(text, f"no such option with --format {name}", str(given[option]), "leave it out")
    made: Exporter = exporter(**given)
    return made
