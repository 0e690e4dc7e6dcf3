"""What generators of spectra lose with directions that are not those of their own data.

Methods of the bench, each a generator with other directions. The start of a name is the generator:

    basis             one state, with the features "circuit"; on its own directions `state` of `qpa bench`
    spectral-basis    the generator `spectral`; on its own directions `qpa:spectral`
    plan-basis        what the planner takes at the size, at its default rate

Then follows what the directions are of, or come from:

    own                              of the gradient of 8 batches of the own text, as by default
    1-batch, 2-batches, 32-batches   of that of so many batches
    kin-8, kin-32, kin-128           of so many batches of rows that the bench neither trains on nor tests on,
                                     as far as there are any: the same kind of text, from others
    other-text, text-1, text-2 ..    of 8 batches of another text: the first, second, .. of `--other-data`
    other-texts                      of 8 batches of all the other texts
    mixture                          of 4 batches of the own text and 4 of the first other
    mixtures                         of 2 batches of the own text and 6 of all others
    weights, random                  the first singular vectors of the base weights; random orthonormal ones
    kin-8+other-text                 as many first directions of each, one after the other

and after that what an adapter may add of its own:

    -64                              64 directions of each layer in the place of 32
    -signed                          for each direction the sign of the own gradient along it
    -ordered                         these signs, and the order of the directions by the gradient along them
    -turned-K                        K directions first that are the own gradient's within the shared ones
    -own-K                           K directions first that are the own gradient's, shared by nobody

    python -m benchmarks.state_bases --model <stories260K> --data <tinyshakespeare input.txt> \\
        --other-data <wikitext-2 valid.txt> --budgets 12,130 --out docs/results/bases
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.own_methods import parser_of, run, setting_of
from benchmarks.state_variants import MoreDirections
from qpa.bench.fixed_basis import weight_of
from qpa.bench.generated import (
    BATCH_SIZE,
    GENERATED,
    Calibrate,
    Generated,
    calibrate_on,
    calibrate_on_data,
    state_method,
)
from qpa.bench.method import BenchBase
from qpa.bench.setting import Setting
from qpa.bench.task import Task, load_task
from qpa.documents import AdapterSpec
from qpa.generators.chunks import basis_shapes
from qpa.generators.generator import layout_of, make_generator
from qpa.generators.layout_options import LayoutOptions
from qpa.models.base_model import load_tokenizer
from qpa.seeds import split_seed
from qpa.training.calibration import choose_rows, slope_shares
from qpa.training.data.data_options import N_CALIBRATION_BATCHES, DataOptions
from qpa.training.data.splits import instruction_splits
from qpa.training.evaluation import causal_loss
from qpa.training.generated_adapter import GeneratedAdapter, attach_generator

Directions = Callable[[str, Any], tuple[Tensor, Tensor]]
"""From a module's path and its linear layer to columns of left and rows of right vectors."""

LENGTH = 128


def on_batches(n_batches: int) -> Calibrate:
    """Return the calibration on so many batches of the training rows."""

    def calibrate(base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, seed: int) -> None:
        calibrate_on(base, adapted, spec, _batches(base.train_rows, n_batches, seed))

    return calibrate


def on_kin(setting: Setting, n_batches: int) -> Calibrate:
    """Return the calibration on so many batches of rows that the bench neither trains on nor tests on."""

    def calibrate(base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, seed: int) -> None:
        whole, n_tested = load_task(replace(setting, test_share=1.0)), len(load_task(setting).test)
        rows = torch.cat([whole.validation, whole.test[n_tested:]])
        calibrate_on(base, adapted, spec, _batches(rows, n_batches, seed))

    return calibrate


def on_texts(paths: Sequence[Path], n_own: int) -> Calibrate:
    """Return the calibration on n_own batches of the training rows, and for the rest of 8 on texts."""

    def calibrate(base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, seed: int) -> None:
        batches = _batches(base.train_rows, n_own, seed)
        n_each, n_more = divmod(N_CALIBRATION_BATCHES - n_own, len(paths))
        for number, path in enumerate(paths):
            batches = [*_batches(_blocks(path, spec), n_each + (number < n_more), seed), *batches]
        calibrate_on(base, adapted, spec, batches)

    return calibrate


def joined(calibrations: Sequence[Calibrate]) -> Calibrate:
    """Return the calibration that takes as many first directions of each, one after the other."""

    def calibrate(base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, seed: int) -> None:
        held: list[list[tuple[Any, Any, Tensor, Tensor]]] = []
        for one in calibrations:
            one(base, adapted, spec, seed)
            held.append([*_held(adapted, spec)])
        bases: dict[str, Tensor] = {}
        for of_pair in zip(*held, strict=True):
            a, b, left, _ = of_pair[0]
            n, n_more = divmod(left.shape[1], len(held))
            first = [n + (number < n_more) for number in range(len(held))]
            lefts = [left[:, :k] for (_, _, left, _), k in zip(of_pair, first, strict=True)]
            rights = [right[:, :k] for (*_, right), k in zip(of_pair, first, strict=True)]
            bases[b.path], bases[a.path] = torch.cat(lefts, 1), torch.cat(rights, 1).T
        adapted.take_bases(bases)

    return calibrate


def with_directions(directions: Callable[[int], Directions]) -> Calibrate:
    """Return a calibration that takes directions without a gradient."""

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
        adapted.take_bases(bases)

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


def signed(shared: Calibrate) -> Calibrate:
    """Return the calibration whose left vectors have the sign of the own gradient along the directions."""
    return _of_own_gradient(
        shared, lambda along: (torch.diag(_signs(along.diagonal())), torch.eye(len(along)))
    )


def ordered(shared: Calibrate) -> Calibrate:
    """Return the calibration of `signed`, with the directions in the order of the own gradient along them."""

    def turn(along: Tensor) -> tuple[Tensor, Tensor]:
        order = along.diagonal().abs().argsort(descending=True, stable=True)
        eye = torch.eye(len(along))
        return (eye * _signs(along.diagonal()))[:, order], eye[:, order]

    return _of_own_gradient(shared, turn)


def turned(shared: Calibrate, n_own: int) -> Calibrate:
    """Return the calibration whose first directions are the own gradient's within the shared ones' span.

    Such a direction is 2 n numbers for n shared ones, however wide the layer is. The shared ones follow, less
    their part along these, each with the sign of the own gradient along it.
    """

    def turn(along: Tensor) -> tuple[Tensor, Tensor]:
        left, _, right = torch.linalg.svd(along)
        p, q = _completed(left[:, :n_own]), _completed(right.T[:, :n_own])
        return p * _signs((p.T @ along @ q).diagonal()), q

    return _of_own_gradient(shared, turn)


def beside_own(shared: Calibrate, n_own: int) -> Calibrate:
    """Return the calibration whose first directions are the own gradient's, before the shared ones.

    The shared ones are less their part along these, each with the sign of the own gradient along it.
    """

    def calibrate(base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, seed: int) -> None:
        calibrate_on_data(base, adapted, spec, seed)
        own = {a.path: (left[:, :n_own], right[:, :n_own]) for a, _, left, right in _held(adapted, spec)}
        shared(base, adapted, spec, seed)
        bases: dict[str, Tensor] = {}
        for a, b, left, right in _held(adapted, spec):
            first_left, first_right = own[a.path]
            n = left.shape[1]
            scale = spec.rank / spec.alpha
            bases[b.path] = _orthonormal(torch.cat([first_left, left], 1))[:, :n] * scale
            bases[a.path] = _orthonormal(torch.cat([first_right, right], 1))[:, :n].T
        adapted.take_bases(bases)

    return signed(calibrate)


def _of_own_gradient(shared: Calibrate, turn: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Calibrate:
    """Return the calibration that turns shared directions after the own gradient along them.

    Args:    turn: from float32[n, n], the own gradient between left vectors and right ones, to two
             orthogonal float32[n, n] that the left and the right vectors are multiplied by.
    """

    def calibrate(base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, seed: int) -> None:
        shared(base, adapted, spec, seed)
        for batch in _batches(base.train_rows, N_CALIBRATION_BATCHES, seed):
            torch.autograd.backward(causal_loss(adapted.model, batch, batch, bf16=base.bf16))
        bases: dict[str, Tensor] = {}
        for a, b, left, right in _held(adapted, spec):
            gradient = adapted.parameters[b.path].grad  # lora_A has the right vectors as its rows
            assert gradient is not None, b.path
            p, q = turn(left.T @ gradient[:, : left.shape[1]].to(left))
            bases[b.path], bases[a.path] = left @ p, (right @ q).T
        adapted.optimizer.zero_grad()
        adapted.take_bases(bases)

    return calibrate


def _held(adapted: GeneratedAdapter, spec: AdapterSpec) -> Iterator[tuple[Any, Any, Tensor, Tensor]]:
    """Yield for each spectrum its pair of tensors and its left and right vectors, float32[side, n]."""
    held: Any = adapted.generator
    for a, b in spec.pairs:
        if a.path in basis_shapes(adapted.generator.layout):
            yield a, b, held.basis(b.path).clone(), held.basis(a.path).T.clone()


def _completed(first: Tensor) -> Tensor:
    """Return an orthogonal float32[n, n] whose first columns are these."""
    return _orthonormal(torch.cat([first, torch.eye(len(first))], 1))[:, : len(first)]


def _orthonormal(columns: Tensor) -> Tensor:
    """Return orthonormal columns, of what each column adds to those before it; none where it adds nothing."""
    kept: list[Tensor] = []
    for column in columns.T:
        rest = column / column.norm()
        for _ in range(2):
            for other in kept:
                rest = rest - other * (other @ rest)
        if len(kept) < len(columns) and rest.norm() > 1e-3:
            kept.append(rest / rest.norm())
    return torch.stack(kept, 1)


def _signs(numbers: Tensor) -> Tensor:
    """Return -1 below 0 and otherwise 1."""
    return torch.where(numbers < 0, -1.0, 1.0)


def _batches(rows: Tensor, n_batches: int, seed: int) -> list[Tensor]:
    chosen = choose_rows(len(rows), BATCH_SIZE, split_seed(seed, "calibration"), n_batches)
    return [rows[numbers] for numbers in chosen]


_COLUMNS = {"gsm8k": ("question=prompt", "answer=completion")}


def _blocks(path: Path, spec: AdapterSpec) -> Tensor:
    """Return a text, or the rows of prompts and answers one after the other, as int64[n_rows, LENGTH]."""
    options = DataOptions((str(path),), columns=_COLUMNS.get(path.parent.name), max_length=LENGTH)
    rows = instruction_splits(options, load_tokenizer(spec.base), seed=0).training
    ids = torch.tensor([token for row in rows for token in row["input_ids"]])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


GENERATORS: Mapping[str, Generated] = {
    "basis": state_method("circuit"),
    "spectral-basis": GENERATED["qpa:spectral"],
    "plan-basis": replace(GENERATED["qpa"], rates=GENERATED["qpa"].rates[1:2]),
}

_NAME = re.compile(r"([a-z-]+):([a-z0-9+-]+?)(-64)?(-signed|-ordered|-(turned|own)-(\d+))?")


def shared_directions(setting: Setting, other_data: Sequence[Path]) -> dict[str, Calibrate]:
    """Return what directions may be of or come from, by name."""
    return {
        "own": calibrate_on_data,
        **{f"kin-{n}": on_kin(setting, n) for n in (8, 32, 128)},
        "1-batch": on_batches(1),
        "2-batches": on_batches(2),
        "32-batches": on_batches(32),
        "other-text": on_texts(other_data[:1], 0),
        "other-texts": on_texts(other_data, 0),
        "mixture": on_texts(other_data[:1], N_CALIBRATION_BATCHES // 2),
        "mixtures": on_texts(other_data, 2),
        **{f"text-{number}": on_texts([path], 0) for number, path in enumerate(other_data, 1)},
        "weights": with_directions(of_weights),
        "random": with_directions(at_random),
    }


def method(name: str, directions: Mapping[str, Calibrate]) -> Generated:
    """Return the method of a name.

    Args:    directions: by their names.
    Raises:  ValueError: there is none.
    """
    found = _NAME.fullmatch(name)
    parts = found[2].split("+") if found else []
    if found is None or found[1] not in GENERATORS or not directions.keys() >= set(parts):
        raise ValueError(f"no method is called {name}; see the head of {Path(__file__).name}")
    generator, calibrate = GENERATORS[found[1]], directions[parts[0]]
    if len(parts) > 1:
        calibrate = joined([directions[part] for part in parts])
    if found[4] == "-signed":
        calibrate = signed(calibrate)
    elif found[4] == "-ordered":
        calibrate = ordered(calibrate)
    elif found[4]:
        calibrate = {"turned": turned, "own": beside_own}[found[5]](calibrate, int(found[6]))
    changed = replace(generator, name=name, calibrate=calibrate)
    if not found[3]:
        return changed
    return MoreDirections(**{field.name: getattr(changed, field.name) for field in fields(changed)})


def slope_share_of(task: Task, calibrate: Calibrate) -> float:
    """Return how steeply the loss falls along directions, as `qpa train` says it of a bank."""
    base, spec = task.base, task.base.inspect(None)
    layout = layout_of(LayoutOptions(generator="state"), spec, spec.provenance)
    adapted = attach_generator(base.load(), spec, make_generator(layout, 0))
    calibrate(base, adapted, spec, 0)
    held: dict[str, Tensor] = {}
    for a, b, left, right in _held(adapted, spec):
        held |= {a.path: right.T, b.path: left}
    (found,) = slope_shares(
        adapted.parameters,
        spec,
        basis_shapes(layout),
        lambda batch: causal_loss(adapted.model, batch, batch, bf16=base.bf16),
        _batches(base.train_rows, N_CALIBRATION_BATCHES, 0),
        [held],
    )
    return found


def main() -> None:
    """Compare the directions."""
    parser = parser_of("Compare the directions that a generator of spectra may have.")
    parser.add_argument(
        "--other-data",
        type=Path,
        action="append",
        required=True,
        help="A text of another kind; may be repeated.",
    )
    parser.add_argument("--slopes", action="store_true", help="Train nothing; say how steep directions are.")
    options = parser.parse_args()
    setting = setting_of(options)
    directions = shared_directions(setting, options.other_data)
    if options.slopes:
        task = load_task(setting)
        for name, calibrate in directions.items():
            print(f"{name:12} {slope_share_of(task, calibrate):6.1%}", flush=True)
        return
    names = options.methods.split(",") if options.methods else [f"basis:{name}" for name in directions]
    run({name: method(name, directions) for name in names}, options)


if __name__ == "__main__":
    main()
