"""An adapter kind from outside: BitFit, a trained bias behind every linear layer (arXiv 2106.10199)."""

from __future__ import annotations

from functools import partial

import torch

from qpa.adapters.hooked_model import HookedModel
from qpa.adapters.module_kind import ModuleKind
from qpa.documents import Role, TensorRules
from qpa.models.linear_layers import linear_layers, submodule

BIAS = Role("bias_delta", "column", has_rank=False)


def any_length(shapes, rank):
    pass


class BitFit(ModuleKind):
    """bias_delta [out, 1] is added to what a linear layer returns."""

    name = "bitfit"
    title = "BitFit"
    rules = TensorRules(roles=(BIAS,), check=any_length)
    default_rank = 1
    has_rank = False
    formats = ("onnx",)
    rate = 3e-2

    def words(self, rank):
        return self.title

    def phrase(self, rank):
        return f"a {self.title}"

    def candidates(self, model):
        return linear_layers(model)

    def shapes(self, path, layer, rank):
        return ((layer.n_out, 1),)

    def wrap(self, model, spec):
        wrapped = HookedModel(model)
        for tensor in spec.tensors:
            module = wrapped.module_for(tensor.module, tensor.role)
            bias = torch.zeros(tensor.shape, device=module.weight.device)
            module.register_parameter(tensor.role, torch.nn.Parameter(bias))
            wrapped.change_output(module, partial(_with_bias, tensor.role))
        return wrapped

    def parameter_name(self, tensor, modules):
        return f"model.{tensor.path}"

    def put_into(self, model, arrays):
        for tensor in arrays.frozen.tensors:
            module = submodule(model, tensor.module)
            bias = torch.from_numpy(arrays.read(tensor.path)).flatten()
            module.bias = torch.nn.Parameter(bias if module.bias is None else module.bias.detach() + bias)


def _with_bias(role, module, output):
    return output + module.get_parameter(role).flatten().to(output.dtype)
