"""What generators of spectra lose with directions that are not those of their own data.

Methods of the bench, each the generator of one state with other directions; their names begin with "basis:":

    1-batch, 2-batches, 32-batches   of the gradient, as by default, which takes 8 batches
    other-text                       of the gradient of 8 batches of another text
    mixture                          of the gradient of 4 batches of the text and 4 of the other
    weights, random                  the first singular vectors of the base weights; random orthonormal ones
    weights-signed, random-signed    the same, each with the sign of the gradient along it, of 8 batches

and "spectral-basis:other-text" and so on, with the generator `spectral` in its place, whose factors have a
sign of their own. With the directions of their own data the generators are the methods `state` and
`qpa:spectral` of `qpa bench`.

    python -m benchmarks.state_bases --model <stories260K> --data <tinyshakespeare input.txt> \\
        --other-data <wikitext-2 valid.txt> --budgets 12,130 --out docs/results/bases
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.own_methods import parser_of, run
from qpa.bench.fixed_basis import weight_of
from qpa.bench.generated import BATCH_SIZE, GENERATED, Calibrate, Generated, calibrate_on, state_method
from qpa.bench.method import BenchBase
from qpa.documents import AdapterSpec
from qpa.generators.chunks import basis_shapes
from qpa.models.base_model import load_tokenizer
from qpa.seeds import split_seed
from qpa.training.calibration import choose_rows
from qpa.training.data.data_options import N_CALIBRATION_BATCHES, DataOptions
from qpa.training.data.splits import instruction_splits
from qpa.training.evaluation import causal_loss
from qpa.training.generated_adapter import GeneratedAdapter

Directions = Callable[[str, Any], tuple[Tensor, Tensor]]
"""From a module's path and its linear layer to columns of left and rows of right vectors."""

LENGTH = 128


def on_batches(n_batches: int) -> Calibrate:
    """Return the calibration on so many batches of the training rows."""

    def calibrate(base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, seed: int) -> None:
        calibrate_on(base, adapted, spec, _batches(base.train_rows, n_batches, seed))

    return calibrate


def on_text(path: Path, n_other: int) -> Calibrate:
    """Return the calibration on n_other batches of a text, and for the rest of the usual 8 on its own."""

    def calibrate(base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, seed: int) -> None:
        options = DataOptions((str(path),), max_length=LENGTH)
        rows = instruction_splits(options, load_tokenizer(spec.base), seed=0).training
        other = torch.tensor([row["input_ids"] for row in rows if len(row["input_ids"]) == LENGTH])
        own = _batches(base.train_rows, N_CALIBRATION_BATCHES - n_other, seed)
        calibrate_on(base, adapted, spec, [*_batches(other, n_other, seed), *own])

    return calibrate


def with_directions(directions: Callable[[int], Directions], *, is_signed: bool) -> Calibrate:
    """Return a calibration that takes directions without a gradient, or the gradient's signs alone."""

    def calibrate(base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, seed: int) -> None:
        model, find = base.load(), directions(seed)
        bases: dict[str, Tensor] = {}
        shapes = basis_shapes(adapted.generator.layout)
        for a, b in spec.pairs:
            if a.path not in shapes:
                continue
            left, right = find(a.module, model.get_submodule(a.module))
            bases[a.path] = right[: shapes[a.path][0]].contiguous()
            bases[b.path] = left[:, : shapes[b.path][1]] * (spec.rank / spec.alpha)
        _set(adapted, bases)
        if is_signed:
            _set(adapted, bases | _signed(base, adapted, spec, bases, seed))

    return calibrate


def of_weights(seed: int) -> Directions:
    """Return the singular vectors of the base weights."""

    def find(path: str, module: Any) -> tuple[Tensor, Tensor]:
        left, _, right = torch.linalg.svd(weight_of(module), full_matrices=False)
        return left, right

    return find


def at_random(seed: int) -> Directions:
    """Return random orthonormal vectors."""

    def find(path: str, module: Any) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(split_seed(seed, path))
        n_out, n_in = weight_of(module).shape
        side = min(n_out, n_in)
        left = torch.linalg.qr(torch.randn((n_out, side), generator=random))[0]
        right = torch.linalg.qr(torch.randn((n_in, side), generator=random))[0]
        return left, right.T

    return find


def _set(adapted: GeneratedAdapter, bases: dict[str, Tensor]) -> None:
    adapted.generator.set_bases(bases)
    adapted.optimizer.push_forward()


def _signed(
    base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, bases: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Return the left vectors, each with the sign of the gradient along it; the adapter holds these bases."""
    for batch in _batches(base.train_rows, N_CALIBRATION_BATCHES, seed):
        torch.autograd.backward(causal_loss(adapted.model, batch, batch, bf16=base.bf16))
    found: dict[str, Tensor] = {}
    for _, b in spec.pairs:
        if b.path in bases:
            left = bases[b.path]
            gradient = adapted.parameters[b.path].grad
            assert gradient is not None, b.path
            along = (left * gradient[:, : left.shape[1]].to(left)).sum(0)
            found[b.path] = left * torch.where(along < 0, -1.0, 1.0)
    adapted.optimizer.zero_grad()
    return found


def _batches(rows: Tensor, n_batches: int, seed: int) -> list[Tensor]:
    chosen = choose_rows(len(rows), BATCH_SIZE, split_seed(seed, "calibration"), n_batches)
    return [rows[numbers] for numbers in chosen]


def methods(other_data: Path) -> dict[str, Generated]:
    """Return the methods by their names."""
    calibrations = {
        "1-batch": on_batches(1),
        "2-batches": on_batches(2),
        "32-batches": on_batches(32),
        "other-text": on_text(other_data, N_CALIBRATION_BATCHES),
        "mixture": on_text(other_data, N_CALIBRATION_BATCHES // 2),
        "weights": with_directions(of_weights, is_signed=False),
        "weights-signed": with_directions(of_weights, is_signed=True),
        "random": with_directions(at_random, is_signed=False),
        "random-signed": with_directions(at_random, is_signed=True),
    }
    generators = {"basis": state_method("circuit"), "spectral-basis": GENERATED["qpa:spectral"]}
    return {
        f"{prefix}:{name}": replace(generator, name=f"{prefix}:{name}", calibrate=calibrate)
        for prefix, generator in generators.items()
        for name, calibrate in calibrations.items()
        if prefix == "basis" or not name.endswith("-signed")
    }


def main() -> None:
    """Compare the directions."""
    parser = parser_of("Compare the directions that a generator of spectra may have.")
    parser.add_argument("--other-data", type=Path, required=True, help="A text of another kind.")
    options = parser.parse_args()
    run(methods(options.other_data), options)


if __name__ == "__main__":
    main()
