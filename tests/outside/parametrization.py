"""A parametrization from outside, all columns of lora_B being one, and a generator that uses it."""

from __future__ import annotations

import torch

from qpa.errors import OptionError
from qpa.generators.generator import GeneratorKind, check_product
from qpa.generators.parametrizations.kind import Parametrization, parametrized, parametrized_layout


class OneColumn(Parametrization):
    """A tensor that is one trained column, as many times as it has columns."""

    name = "one-column"

    def n_parameters(self, shape, sizes):
        return 0, shape[0]

    def build(self, shape, sizes, seeds):
        return Columns(len(seeds), shape)


class Columns(torch.nn.Module):
    def __init__(self, n_tensors, shape):
        super().__init__()
        self.column = torch.nn.Parameter(torch.zeros(n_tensors, shape[0], 1))
        self.n_columns = shape[1]

    def forward(self):
        return self.column.expand(-1, -1, self.n_columns)


class OneColumnKind(GeneratorKind):
    """lora_A stays as it is drawn, and lora_B is one column."""

    name = "one-column"
    words = "one trained column for every lora_B"
    origin = "copies of one trained column"
    needs_product = True

    def check(self, options, spec):
        check_product(spec, self.name)

    def plan(self, options, spec, provenance):
        tensors = tuple(parametrized(b, OneColumn.name) for _, b in spec.pairs)
        return parametrized_layout(self.name, spec, provenance, tensors)

    def sizes(self, options, spec):
        raise OptionError("max_params", "no budget", str(options.max_params))

    def size_words(self, options):
        return self.name

    def rate(self, spec):
        return 5e-3
