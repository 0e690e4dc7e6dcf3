"""Small circuits of RY layers and CNOT chains: phases, and one matrix for the chain.

In the eigenbasis of its generators a layer of RYs is diagonal. Three facts make that cheap and real:

1. The last qubit's two amplitudes are packed into one complex number, z[h] = psi[2h] + i psi[2h+1]. RY(t)
   on the last qubit is then multiplication by exp(i t/2).
2. RY(t) on another qubit multiplies u+- = (x0 +- i x1) / sqrt(2) by exp(+-i t/2). Let W be the Kronecker
   product of [[1, i], [1, -i]] / sqrt(2) over those qubits, and y = W z. All RYs of a layer together are
   y[h] <- exp(i phi[h]) y[h], phi[h] = 1/2 (t_last + sum_q (+-) t_q), minus where qubit q's bit of h is 1.
3. Between two layers y goes back through W, through the CNOT chain, and through W again: one orthogonal
   real matrix of side 2**n_qubits, the same for all circuits and layers. So a layer of all circuits is one
   matrix product.

The backward pass is the adjoint method in the same basis: dL/dphi = Im(conj(y) lambda), lambda the
cotangent of y after the phases, and dL/dt = 1/2 (+-) dL/dphi, summed; all layers in one contraction.

The matrix has 4**n_qubits entries, so this pays for small circuits only; see `qpa.circuits.sources.exact`.

Source: ours; adjoint differentiation, arXiv 2009.02823.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qpa.circuits.ry_cnot_chain import chain_gather


class DenseChain(torch.autograd.Function):
    """Probabilities float[n_circuits, 2**n_qubits] of angles float[n_circuits, n_layers, n_qubits]."""

    @staticmethod
    def forward(ctx: Any, angles: Tensor) -> Tensor:
        n_layers, n_qubits = angles.shape[1:]
        frame = _frame(n_qubits, angles.device, angles.dtype)
        phi = angles.transpose(0, 1) @ frame.half_signs
        phases = torch.complex(phi.cos(), phi.sin())
        states = torch.empty_like(phases)
        torch.mul(phases[0], frame.start, out=states[0])
        for layer in range(1, n_layers):
            turned = _as_complex(_as_real(states[layer - 1]) @ frame.chain)
            torch.mul(phases[layer], turned, out=states[layer])
        amplitudes = _as_real(states[-1]) @ frame.readout
        ctx.save_for_backward(phases, states, amplitudes)
        return amplitudes.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        phases, states, amplitudes = ctx.saved_tensors
        n_qubits = amplitudes.shape[1].bit_length() - 1
        frame = _frame(n_qubits, amplitudes.device, amplitudes.dtype)
        adjoints = torch.empty_like(states)
        adjoints[-1] = _as_complex((2.0 * cotangent * amplitudes) @ frame.readout.T)
        unturn = phases.conj()
        for layer in range(len(states) - 1, 0, -1):
            before = _as_real(unturn[layer] * adjoints[layer])
            adjoints[layer - 1] = _as_complex(before @ frame.chain.T)
        of_phi = states.real * adjoints.imag - states.imag * adjoints.real
        gradient: Tensor = of_phi @ frame.half_signs.T
        return gradient.transpose(0, 1)


class _Frame(NamedTuple):
    """Constants of a number of qubits, n_half = 2**(n_qubits - 1).

    half_signs float[n_qubits, n_half] gives phi from the angles; start is y of |0..0>, the same number
    everywhere; chain and readout float[2 * n_half, 2 * n_half] take y (re and im interleaved, one row for
    each circuit) through the CNOT chain to the next layer's y, or to the amplitudes.
    """

    half_signs: Tensor
    start: float
    chain: Tensor
    readout: Tensor


@lru_cache(maxsize=32)
def _frame(n_qubits: int, device: torch.device, dtype: torch.dtype) -> _Frame:
    n_half = 2 ** (n_qubits - 1)
    index = torch.arange(2 * n_half)
    to_y = torch.ones(1, 1, dtype=torch.complex128)
    single = torch.tensor([[1, 1j], [1, -1j]], dtype=torch.complex128) / 2**0.5
    for _ in range(n_qubits - 1):
        to_y = torch.kron(to_y, single)
    y_of_basis = torch.eye(
        2 * n_half, dtype=torch.float64
    )  # each row is a basis vector of y, with re and im interleaved
    readout = _as_real(_as_complex(y_of_basis) @ to_y.conj())[:, chain_gather(n_qubits)]
    chain = _as_real(_as_complex(readout) @ to_y.T)
    bits = (index[:n_half, None] >> torch.arange(n_qubits - 2, -1, -1)) & 1
    signs = torch.cat((1 - 2 * bits, torch.ones(n_half, 1, dtype=torch.int64)), dim=1)
    half_signs = 0.5 * signs.T.to(torch.float64)
    half_signs, chain, readout = (t.to(device, dtype).contiguous() for t in (half_signs, chain, readout))
    return _Frame(half_signs, n_half**-0.5, chain, readout)


def _as_complex(pairs: Tensor) -> Tensor:
    """View float[n, 2 * m] as complex[n, m]."""
    return torch.view_as_complex(pairs.contiguous().view(len(pairs), -1, 2))


def _as_real(numbers: Tensor) -> Tensor:
    """View complex[n, m] as float[n, 2 * m]."""
    return torch.view_as_real(numbers.contiguous()).flatten(1)
