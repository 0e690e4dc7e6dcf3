"""A base model with QTHA on linear layers: each adds what a circuit makes of a projection of its input.

A circuit of n qubits with real gates has a state of 2**n real amplitudes. What encodes an input is a product
of states of single qubits; the trained layers are one orthogonal matrix for all tokens. So a token costs one
product with a matrix of 2**n x 2**n, and everything is an operator that ONNX has.

Qubit 0 is the most significant bit of a basis state.

Source: see `qpa.adapters.qtha`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qpa.adapters.hooked_model import HookedModel
from qpa.adapters.matrix_product import MatrixProduct
from qpa.adapters.qtha import ANGLES, DOWN, FUSION, UP, forms
from qpa.documents import TensorRef


@dataclass(frozen=True)
class Weights:
    """The matrices of one layer's adapter.

    Args:    down: float[qubits, in].
             circuit: float[2**qubits, 2**qubits], see `circuit_matrix`.
             signs: float[2**qubits, qubits], see `signs_of`.
             fusion: float[qubits, 2 * qubits]; None where projection and expectations are multiplied.
             up: float[out, qubits].
    """

    down: Tensor
    circuit: Tensor
    signs: Tensor
    fusion: Tensor | None
    up: Tensor


_MATRICES = tuple(field.name for field in fields(Weights))


class QthaModel(HookedModel):
    """A causal language model with a trainable QTHA on linear layers. The last core of each U is to be zero.

    Args:    model: of transformers; changed in place: its own parameters are frozen.
             tensors: those of each adapted module in turn, in the order of the kind's roles.
             n_qubits: of every circuit.
    Raises:  ModelError: the model has no such module.
    """

    def __init__(self, model: Any, tensors: Iterable[TensorRef], n_qubits: int) -> None:
        super().__init__(model)
        device = next(model.parameters()).device
        for path, members in _by_module(tensors).items():
            module = self.module_for(path, ANGLES.name)
            for tensor in members:
                module.register_parameter(tensor.role, Parameter(torch.zeros(tensor.shape, device=device)))
            down, up = forms([tensor.shape for tensor in members], n_qubits)
            self.add_to_output(module, partial(_trained, down, up))


def put_trained(
    model: Any, tensors: Iterable[TensorRef], n_qubits: int, values: Mapping[str, Tensor]
) -> None:
    """Let linear layers of a model add what their trained adapters make of the input.

    The matrices are contracted once, so that a graph of the model has one of each.

    Args:    values: of the tensors, float32, by path.
    Raises:  ModelError: the model has no such module.
    """
    hooked = HookedModel(model)
    for path, members in _by_module(tensors).items():
        module = hooked.module_for(path, ANGLES.name)
        down, up = forms([tensor.shape for tensor in members], n_qubits)
        weights = _contracted(down, up, {tensor.role: values[tensor.path] for tensor in members})
        for name in _MATRICES:
            module.register_buffer(f"qtha_{name}", getattr(weights, name), persistent=False)
        hooked.add_to_output(module, _put)


def circuit_matrix(angles: Tensor) -> Tensor:
    """Return what layers of RY, each followed by a chain of CNOTs, do to a state.

    Args:    angles: float[n_layers, n_qubits], radians.
    Returns: float[2**n_qubits, 2**n_qubits], orthogonal; a column is what becomes of a basis state.
    """
    cosines, sines = torch.cos(angles / 2), torch.sin(angles / 2)
    rotations = torch.stack((cosines, -sines, sines, cosines), dim=-1).view(*angles.shape, 2, 2)
    product, *others = rotations.unbind(1)
    for rotation in others:
        product = (product[:, :, None, :, None] * rotation[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    states = torch.arange(product.shape[1], device=angles.device)
    # The chain takes x to y with y_k = x_0 ^ .. ^ x_k, so row y comes from x = y ^ (y >> 1).
    layers = product[:, states ^ (states >> 1)].unbind(0)
    return reduce(lambda before, layer: layer @ before, layers)


def encoded(angles: Tensor) -> Tensor:
    """Return the states that RY of each angle makes of |0..0>.

    Args:    angles: float[..., n_qubits], radians.
    Returns: float[..., 2**n_qubits].
    """
    qubits = torch.stack((torch.cos(angles / 2), torch.sin(angles / 2)), dim=-1)
    state, *others = qubits.unbind(-2)
    for qubit in others:
        state = (state[..., :, None] * qubit[..., None, :]).flatten(-2)
    return state


def signs_of(circuit: Tensor) -> Tensor:
    """Return what Z of every qubit is in every basis state, 1 or -1.

    Returns: float[2**n_qubits, n_qubits], of the type and on the device of a circuit's matrix.
    """
    n_states = circuit.shape[0]
    places = torch.arange(n_states.bit_length() - 2, -1, -1, device=circuit.device)
    bits = (torch.arange(n_states, device=circuit.device)[:, None] >> places) & 1
    return (1 - 2 * bits).to(circuit.dtype)


def expectations(states: Tensor, circuit: Tensor, signs: Tensor) -> Tensor:
    """Return <Z> of every qubit behind a circuit.

    Args:    states: float[..., 2**n_qubits], before the circuit.
             circuit, signs: see `circuit_matrix` and `signs_of`.
    Returns: float[..., n_qubits], each from -1 to 1.
    """
    return (states @ circuit.T).square() @ signs


def added(weights: Weights, inputs: Tensor) -> Tensor:
    """Return what a layer adds to its output.

    Args:    inputs: float[..., in], of any type.
    Returns: float[..., out].
    """
    features = inputs.to(weights.down.dtype) @ weights.down.T
    read = expectations(encoded(features), weights.circuit, weights.signs)
    if weights.fusion is None:
        return (features * read) @ weights.up.T
    return torch.cat((features, read), dim=-1) @ weights.fusion.T @ weights.up.T


def _trained(down: MatrixProduct, up: MatrixProduct, module: Any, inputs: Tensor) -> Tensor:
    return added(_contracted(down, up, dict(module.named_parameters(recurse=False))), inputs)


def _put(module: Any, inputs: Tensor) -> Tensor:
    return added(Weights(**{name: getattr(module, f"qtha_{name}") for name in _MATRICES}), inputs)


def _contracted(down: MatrixProduct, up: MatrixProduct, tensors: Mapping[str, Tensor]) -> Weights:
    """Return the matrices of tensors by their roles."""
    circuit = circuit_matrix(tensors[ANGLES.name])
    return Weights(
        down=down.matrix([tensors[role.name] for role in DOWN]),
        circuit=circuit,
        signs=signs_of(circuit),
        fusion=tensors.get(FUSION.name),
        up=up.matrix([tensors[role.name] for role in UP]),
    )


def _by_module(tensors: Iterable[TensorRef]) -> dict[str, Sequence[TensorRef]]:
    """Return the tensors of each module, in their order."""
    members: dict[str, list[TensorRef]] = {}
    for tensor in tensors:
        members.setdefault(tensor.module, []).append(tensor)
    return {**members}
