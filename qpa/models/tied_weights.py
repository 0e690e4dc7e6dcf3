"""Which weights of a model are one and the same, on torch's meta device as after loading."""

from __future__ import annotations

from typing import Any

from qpa.compat.transformers_ import tied_parameters


def ties_head(model: Any) -> bool:
    """Return whether the output head shares its weight with another module."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    tied = tied_parameters(model)
    owners = [path for path, value in model.named_parameters(remove_duplicate=False) if value is weight]
    return len(owners) > 1 or any(path in tied for path in owners)


def shares_weight(model: Any, module: str) -> bool:
    """Return whether the weight of the module of a path is another module's too."""
    tied = tied_parameters(model)
    return f"{module}.weight" in {*tied.keys(), *tied.values()}
