"""A base model whose linear layers read rotated inputs: x becomes x R, block by block.

R is the Cayley transform (I - Q) (I + Q)^-1 of a skew-symmetric Q, so it is orthogonal whatever the numbers
of Q are, and the identity where they are zero.

Source: OFT, arXiv 2306.07280, with the transform on the input's side and the order of Q's numbers as PEFT
has them; the code is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qpa.adapters.cayley import n_angles
from qpa.adapters.hooked_model import HookedModel
from qpa.documents import TensorRef


def rotations(numbers: Tensor, block_size: int) -> Tensor:
    """Return the blocks of an orthogonal matrix.

    Args:    numbers: float[..], n_angles(block_size) for each block in turn: the upper triangle of its Q, row
             by row.
    Returns: float[n_blocks, block_size, block_size] of the same type, (I - Q) (I + Q)^-1 of each.
    """
    upper = numbers.reshape(-1, n_angles(block_size))
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=numbers.device)
    triangle = upper.new_zeros(len(upper), block_size, block_size)
    triangle[:, rows, columns] = upper
    skew = triangle - triangle.mT
    identity = torch.eye(block_size, dtype=numbers.dtype, device=numbers.device)
    turned: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return turned


class RotatedModel(HookedModel):
    """A causal language model with a rotation before each adapted layer. All numbers are to start at zero.

    Args:    model: of transformers; changed in place: its own parameters are frozen.
             tensors: the numbers of each adapted module, [1, n_blocks * n_angles(block_size)].
             block_size: sides of the blocks.
    Raises:  ModelError: the model has no such module.
    """

    def __init__(self, model: Any, tensors: Iterable[TensorRef], block_size: int) -> None:
        super().__init__(model)
        device = next(model.parameters()).device
        for tensor in tensors:
            layer = self.module_for(tensor.module, tensor.role)
            layer.add_module(tensor.role, _Rotation(tensor.shape, block_size, device))
            self.change_input(layer, _rotated)


def _rotated(layer: Any, hidden: Tensor) -> Tensor:
    turned: Tensor = layer.oft_R(hidden)
    return turned


class _Rotation(nn.Module):
    def __init__(self, shape: tuple[int, int], block_size: int, device: torch.device) -> None:
        super().__init__()
        self.block_size = block_size
        self.weight = nn.Parameter(torch.zeros(shape, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the input, [.., n_in], with each block of its numbers times that block of R."""
        # In bfloat16 a block near the identity would lose how near it is.
        with torch.autocast(hidden.device.type, enabled=False):
            blocks = rotations(self.weight, self.block_size)
            cut = hidden.to(blocks.dtype).reshape(*hidden.shape[:-1], -1, self.block_size)
            return torch.einsum("...nk,nkc->...nc", cut, blocks).flatten(-2).to(hidden.dtype)
