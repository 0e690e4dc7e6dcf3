"""Kinds of adapters that are on modules of the base model, and how a user's words select the modules.

Rules:
1. "all-linear" is every linear layer of the language model except the output head; names select by the last
   components of a module's path, as PEFT does, and may select the head. Several targets add up.
2. Where nothing is asked for, a kind has targets of its own.
3. A name that selects nothing, and fused experts that would be left out in silence, are refused.
4. target_modules of the result is the shortest list of names that selects exactly the chosen modules in PEFT.
"""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from qpa.adapters.experts import expert_layers, refuse_left_out
from qpa.adapters.kind import AdapterKind, PlannedAdapter, Request
from qpa.errors import ModelError, OptionError
from qpa.models.linear_layers import (
    Layer,
    head_path,
    is_selected,
    last_component,
    layer_of,
    selects,
    shortest_names,
)

ALL_LINEAR = "all-linear"


class ModuleKind(AdapterKind):
    """A kind of adapter on modules that the user selects.

    Class attributes:
             default_targets: "all-linear", or names, some of which a model has.
             has_one_default: whether the default is the first of the names that a model has, and not all.
             takes_all: whether "all-linear" may be asked for.
             candidate_words: a name of the modules that may be selected, for error messages.
    """

    default_targets: ClassVar[tuple[str, ...]] = (ALL_LINEAR,)
    has_one_default: ClassVar[bool] = False
    takes_all: ClassVar[bool] = True
    candidate_words: ClassVar[str] = "linear layers"

    @abstractmethod
    def candidates(self, model: Any) -> dict[str, Layer]:
        """Return the modules that the kind can adapt, by path, in the order of the adapter's tensors."""

    @abstractmethod
    def shapes(self, path: str, layer: Layer, rank: int) -> Sequence[tuple[int, int]]:
        """Return the shapes of the tensors of a module, in the order of the kind's roles."""

    def check_rank(self, layers: Mapping[str, Layer], rank: int | None) -> int:
        """Return the rank for some modules.

        Args:    rank: the rank that is asked for; None for the default.
        Raises:  OptionError: it is too large for a module.
        """
        return self.default_rank if rank is None else rank

    def names_of(self, chosen: Sequence[str], paths: Sequence[str]) -> tuple[str, ...]:
        """Return the shortest names that select some modules among all paths."""
        return shortest_names(chosen, paths)

    @final
    def plan(self, model: Any, request: Request) -> PlannedAdapter:
        """Choose the modules and return their tensors, see `AdapterKind.plan`."""
        layers = self._choose(model, request)
        rank = self.check_rank(layers, request.rank)
        alpha = 2 * rank if request.alpha is None else request.alpha
        paths = [path for path, _ in model.named_modules()] + list(expert_layers(model))
        return PlannedAdapter(
            rank=rank,
            alpha=float(alpha if self.has_alpha else rank),
            tensors=tuple(
                tensor
                for path, layer in layers.items()
                for tensor in self.tensors_of(
                    path, self.shapes(path, layer, rank), is_embedding=layer.form == "embedding"
                )
            ),
            target_modules=self.names_of(list(layers), paths),
            fan_in_fan_out=any(layer.form == "conv1d" for layer in layers.values()),
        )

    def _choose(self, model: Any, request: Request) -> dict[str, Layer]:
        """Return the modules to adapt, by path."""
        known, head = self.candidates(model), head_path(model)
        targets = request.targets or self._default_targets(known)
        for target in targets:
            self._check_target(target, known, model)
        takes_all = ALL_LINEAR in targets
        if takes_all:
            refuse_left_out(model, known)
        chosen = {
            path: layer
            for path, layer in known.items()
            if (takes_all and path != head and layer.form != "embedding") or is_selected(path, targets)
        }
        if not chosen:
            raise ModelError(model.name_or_path, "at least one linear layer to adapt", "none")
        return chosen

    def _default_targets(self, known: Mapping[str, Layer]) -> tuple[str, ...]:
        if ALL_LINEAR in self.default_targets:
            return self.default_targets
        found = [name for name in self.default_targets if any(selects(name, path) for path in known)]
        if not found:
            expected = f"a model with {', '.join(self.default_targets)}"
            raise OptionError("targets", expected, "none of them", "name what to adapt")
        return tuple(found[:1] if self.has_one_default else found)

    def _check_target(self, target: str, known: Mapping[str, Layer], model: Any) -> None:
        """Check that a target selects modules that the kind can adapt."""
        if target == ALL_LINEAR:
            if self.takes_all:
                return
            raise OptionError("targets", f"names of blocks with `method` {self.name}", ALL_LINEAR)
        if any(selects(target, path) for path in known):
            return
        matched = [module for path, module in model.named_modules() if selects(target, path)]
        expected = f"names of {self.candidate_words}" if matched else "names that match modules"
        names = sorted({last_component(path) for path in known if known[path].form != "embedding"})
        close = difflib.get_close_matches(target, names, n=3, cutoff=0.3)
        advice = "the nearest names are " + ", ".join(close or names[:8])
        raise OptionError("targets", expected, f"{target}, {_what_matched(matched)}", advice)


def _what_matched(modules: Sequence[Any]) -> str:
    """Return what a name selects instead of modules that can be adapted, as a clause."""
    if not modules:
        return "which matches no layer"
    forms = {layer.form for layer in map(layer_of, modules) if layer is not None}
    if "embedding" in forms:
        return "which is an embedding; LoRA alone adapts an embedding, that of the tokens"
    if forms:
        return "which is a layer outside the language model"
    return "which is no linear layer"
