"""A compact adapter on a model of transformers, by PEFT."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from qpa.errors import OptionError
from qpa.serve.basis import Basis
from qpa.serve.expansion import expand


def load(
    model: Any,
    compact: Path | str,
    *,
    basis: Basis | Path | str | None = None,
    adapter_name: str = "default",
) -> Any:
    """Return the model with an adapter, ready to generate.

    Args:    model: a transformers model, or a PeftModel that gets one adapter more; the active one stays.
             compact: the compact file, with its layout in the folder `layouts` beside it.
             basis: that of the adapter, or its directory; whoever loads many opens it once. None is the
             directory that the environment variable QPA_BASIS names, as for a server.
             adapter_name: the name in the PeftModel.
    Returns: peft.PeftModel.
    Raises:  QpaError: the file, its layout or the basis is wrong, or no basis is named.
    """
    from peft import PeftModel

    basis = basis or os.environ.get("QPA_BASIS")
    if not basis:
        raise OptionError("basis", "a directory that qpa basis wrote, here or in QPA_BASIS", "none")
    opened = basis if isinstance(basis, Basis) else Basis.open(Path(basis))
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work) / "adapter"
        expand(Path(compact), opened, directory)
        if isinstance(model, PeftModel):
            model.load_adapter(str(directory), adapter_name=adapter_name)
            return model
        return PeftModel.from_pretrained(model, str(directory), adapter_name=adapter_name)
