"""Whether a circuit that starts near a target trains better than one that starts from the uniform state.

The generator of one state (`qpa.generators.state`), whose angles start at a fit of what ten free steps, with
a number for each direction, give as coefficients. The scale starts at 0, as always, so that the adapter
changes nothing at first. Basis states to which no direction belongs have the mean coefficient in the target,
so that no angle is spent on them. A method is called `warm:` and one of these:

    start-uniform         the generator as it is: the state starts uniform
    mps-1, mps-2, mps-4   the target is compressed to a matrix product state of bond dimension 1, 2 or 4
    exact                 the target is not compressed

    python -m benchmarks.warm_start --model <stories260K> --data <tinyshakespeare input.txt> \\
        --budgets 133 --out docs/results/warm

For every fit a line on standard error tells the fidelity of the compressed target to the target, that of the
circuit to the compressed target, and the cosine between the coefficients and the circuit's features, which
in the uniform state is that of the coefficients and a constant.

Source: arXiv 2208.13673 for the warm start; the target is ours.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.matrix_product import fit_angles, to_matrix_product, to_vector
from benchmarks.own_methods import parser_of, run
from benchmarks.state_variants import _free_features
from qpa.bench.generated import STATE_RATES, Generated, sized_plans, state_method
from qpa.bench.method import Attached, BenchBase, Configuration
from qpa.generators.features.circuit import FEATURE_EPSILON
from qpa.generators.layout_options import LayoutOptions
from qpa.training.optimizer import GeneratedAdapterOptimizer

BONDS = (1, 2, 4)
N_STARTS = 2


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
    return {method.name: method for method in found}


def main() -> None:
    """Compare the starts."""
    run(methods(), parser_of("Compare starts of the generator of one state.").parse_args())


if __name__ == "__main__":
    main()
