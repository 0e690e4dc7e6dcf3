"""The peers, as PEFT implements them: each is a PEFT config, three learning rates, and the sizes it can have.

`exports_to_lora` follows one rule: delta W is a matrix of its own whose rank is bounded by the configuration,
and by no more than 64, a rank that servers of LoRA adapters load. Methods that scale, rotate or sparsely
change the whole weight give a matrix of full rank, and no small LoRA carries that.
"""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from qpa.bench.method import Attached, BenchBase, Configuration
from qpa.errors import one_sentence

MAX_SERVED_RANK = 64
Knobs = dict[str, int]
_SMALL_RANKS = (*range(1, 9), 10, 12, 16)
_EVEN_RANKS = (2, 4, 6, 8, 10, 12, 16)
_BLOCK_SIZES = (2, 4, 8, 16, 32, 64)


class Shapes(NamedTuple):
    """The adapted modules in numbers: how many, their sides added up, and a divisor of all sides."""

    n_modules: int
    n_inputs: int
    n_outputs: int
    divisor: int


Candidates = Callable[[Shapes, int], Iterable[Knobs]]
Options = Callable[[Knobs, int], dict[str, Any]]
DeltaRank = Callable[[Knobs], int | None]


@dataclass(frozen=True)
class PeftMethod:
    """A method of PEFT.

    Args:    name: as on the command line.
             rates: learning rates of AdamW.
             config: name of the config class in `peft`.
             options: the config's fields, from the knobs and a seed.
             candidates: knobs worth building for a budget.
             delta_rank: bound of delta W's rank; None where only the weight's own sides bound it.
    """

    name: str
    rates: tuple[float, float, float]
    config: str
    options: Options
    candidates: Candidates
    delta_rank: DeltaRank

    def sizes(self, base: BenchBase, budgets: Sequence[int]) -> Sequence[Configuration]:
        """Build every candidate without weights and count what it trains; print which cannot be built."""
        shapes = _shapes(base)
        knobs = {tuple(sorted(k.items())): k for budget in budgets for k in self.candidates(shapes, budget)}
        empty = base.load().to("meta")
        found, refused = [], []
        for candidate in knobs.values():
            try:
                n_trained = self._count(base, empty, candidate)
            except Exception as error:  # each tuner refuses what it cannot do with a type of its own
                refused.append((_label(candidate), error))
                continue
            found.append(Configuration(_label(candidate), tuple(candidate.items()), n_trained))
        if refused:
            _say_refused(self.name, refused)
        return sorted(found, key=lambda configuration: configuration.n_trained)

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Wrap a fresh model in PEFT, with all that is trained in float32.

        Args:    rate: peak learning rate of AdamW.
                 seed: of the adapter's initial values and fixed random parts.
        """
        knobs = {name: int(value) for name, value in configuration.knobs}
        torch.manual_seed(seed)
        model = self._wrap(base, base.load(), knobs, seed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        rank = self.delta_rank(knobs)
        return Attached(model, optimizer, _saver(model), rank is not None and rank <= MAX_SERVED_RANK)

    def _count(self, base: BenchBase, empty: Any, knobs: Knobs) -> int:
        model = self._wrap(base, copy.deepcopy(empty), knobs, seed=0)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def _wrap(self, base: BenchBase, model: Any, knobs: Knobs, seed: int) -> Any:
        import peft

        kind = getattr(peft, self.config)
        known = {field.name for field in fields(kind)}
        common = {name: value for name, value in _common_options(base).items() if name in known}
        with _no_advice():
            return peft.get_peft_model(model, kind(**common, **self.options(knobs, seed)))


def _common_options(base: BenchBase) -> dict[str, Any]:
    """Return the fields that depend on the model only; a config has those it needs."""
    spec = base.inspect(1)
    return {
        "target_modules": list(spec.target_modules),
        "fan_in_fan_out": spec.fan_in_fan_out,
    }


def _shapes(base: BenchBase) -> Shapes:
    pairs = base.inspect(1).pairs
    inputs, outputs = [a.shape[1] for a, _ in pairs], [b.shape[0] for _, b in pairs]
    return Shapes(len(inputs), sum(inputs), sum(outputs), math.gcd(*inputs, *outputs))


def _label(knobs: Knobs) -> str:
    return ", ".join(f"{name}={value}" for name, value in knobs.items()) or "its only size"


def _say_refused(name: str, refused: list[tuple[str, Exception]]) -> None:
    labels = "; ".join(label for label, _ in refused)
    reason = one_sentence(refused[0][1], limit=120)
    print(f"note: {name} cannot be built at {labels}: {reason}", file=sys.stderr)


def _no_advice() -> warnings.catch_warnings[None]:
    """Keep PEFT's advice on choices made here on purpose off the terminal."""
    return warnings.catch_warnings(action="ignore")


def _saver(model: Any) -> Callable[[Any], None]:
    def save(directory: Any) -> None:
        with _no_advice():
            # "auto" would ask the Hub for the base's vocabulary.
            model.save_pretrained(directory, save_embedding_layers=False)

    return save


def _ranks(name: str, values: Sequence[int] = _SMALL_RANKS) -> Candidates:
    """Offer the same few values of one knob at every budget."""
    return lambda shapes, budget: ({name: value} for value in values)


def _per_module(name: str) -> Candidates:
    """Offer the value that meets the budget when each module trains this many numbers."""
    return lambda shapes, budget: [{name: max(1, round(budget / shapes.n_modules))}]


def _vera_ranks(shapes: Shapes, budget: int) -> list[Knobs]:
    """Return the ranks at which modules train one number for every output and one for every rank."""
    return [{"r": max(1, round((budget - shapes.n_outputs) / shapes.n_modules))}]


def _vector_banks(shapes: Shapes, budget: int) -> Iterable[Knobs]:
    """Offer banks of the longest vectors that divide every side, as many as the budget pays logits for."""
    for rank in (1, 2, 4):
        n_logits = rank * (shapes.n_inputs + shapes.n_outputs) // shapes.divisor
        n_vectors = round(budget / (n_logits + shapes.divisor))
        if n_vectors >= 2:
            yield {"r": rank, "num_vectors": n_vectors, "vector_length": shapes.divisor}


def _kronecker_factors(shapes: Shapes, budget: int) -> Iterable[Knobs]:
    return ({"decompose_factor": factor, "r": rank} for factor in (1, 2, 4, 8) for rank in (1, 2, 3, 4, 6, 8))


def _core_ranks(shapes: Shapes, budget: int) -> list[Knobs]:
    """Return the ranks r at which modules train about r (r - 1) / 2 + 2 r numbers."""
    ideal = math.isqrt(max(1, 2 * budget // shapes.n_modules))
    return [{"r": rank} for rank in range(max(2, ideal - 2), ideal + 2)]


def _tinylora(name: str, tying: float, rates: tuple[float, float, float] = (1e-2, 3e-2, 1e-1)) -> PeftMethod:
    """Return TinyLoRA in which this share of the modules has no vector of its own; with 1, all share one."""

    def candidates(shapes: Shapes, budget: int) -> list[Knobs]:
        n_vectors = max(1, round(shapes.n_modules * (1 - tying)))
        return [{"u": max(1, round(budget / n_vectors))}]

    def options(knobs: Knobs, seed: int) -> dict[str, Any]:
        return {
            "r": 2,
            "u": knobs["u"],
            "weight_tying": tying,
            "projection_seed": seed,
            "save_projection": False,
        }

    return PeftMethod(name, rates, "TinyLoraConfig", options, candidates, lambda knobs: 2)


def _rank(knobs: Knobs) -> int | None:
    return knobs["r"]


def _full(knobs: Knobs) -> int | None:
    return None


_METHODS = (
    PeftMethod(
        "lora",
        (3e-3, 1e-2, 3e-2),
        "LoraConfig",
        lambda k, seed: {"r": k["r"], "lora_alpha": 2 * k["r"]},
        _ranks("r"),
        _rank,
    ),
    PeftMethod(
        "vera",
        (3e-2, 1e-1, 3e-1),
        "VeraConfig",
        lambda k, seed: {"r": k["r"], "projection_prng_key": seed, "save_projection": False},
        _vera_ranks,
        _rank,
    ),
    PeftMethod(
        "vblora",
        (1e-2, 3e-2, 1e-1),
        "VBLoRAConfig",
        lambda k, seed: {**k, "topk": 2},
        _vector_banks,
        _rank,
    ),
    PeftMethod(
        "lokr",
        (1e-2, 3e-2, 1e-1),
        "LoKrConfig",
        lambda k, seed: {**k, "alpha": k["r"]},
        _kronecker_factors,
        lambda k: 2 * k["decompose_factor"] * k["r"],  # PEFT leaves a factor of side up to 2 r undecomposed
    ),
    PeftMethod(
        "loha",
        (1e-2, 3e-2, 1e-1),
        "LoHaConfig",
        lambda k, seed: {"r": k["r"], "alpha": k["r"]},
        _ranks("r"),
        lambda k: k["r"] ** 2,
    ),
    PeftMethod(
        "unilora",
        (1e-2, 3e-2, 1e-1),
        "UniLoraConfig",
        lambda k, seed: {"r": 4, "theta_d_length": k["theta_d_length"], "proj_seed": seed},
        lambda shapes, budget: [{"theta_d_length": budget}],
        lambda k: 4,
    ),
    PeftMethod(
        "fourierft",
        (1e-2, 3e-2, 1e-1),
        "FourierFTConfig",
        lambda k, seed: {"n_frequency": k["n_frequency"], "random_loc_seed": seed, "init_weights": True},
        _per_module("n_frequency"),
        _full,
    ),
    PeftMethod(
        "waveft",
        (3e-4, 1e-3, 3e-3),
        "WaveFTConfig",
        lambda k, seed: {"n_frequency": k["n_frequency"], "random_loc_seed": seed},
        _per_module("n_frequency"),
        _full,
    ),
    PeftMethod(
        "randlora",
        (1e-3, 3e-3, 1e-2),
        "RandLoraConfig",
        lambda k, seed: {"r": k["r"], "projection_prng_key": seed, "save_projection": False},
        _ranks("r", (1, 2, 3, 4, 6, 8, 12, 16, 22, 32, 43, 64, 96, 128)),
        _full,
    ),
    PeftMethod(
        "psoft",
        (3e-3, 1e-2, 3e-2),
        "PsoftConfig",
        lambda k, seed: {"r": k["r"], "psoft_alpha": k["r"], "random_seed": seed},
        _core_ranks,
        _rank,
    ),
    PeftMethod(
        "oft",
        (1e-2, 3e-2, 1e-1),
        "OFTConfig",
        lambda k, seed: {"oft_block_size": k["oft_block_size"]},
        _ranks("oft_block_size", _BLOCK_SIZES),
        _full,
    ),
    PeftMethod(
        "hra", (3e-2, 1e-1, 3e-1), "HRAConfig", lambda k, seed: dict(k), _ranks("r", _EVEN_RANKS), _rank
    ),
    PeftMethod("miss", (3e-3, 1e-2, 3e-2), "MissConfig", lambda k, seed: dict(k), _ranks("r"), _rank),
    _tinylora("tinylora", 0.0, (1e-3, 3e-3, 1e-2)),
    _tinylora("tinylora:0.5", 0.5),
    _tinylora("tinylora:0.8", 0.8),
    _tinylora("tinylora:0.9", 0.9),
    _tinylora("tinylora:tied", 1.0),
    PeftMethod("hira", (3e-2, 1e-1, 3e-1), "HiraConfig", lambda k, seed: dict(k), _ranks("r"), _full),
)

PEFT_METHODS: dict[str, PeftMethod] = {method.name: method for method in _METHODS}
