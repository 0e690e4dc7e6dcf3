"""Aer, Qiskit's simulator with noise, as a sampler."""

from __future__ import annotations

from typing import Any


def aer_sampler(seed: int, **options: Any) -> Any:
    """Return a sampler that draws from a seed.

    Args:    seed: below 2**31.
             options: of `AerSimulator`.
    """
    from qiskit_aer.primitives import SamplerV2

    return SamplerV2(seed=seed, options={"backend_options": options})
