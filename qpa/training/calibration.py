"""Singular directions of the loss's gradient, read off an ordinary adapter.

For delta W = s B A, the adapter's own gradients at B = 0 and at A = 0 are products with the gradient G of
the base weight: dL/dB = s G A^T and dL/dA = s B^T G. So two passes over a few batches, with A random in the
first and B orthonormal in the second, are a randomized range finder of G: nothing larger than the adapter
is ever held, and quantised bases, several ranks and any forward pass work as they do in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qpa.adapters.attach import set_adapter
from qpa.adapters.parameter_view import AdapterParameter, leaf_of
from qpa.documents import AdapterSpec, WeightLayout
from qpa.errors import DivergedError
from qpa.generators.chunks import basis_shapes, kept_rows
from qpa.generators.generator import Bases
from qpa.seeds import split_seed
from qpa.training.data.data_options import N_CALIBRATION_BATCHES


def choose_rows(
    n_rows: int, batch_size: int, seed: int, n_batches: int = N_CALIBRATION_BATCHES
) -> list[list[int]]:
    """Return the row numbers of n_batches batches, or of as many as there are rows for."""
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    chosen: list[int] = order[: batch_size * n_batches].tolist()
    return [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]


def gradient_bases(
    parameters: Mapping[str, AdapterParameter],
    spec: AdapterSpec,
    shapes: Mapping[str, tuple[int, int]],
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
) -> Bases:
    """Return the leading singular vectors of the gradient of every base weight that has a spectrum.

    The pair (u, v) of the i-th largest singular value is column i of lora_B's basis and row i of
    lora_A's. Its sign is that of the gradient, so that the same factor means the same thing, up or down
    the slope, in every layer. lora_B's is divided by LoRA's scale s = alpha / rank, so that factors are
    singular values of delta W. The adapter's values are left as they were, its gradients empty.

    Args:    parameters: of the adapter, by path (`qpa.adapters.attach.adapter_parameters`).
             spec: its seed draws the range finder's test matrices.
             shapes: of the bases that are wanted, by the path of the tensor that holds them
             (`qpa.generators.chunks.basis_shapes`).
             loss: the loss of the model with this adapter on a batch.
             batches: a few batches of the training data.
    Raises:  DivergedError: the gradient is not finite.
    Source:  Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.1 and 5.1; ours: the adapter as
             the only access to the gradient.
    """
    if not shapes:
        return {}
    pairs = [(a.path, b.path) for a, b in spec.pairs if a.path in shapes]
    ranges, rows = _range_and_rows(parameters, spec, pairs, loss, batches)
    bases: dict[str, Tensor] = {}
    for a, b in pairs:
        u, _, vh = torch.linalg.svd(rows[a], full_matrices=False)
        n = shapes[a][0]
        left = ranges[b] @ u[:, :n] * (spec.rank / spec.alpha)
        bases[a], bases[b] = vh[:n].contiguous(), left.contiguous()
    return bases


def slope_shares(
    parameters: Mapping[str, AdapterParameter],
    spec: AdapterSpec,
    shapes: Mapping[str, tuple[int, int]],
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
    banks: Iterable[Bases],
) -> list[float]:
    """Return how steeply the loss falls along the directions of banks, as shares of the steepest.

    The slope is that of equal steps along all directions of a bank, sum_i u_i^T G v_i over all layers, with
    the gradient G as far as the range finder of `gradient_bases` has it, and the steepest is that along the
    gradient's own directions, of which as many are taken. The share is 1 for these, about 0 for random ones,
    and below 0 where the loss would rise. Adapter and gradients are left as `gradient_bases` leaves them.

    Args:    banks: of shared directions by path, each as `gradient_bases` returns them for these shapes.
             parameters, spec, shapes, loss, batches: see `gradient_bases`.
    Raises:  DivergedError: the gradient is not finite.
    Source:  ours.
    """
    pairs = [(a.path, b.path) for a, b in spec.pairs if a.path in shapes]
    ranges, rows = _range_and_rows(parameters, spec, pairs, loss, batches)
    steepest = 0.0
    for a, _ in pairs:
        singular_values = torch.linalg.svdvals(rows[a])[: shapes[a][0]]
        steepest += float(singular_values.sum()) * spec.rank / spec.alpha
    found: list[float] = []
    for bases in banks:
        slope = 0.0
        for a, b in pairs:
            left, right = (bases[path].to(rows[a]) for path in (b, a))
            slope += float(((ranges[b].T @ left) * (rows[a] @ right.T)).sum())
        found.append(slope / steepest if steepest > 0 else 0.0)
    return found


def column_bases(
    parameters: Mapping[str, AdapterParameter],
    spec: AdapterSpec,
    layout: WeightLayout,
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
) -> Bases:
    """Return, for an adapter that goes on from its parent, the directions of the gradient in its lora_B.

    A spectrum's rows of lora_A stay the parent's: their basis is zero, for anything else would change what
    the adapter does before the first step. Column i of lora_B's basis is the gradient of that column, brought
    to the length at which a factor is what it adds to delta W, as with `gradient_bases`: 1 / (s |row i of
    lora_A|). A column without gradient gets no direction. The adapter's values are left as they were.

    Args, Raises: see `gradient_bases`.
    Source:  ours.
    """
    shapes, first = basis_shapes(layout), kept_rows(layout)
    if not shapes:
        return {}
    pairs = [(a.path, b.path) for a, b in spec.pairs if a.path in shapes]
    gradients = _gradients(parameters, [b for _, b in pairs], loss, batches)
    bases: dict[str, Tensor] = {}
    for a, b in pairs:
        if not bool(torch.isfinite(gradients[b]).all()):
            raise DivergedError(b, "a finite gradient before training", "NaN or infinity")
        taken = slice(first[a], first[a] + shapes[a][0])
        columns = gradients[b][:, taken]
        lengths = columns.norm(dim=0) * parameters[a].detach()[taken].norm(dim=1)
        scale = torch.where(lengths > 0, spec.rank / spec.alpha / lengths, 0.0)
        bases[a], bases[b] = torch.zeros(shapes[a], device=columns.device), columns * scale
    return bases


def _range_and_rows(
    parameters: Mapping[str, AdapterParameter],
    spec: AdapterSpec,
    pairs: list[tuple[str, str]],
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return Q by the path of lora_B and s Q^T G by that of lora_A; leave the adapter as it was."""
    kept = {path: parameter.detach().clone() for path, parameter in parameters.items()}
    try:
        ranges = _find_ranges(parameters, spec, pairs, loss, batches)
        rows = _project(parameters, pairs, ranges, loss, batches)
    finally:
        set_adapter(parameters, kept)
    for a, _ in pairs:
        # gesdd does not converge on a gradient that is not finite.
        if not bool(torch.isfinite(rows[a]).all()):
            raise DivergedError(a, "a finite gradient before training", "NaN or infinity")
    return ranges, rows


def _find_ranges(
    parameters: Mapping[str, AdapterParameter],
    spec: AdapterSpec,
    pairs: list[tuple[str, str]],
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
) -> dict[str, Tensor]:
    """Return orthonormal float[out, rank] that span G times a random matrix, by the path of lora_B."""
    seed = split_seed(spec.seed, "calibration")
    shapes = {tensor.path: tensor for tensor in spec.tensors}
    for a, b in pairs:
        random = torch.Generator().manual_seed(split_seed(seed, a))
        test_matrix = torch.randn(shapes[a].shape, generator=random)
        set_adapter(parameters, {a: test_matrix, b: torch.zeros(shapes[b].shape)})
    gradients = _gradients(parameters, [b for _, b in pairs], loss, batches)
    return {path: torch.linalg.qr(gradient)[0] for path, gradient in gradients.items()}


def _project(
    parameters: Mapping[str, AdapterParameter],
    pairs: list[tuple[str, str]],
    ranges: dict[str, Tensor],
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
) -> dict[str, Tensor]:
    """Return s Q^T G, float[rank, in], by the path of lora_A."""
    for a, b in pairs:
        set_adapter(parameters, {a: torch.zeros_like(parameters[a].detach()), b: ranges[b]})
    return _gradients(parameters, [a for a, _ in pairs], loss, batches)


def _gradients(
    parameters: Mapping[str, AdapterParameter],
    paths: list[str],
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
) -> dict[str, Tensor]:
    """Return the gradients of some parameters, summed over batches, and leave none behind."""
    for batch in batches:
        loss(batch).backward()  # type: ignore[no-untyped-call]
    zeros = {path: torch.zeros_like(parameters[path].detach()) for path in paths}
    gradients = {path: parameters[path].grad for path in paths}
    for parameter in parameters.values():
        leaf_of(parameter).grad = None
    return {path: zeros[path] if g is None else g for path, g in gradients.items()}
