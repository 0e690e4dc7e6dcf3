"""Decoders: from the features of a group's chunks to the chunks' numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qpa.documents import Decoder


class LinearDecoder(nn.Module):
    """Linear layers without activation.

    The last layer starts at zero, so the generator's output is exactly zero before the first step.
    Hidden layers start as torch's nn.Linear does, from a seed of their own.

    Source:  arXiv 2410.09846, mapping model of the public code (which has no activation); the zero
             start is ours.
    """

    def __init__(self, decoder: Decoder, seed: int) -> None:
        super().__init__()
        widths = list(zip(decoder.widths, decoder.widths[1:], strict=False))
        self.weights = nn.ParameterList(torch.zeros(n_out, n_in) for n_in, n_out in widths)
        self.biases = nn.ParameterList(torch.zeros(n_out) for _, n_out in widths if decoder.has_bias)
        random = torch.Generator().manual_seed(seed)
        for index, (n_in, _) in enumerate(widths[:-1]):
            for parameter in (self.weights[index], *self.biases[index : index + 1]):
                nn.init.uniform_(parameter, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=random)

    def forward(self, features: Tensor) -> Tensor:
        """Decode float[n_chunks, n_features] to float[n_chunks, chunk_size]."""
        for index, weight in enumerate(self.weights):
            bias = self.biases[index] if len(self.biases) else None
            features = nn.functional.linear(features, weight, bias)
        return features
