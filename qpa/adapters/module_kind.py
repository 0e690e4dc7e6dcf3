"""Kinds of adapters that are on modules of the base model.

Rules:
1. What a word or a name means is in `qpa.adapters.targets`. Where nothing is asked for, a kind has targets of
   its own.
2. target_modules and target_parameters of the result are the shortest lists of names that together select
   exactly the chosen modules in PEFT.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from qpa.adapters.experts import expert_layers
from qpa.adapters.kind import AdapterKind, PlannedAdapter, Request
from qpa.adapters.targets import (
    ALL_LINEAR,
    WORDS,
    check_name,
    left_out,
    selected,
    shortest_parameter_names,
)
from qpa.errors import OptionError
from qpa.models.linear_layers import Layer, is_selected, selects, shortest_names


class ModuleKind(AdapterKind):
    """A kind of adapter on modules that the user selects.

    Class attributes:
             default_targets: "all-linear", or names, some of which a model has.
             has_one_default: whether the default is the first of the names that a model has, and not all.
             takes_words: whether targets may be words such as "all-linear".
             candidate_words: a name of the modules that may be selected, for error messages.
    """

    default_targets: ClassVar[tuple[str, ...]] = (ALL_LINEAR,)
    has_one_default: ClassVar[bool] = False
    takes_words: ClassVar[bool] = True
    candidate_words: ClassVar[str] = "linear layers"

    @abstractmethod
    def candidates(self, model: Any) -> dict[str, Layer]:
        """Return the modules that the kind can adapt, by path, in the order of the adapter's tensors."""

    @abstractmethod
    def shapes(self, path: str, layer: Layer, rank: int) -> Sequence[tuple[int, int]]:
        """Return the shapes of the tensors of a module, in the order of the kind's roles."""

    def shapes_for(self, path: str, layer: Layer, rank: int, request: Request) -> Sequence[tuple[int, int]]:
        """Return the same for a request; a kind with more options than a rank overrides it."""
        return self.shapes(path, layer, rank)

    def check_rank(self, layers: Mapping[str, Layer], rank: int | None) -> int:
        """Return the rank for some modules.

        Args:    rank: the rank that is asked for; None for the default.
        Raises:  OptionError: it is too large for a module.
        """
        return self.default_rank if rank is None else rank

    def names_of(self, chosen: Sequence[str], paths: Sequence[str]) -> tuple[str, ...]:
        """Return the shortest names that select some modules among all paths."""
        return shortest_names(chosen, paths)

    def weights_of(self, model: Any) -> dict[str, str]:
        """Return the layers that PEFT selects by the path of a parameter, with that path.

        The names of other layers select none of these.
        """
        return {}

    @final
    def plan(self, model: Any, request: Request) -> PlannedAdapter:
        """Choose the modules and return their tensors, see `AdapterKind.plan`."""
        known = self.candidates(model)
        targets = request.targets or self._default_targets(known)
        layers = self._choose(model, known, targets)
        rank = self.check_rank(layers, request.rank)
        alpha = 2 * rank if request.alpha is None else request.alpha
        modules, parameters = self._names(model, list(layers))
        words = [target for target in targets if target in WORDS] if self.takes_words else []
        return PlannedAdapter(
            rank=rank,
            alpha=float(alpha if self.has_alpha else rank),
            tensors=tuple(
                tensor
                for path, layer in layers.items()
                for tensor in self.tensors_of(
                    path,
                    self.shapes_for(path, layer, rank, request),
                    is_embedding=layer.form == "embedding",
                )
            ),
            target_modules=modules,
            target_parameters=parameters,
            left_out=left_out(known, words, model, self.title),
            fan_in_fan_out=any(layer.form == "conv1d" for layer in layers.values()),
        )

    def _names(self, model: Any, chosen: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of modules, and of parameters, that select some layers in PEFT."""
        weights = self.weights_of(model)
        paths = [path for path, _ in model.named_modules()] + list(expert_layers(model))
        parameters = shortest_parameter_names(
            [weights[path] for path in chosen if path in weights],
            [path for path, _ in model.named_parameters()] if weights else (),
        )
        by_module = [path for path in chosen if path not in weights]
        return self.names_of(by_module, [path for path in paths if path not in weights]), parameters

    def _choose(self, model: Any, known: Mapping[str, Layer], targets: Sequence[str]) -> dict[str, Layer]:
        """Return the modules to adapt, by path."""
        for target in targets:
            if target == ALL_LINEAR and not self.takes_words:
                raise OptionError("targets", f"names of blocks with `method` {self.name}", ALL_LINEAR)
            if not self.takes_words or target not in WORDS:
                check_name(target, known, model, candidate_words=self.candidate_words)
        if not self.takes_words:
            return {path: layer for path, layer in known.items() if is_selected(path, targets)}
        return selected(known, targets, model, self.title)

    def _default_targets(self, known: Mapping[str, Layer]) -> tuple[str, ...]:
        if ALL_LINEAR in self.default_targets:
            return self.default_targets
        found = [name for name in self.default_targets if any(selects(name, path) for path in known)]
        if not found:
            expected = f"a model with {', '.join(self.default_targets)}"
            raise OptionError("targets", expected, "none of them", "name what to adapt")
        return tuple(found[:1] if self.has_one_default else found)
