"""Whether circuits that start near a target train better than those that start as the generator has them.

The generator of one state (`qpa.generators.state`), whose angles start at a fit of what ten free steps, with
a number for each direction, give as coefficients. The scale starts at 0, as always, so that the adapter
changes nothing at first. Basis states to which no direction belongs have the mean coefficient in the target,
so that no angle is spent on them. A method is called `warm:` and one of these:

    start-uniform         the generator as it is: the state starts uniform
    mps-1, mps-2, mps-4   the target is compressed to a matrix product state of bond dimension 1, 2 or 4
    exact                 the target is not compressed

    python -m benchmarks.warm_start --model <stories260K> --data <tinyshakespeare input.txt> \\
        --budgets 133 --out docs/results/warm

The aligned generator (`qpa.generators.aligned`), whose angles start at random, in the same way: ten free
steps train the adapter's own numbers; in every group of chunks, what the chunks have become is a matrix, a
row for each chunk, and its first singular vectors on the side of the chunks are the features with which as
many circuits would decode it best. Circuit k starts at a fit of the k-th of all groups, and the decoders
start at 0. The methods are called `warm-aligned:` and "start-random", "mps-2", "mps-8" or "exact":

    python -m benchmarks.warm_start --model <stories260K> --data <tinyshakespeare input.txt> \\
        --budgets 2472 --methods warm-aligned:start-random,warm-aligned:mps-2,warm-aligned:exact \\
        --out docs/results/warm

For every fit a line on standard error tells the fidelity of the compressed target to the target, that of the
circuit to the compressed target, and the cosine between what is wanted and the circuit's features, beside
that of the start without the fit: of one state, of the coefficients and a constant.

Source: arXiv 2208.13673 for the warm start; the target is ours.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.matrix_product import fit_angles, to_matrix_product, to_vector
from benchmarks.own_methods import parser_of, run
from benchmarks.state_variants import _free_features
from qpa.adapters.attach import adapter_parameters, attach_adapter
from qpa.adapters.parameter_view import leaf_of
from qpa.bench.generated import GENERATED, STATE_RATES, Generated, sized_plans, state_method, with_seed
from qpa.bench.method import Attached, BenchBase, Configuration
from qpa.bench.trial import batches
from qpa.documents import ChunkGroup, WeightLayout
from qpa.generators.layout_options import LayoutOptions
from qpa.serve.features import FEATURE_EPSILON
from qpa.training.evaluation import causal_loss
from qpa.training.optimizer import GeneratedAdapterOptimizer
from qpa.training.plain_step import take_step

BONDS = (1, 2, 4)
BONDS_OF_ALIGNED = (2, 8)
RATES_OF_ALIGNED = (3e-3, 1e-2, 3e-2)
N_STARTS = 2
N_FREE_STEPS, FREE_RATE = 10, 1e-2
"""Steps that train the adapter's own numbers before the aligned generator starts, and their rate."""


@dataclass(frozen=True)
class Warm(Generated):
    """The generator whose angles start at a fit of the coefficients after a few free steps.

    Args:    bond: the bond dimension of the target; None for the target as it is.
    """

    bond: int | None = None

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Take free steps, fit the angles to what they give, and leave the scale at zero."""
        coefficients = _free_features(base, seed).double()
        attached = super().attach(base, configuration, rate=rate, seed=seed)
        optimizer = cast(GeneratedAdapterOptimizer, attached.optimizer)
        generator: Any = optimizer.generator
        ansatz, states = generator.layout.ansatz, torch.tensor(generator.layout.states)
        wanted = amplitudes_of(coefficients, states, ansatz.n_qubits)
        target = wanted if self.bond is None else to_vector(to_matrix_product(wanted, self.bond))
        fit = fit_angles(ansatz, target.square(), seed, N_STARTS)
        with torch.no_grad():
            generator.chunk_features.angles.copy_(fit.angles)
        optimizer.push_forward()
        with torch.no_grad():
            found = generator.features(generator.run())[states, 0].double()
        print(
            f"{self.name} {configuration.label} seed {seed}: target {float(wanted @ target.abs()) ** 2:.4f}, "
            f"circuit {fit.fidelity:.4f}, cosine {float(cosine_similarity(found, coefficients, dim=0)):.4f} "
            f"(uniform {float(cosine_similarity(torch.ones_like(found), coefficients, dim=0)):.4f})",
            file=sys.stderr,
        )
        return attached


@dataclass(frozen=True)
class WarmAligned(Generated):
    """The aligned generator whose circuits start at what a few free steps make of the chunks.

    Args:    bond: the bond dimension of the targets; None for the targets as they are.
    """

    bond: int | None = None

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Take free steps, fit the angles to what they give, and leave the decoders at zero."""
        attached = super().attach(base, configuration, rate=rate, seed=seed)
        optimizer = cast(GeneratedAdapterOptimizer, attached.optimizer)
        generator: Any = optimizer.generator
        layout: WeightLayout = generator.layout
        states = torch.tensor(layout.states)
        wanted = self._wanted(base, layout, seed)
        with torch.no_grad():
            start = generator.features(generator.run()).double()
        for number, one in enumerate(wanted.T):
            features = _on_states(one, states, start[:, number])
            root = _roots_of(features, generator.chunk_features.mean)
            target = root if self.bond is None else to_vector(to_matrix_product(root, self.bond)).abs()
            fit = fit_angles(layout.ansatz, target.square(), seed, N_STARTS)
            with torch.no_grad():
                generator.chunk_features.angles[number] = fit.angles
                found = generator.features(generator.run())[states, number].double()
            print(
                f"{self.name} {configuration.label} seed {seed} circuit {number}: "
                f"target {float(root @ target) ** 2:.4f}, circuit {fit.fidelity:.4f}, "
                f"cosine {float(cosine_similarity(found, one, dim=0)):.4f} "
                f"(random {float(cosine_similarity(start[states, number], one, dim=0)):.4f})",
                file=sys.stderr,
            )
        optimizer.push_forward()
        return attached

    def _wanted(self, base: BenchBase, layout: WeightLayout, seed: int) -> Tensor:
        """Return float64[n_chunks, n_circuits]: group by group the first left singular vectors of chunks."""
        spec = with_seed(base.inspect(self.rank, self.adapter), seed)
        model = attach_adapter(base.load(), spec)
        parameters = adapter_parameters(model, spec)
        before = {path: parameter.detach().clone() for path, parameter in parameters.items()}
        leaves = list(dict.fromkeys(leaf_of(parameter) for parameter in parameters.values()))
        optimizer = torch.optim.AdamW(leaves, lr=FREE_RATE, weight_decay=0.0)
        for rows in batches(base.train_rows, 8, N_FREE_STEPS, seed):
            rows = rows.to(next(iter(parameters.values())).device)
            take_step(optimizer, causal_loss(model, rows, rows, bf16=base.bf16))
        moved = {path: (p.detach() - before[path]).double().cpu() for path, p in parameters.items()}
        return torch.cat([_left_singular(group, moved, layout.n_circuits) for group in layout.groups])


def _left_singular(group: ChunkGroup, moved: Mapping[str, Tensor], n: int) -> Tensor:
    """Return float64[n_chunks, n]: the first left singular vectors of a group's chunks, each of norm 1."""
    chunks = torch.zeros(group.n_chunks, group.chunk_size, dtype=torch.float64)
    for tensor in group.tensors:
        vectors = moved[tensor.path] if group.axis == "row" else moved[tensor.path].mT
        chunks[list(tensor.chunks)] = vectors[: len(tensor.chunks)]
    left: Tensor = torch.linalg.svd(chunks, full_matrices=False).U
    return left[:, :n]


def _on_states(one: Tensor, states: Tensor, start: Tensor) -> Tensor:
    """Return float64[2**n_qubits]: `one` on the states of chunks, as large as the feature at the start."""
    features = torch.zeros_like(start)
    features[states] = one * (start[states].norm() / one.norm())
    return features


def _roots_of(features: Tensor, mean: float) -> Tensor:
    """Return amplitudes, of norm 1 and not negative, whose features are nearest to those that are wanted.

    A feature is sqrt(p 2**n_qubits + eps) - mean, so one below sqrt(eps) - mean has the probability 0. The
    sum of all p is made 1 by a factor.
    """
    root = (features + mean).clamp(min=math.sqrt(FEATURE_EPSILON))
    return torch.nn.functional.normalize(torch.sqrt(root.square() - FEATURE_EPSILON), dim=0)


def amplitudes_of(coefficients: Tensor, states: Tensor, n_qubits: int) -> Tensor:
    """Return the amplitudes of which the features are coefficients, up to a factor.

    With f = sqrt(p 2**n_qubits + eps) - sqrt(eps) = k c, the sum of all p is 1 for one k above 0.

    Args:    coefficients: float64[n_directions], not negative and not all 0.
             states: int64[n_directions], the basis state of each; the others have the mean coefficient.
    Returns: float64[2**n_qubits], of norm 1, not negative.
    """
    c = coefficients.mean().expand(2**n_qubits).clone()
    c[states] = coefficients
    root = math.sqrt(FEATURE_EPSILON)
    square, linear = float(c @ c), 2 * root * float(c.sum())
    k = (math.sqrt(linear**2 + 4 * square * len(c)) - linear) / (2 * square)
    return torch.sqrt(k * c * (k * c + 2 * root) / len(c))


def methods() -> dict[str, Generated]:
    """Return the start as it is, and the warm ones."""
    state = LayoutOptions(generator="state")
    found: list[Generated] = [replace(state_method("circuit"), name="warm:start-uniform")]
    found += [Warm(f"warm:mps-{bond}", state, sized_plans, STATE_RATES, bond=bond) for bond in BONDS]
    found.append(Warm("warm:exact", state, sized_plans, STATE_RATES))
    aligned = replace(GENERATED["qpa:aligned"], name="warm-aligned:start-random", rates=RATES_OF_ALIGNED)
    found.append(aligned)
    options: dict[str, Any] = {field.name: getattr(aligned, field.name) for field in fields(aligned)}
    for name, bond in ((f"mps-{bond}", bond) for bond in BONDS_OF_ALIGNED):
        found.append(WarmAligned(**options | {"name": f"warm-aligned:{name}"}, bond=bond))
    found.append(WarmAligned(**options | {"name": "warm-aligned:exact"}))
    return {method.name: method for method in found}


def main() -> None:
    """Compare the starts."""
    run(methods(), parser_of("Compare starts of the generator of one state.").parse_args())


if __name__ == "__main__":
    main()
