"""The base model in torch with an adapter in it, as an ONNX graph is traced from it.

Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch

from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.adapters.registry import KINDS
from qpa.errors import ModelError
from qpa.exporters.onnx.graph import Prefix, cache_shapes


def put_adapter(model: Any, arrays: FrozenArrays) -> None:
    """Turn the base model into the adapted one, except for a prefix, see `AdapterKind.put_into`."""
    KINDS[arrays.frozen.method].put_into(model, arrays)


def read_prefix(model: Any, arrays: FrozenArrays) -> Prefix:
    """Return the keys and values of every layer, float32[1, n_heads, n_tokens, head_size]; () for none.

    Raises:  ModelError: the model has other layers.
    """
    states = [torch.from_numpy(array) for array in KINDS[arrays.frozen.method].prefix(arrays)]
    if not states:
        return ()
    shapes = [shape for layer in cache_shapes(model) for shape in layer]
    if [state.shape[1] for state in states] != [n_heads * size for n_heads, size in shapes]:
        found = f"{len(shapes) // 2} layers of other shapes"
        raise ModelError("the prefix", f"keys and values of {len(states) // 2} layers", found)
    parts = [s.view(len(s), *shape).transpose(0, 1)[None] for s, shape in zip(states, shapes, strict=True)]
    return tuple(zip(parts[::2], parts[1::2], strict=True))
