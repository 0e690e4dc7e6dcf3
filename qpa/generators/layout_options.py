"""What a user may ask of a layout: the options of plan-layout, as the generators see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpa.adapters.matrix_product import bond_dimension_option
from qpa.circuits.ansatz import ANSATZE
from qpa.pipeline.options import defaults_by_name, option

if TYPE_CHECKING:
    from qpa.generators.features.kind import FeatureKind
    from qpa.generators.generator import GeneratorKind
    from qpa.registry import Registry

ALL = "all"
NONE = "none"

CONTEXTS = {
    "task": "a trained vector for each source of the data",
    "prompt": "what the base model makes of a text",
}
"""The kinds of contexts, in words; `qpa.generators.fast_weights` says what they do."""


def _generators() -> Registry[GeneratorKind]:
    from qpa.generators.generator import GENERATORS

    return GENERATORS


def _features() -> Registry[FeatureKind]:
    from qpa.generators.features.kind import FEATURES

    return FEATURES


def _default_of(field: str) -> Callable[[], str]:
    """Return a function that says, by generator, what an option means where it is not given."""

    def words() -> str:
        kinds = {name: _generators()[name].defaults for name in _generators()}
        return defaults_by_name({name: words[field] for name, words in kinds.items() if field in words})

    return words


@dataclass(frozen=True, slots=True)
class LayoutOptions:
    """The options of a layout; a generator refuses those that it does not have.

    Args:    generator: a name in `qpa.generators.generator.GENERATORS`; None means what suits the adapter.
             features: "circuit", or a control in its place: a name in
             `qpa.generators.features.kind.FEATURES`.
             control_size: most numbers that a control trains; None means what suits it.
             ansatz: a name in `qpa.circuits.ansatz.ANSATZE`.
             chunk_size: numbers per chunk of the paper's flat layout; None means 2048.
             qubits: None means as many as the chunks need.
             layers: of every circuit; None means what suits the generator.
             circuits: independent circuits; None means what suits the generator and the adapter.
             vectors: module types that have generated rows and columns besides their directions; or "all",
             "none". The generator of one state takes "all", the default, for "none".
             bond_dimension: of matrix product operators; see `qpa.adapters.matrix_product`.
             max_params: "5000", or "25%" of LoRA r=4: the size follows from it.
             contexts: names of the data's sources, for each of which the features are programmed; None means
             that they are the same for all data.
             context_kind: a name in `CONTEXTS`.
             context_size: numbers of a context.
             spectrum, windows, share_inputs: parts of the default generator, to be left out in ablations.
    """

    generator: str | None = option(
        None,
        help="Generator of the adapter: {choices}.",
        choices=_generators,
        choice_words=lambda name: _generators()[name].words,
        shown_default="what suits the kind of adapter",
    )
    features: str = option(
        "circuit",
        help="What decoders see: {choices}; all but circuit are controls in its place, see docs/method.md.",
        choices=_features,
    )
    control_size: int | None = option(
        None,
        help="Most numbers that a control trains, of those whose size can be chosen.",
        at_least=1,
        shown_default="what suits the control",
    )
    ansatz: str = option(
        "ry-cnot-chain",
        help="Gates of the circuits: {choices}.",
        choices=ANSATZE,
        choice_words=lambda name: ANSATZE[name].words,
    )
    chunk_size: int | None = option(
        None, help="Numbers per chunk of a flat layout.", at_least=1, shown_default=_default_of("chunk_size")
    )
    qubits: int | None = option(
        None, help="Qubits per circuit.", at_least=1, shown_default="as many as the chunks need"
    )
    layers: int | None = option(
        None, help="Layers per circuit.", at_least=1, shown_default=_default_of("layers")
    )
    circuits: int | None = option(
        None,
        help="Independent circuits.",
        at_least=1,
        shown_default=_default_of("circuits"),
        old_names=("heads",),
    )
    vectors: tuple[str, ...] = option(
        (ALL,),
        help="Kinds of layers that get vectors besides directions: all (with state: none), none, or names.",
    )
    bond_dimension: int | None = bond_dimension_option()
    max_params: str | None = option(
        None, help="The most numbers to train, 5000 or 25% of LoRA r=4; circuits and vectors follow."
    )
    contexts: tuple[str, ...] | None = option(
        None,
        help="Names for the sources of the data, for each of which a network programs an adapter.",
        shown_default="one adapter for all data",
    )
    context_kind: str = option(
        "task",
        help="What tells one of `contexts` from the others: {choices}.",
        choices=CONTEXTS,
        choice_words=lambda name: CONTEXTS[name],
    )
    context_size: int = option(4, help="Numbers that tell one of `contexts`.", at_least=1)
    spectrum: bool = option(True, help="Factors of the gradient's singular directions.")
    windows: bool = option(True, help="A start of every circuit on neighbouring layers of its own.")
    share_inputs: bool = option(
        True, help="Rows of A that are shared by the modules that read the same activations."
    )
