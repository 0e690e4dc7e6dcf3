"""What a target means on a model: which of its layers an adapter is on, which are left out, and why.

Rules:
1. A word means layers of the language model by where they are, whatever their names:

       all-linear  every linear layer that the kind of adapter can be on, experts too
       attention   those of them in an attention block, of whatever sort
       mlp         those in a feed-forward block, shared experts too
       experts     the layers of the experts that a router chooses among

   No word means the output head, an embedding, a layer with a single output, which is a gate, or the layer
   of latent attention that vLLM absorbs (`qpa.models.linear_layers.is_absorbed`).
2. A name selects by the last components of a module's path, as PEFT does, and may select what no word
   means. Several targets add up.
3. What a word means and the kind cannot be on, it leaves out, and says so in the plan. A word of which
   nothing is left, and a name that selects nothing, are refused.

Source: ours.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from qpa.adapters.experts import expert_layer, fused_parameters, names_of_other_layers
from qpa.documents import AdapterSpec, LeftOut
from qpa.errors import ModelError, OptionError
from qpa.models.linear_layers import (
    Layer,
    head_path,
    is_absorbed,
    is_router,
    is_selected,
    last_component,
    layer_of,
    layers_of_mixers,
    linear_layers,
    selects,
)

ALL_LINEAR, ATTENTION, MLP, EXPERTS = "all-linear", "attention", "mlp", "experts"
WORDS = (ALL_LINEAR, ATTENTION, MLP, EXPERTS)

HELP = (
    "all-linear (every linear layer but the head), attention, mlp, experts, or names of layers, separated "
    "by commas."
)

READERS = "PEFT and a serving engine"

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|moe|expert|^fc[0-9]$", re.IGNORECASE)


def part_of(path: str) -> str | None:
    """Return the word for the part of the model that a layer is in; None for a layer in none of these."""
    if expert_layer(path) is not None or path.endswith(".experts"):
        return EXPERTS
    components = path.split(".")
    if any(_ATTENTION.search(component) for component in components):
        return ATTENTION
    return MLP if any(_MLP.search(component) for component in components) else None


def is_meant(path: str, words: Collection[str]) -> bool:
    """Return whether one of some words means a layer."""
    return ALL_LINEAR in words or part_of(path) in words


def selected(known: Mapping[str, Layer], targets: Sequence[str], model: Any, title: str) -> dict[str, Layer]:
    """Return the layers that words and names select among those that a kind can be on.

    Raises:  OptionError: a word selects none of them.
    """
    words, head = [target for target in targets if target in WORDS], head_path(model)
    names = [target for target in targets if target not in WORDS]
    by_word = [
        path
        for path, layer in known.items()
        if path != head and layer.form != "embedding" and _why_no_word(path, layer, known) is None
    ]
    for word in words:
        if not any(is_meant(path, (word,)) for path in by_word):
            raise _nothing_left(word, left_out(known, (word,), model, title), model)
    meant = {path for path in by_word if is_meant(path, words)}
    return {path: layer for path, layer in known.items() if path in meant or is_selected(path, names)}


def left_out(known: Collection[str], words: Collection[str], model: Any, title: str) -> tuple[LeftOut, ...]:
    """Return what some words mean and a kind cannot be on, like layers together.

    Args:    known: the layers that the kind can be on.
             title: what people call the kind.
    """
    reasons = [
        (re.sub(r"\.[0-9]+(?=\.)", ".*", path), reason)
        for path, reason in _unreachable(known, model, title)
        if is_meant(path, words)
    ]
    return tuple(
        LeftOut(layers=path, n_layers=n, reason=reason) for (path, reason), n in Counter(reasons).items()
    )


def _why_no_word(path: str, layer: Layer, paths: Collection[str]) -> str | None:
    """Return why no word means a layer that could be adapted, None for one that a word means."""
    if layer.n_out == 1:
        return "a gate: it has a single output"
    return "vLLM would leave a LoRA on it out without a word" if is_absorbed(path, paths) else None


def _unreachable(known: Collection[str], model: Any, title: str) -> Iterator[tuple[str, str]]:
    """Yield layers outside the known ones and blocks of experts, each with the reason."""
    adapted = {expert.block for path in known if (expert := expert_layer(path)) is not None}
    blocks = dict.fromkeys(path.rpartition(".")[0] for path in fused_parameters(model))
    for block in blocks:
        if block not in adapted:
            yield block, f"fused experts, for which there is no form of {title} that {READERS} both read"
    taken, head, linear = names_of_other_layers(model), head_path(model), linear_layers(model)
    of_mixers = layers_of_mixers(model)
    for path, layer in linear.items():
        if path == head:
            continue
        if reason := _why_no_word(path, layer, linear):
            yield path, reason
        elif path not in known and last_component(path) in taken:
            yield path, f"PEFT takes this name for the experts, on which it has no {title}"
        elif path not in known and path in of_mixers:
            yield (
                path,
                f"beside a convolution, where a model may use a weight without a call that {title} sees",
            )


def _nothing_left(word: str, left: Sequence[LeftOut], model: Any) -> OptionError:
    found = f"{word}, of which {type(model).__name__} has none"
    if left:
        found = f"{word}, of which nothing is left: {left[0].layers} are {left[0].reason}"
    return OptionError(
        "targets", "words that mean layers of the model", found, "use all-linear, or name them"
    )


def check_name(
    name: str, known: Mapping[str, Layer], model: Any, *, candidate_words: str = "linear layers"
) -> None:
    """Check that a name selects layers that a kind can be on.

    Args:    candidate_words: a name of such layers.
    Raises:  OptionError: it selects none; the message names the nearest.
    """
    if any(selects(name, path) for path in known):
        return
    matched = {path: module for path, module in model.named_modules() if selects(name, path)}
    expected = f"names of {candidate_words}" if matched else "names that match modules"
    names = sorted({last_component(path) for path in known if known[path].form != "embedding"})
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
    advice = "the nearest names are " + ", ".join(close or names[:8])
    raise OptionError("targets", expected, f"{name}, {_what_matched(matched, model)}", advice)


def _what_matched(matched: Mapping[str, Any], model: Any) -> str:
    """Return what a name selects instead of modules that can be adapted, as a clause."""
    if not matched:
        return "which matches no layer"
    paths = {path for path, _ in model.named_modules()}
    forms = {layer.form for layer in map(layer_of, matched.values()) if layer is not None}
    if "embedding" in forms:
        return "which is an embedding; LoRA alone adapts an embedding, that of the tokens"
    if all(is_router(path, paths) for path in matched):
        return "which is a router"
    if matched.keys() & linear_layers(model).keys():
        return "which PEFT takes for the experts, on which LoRA alone can be"
    if forms:
        return "which is a layer outside the language model"
    return "which is no linear layer"


def check_beside_experts(model: Any, spec: AdapterSpec, known: Collection[str]) -> None:
    """Check that PEFT adapts the modules of a spec on a model whose experts are fused.

    PEFT reads no layer of an expert alone, and takes names of some of them for all of them.

    Args:    model: on torch's meta device, and not used any more afterwards.
             known: the layers that the kind can be on.
    Raises:  OptionError: PEFT does not make exactly the tensors of the spec, of names that experts have.
             ModelError: PEFT refuses another module.
    """
    from qpa.adapters.experts import needs_beside
    from qpa.adapters.peft_check import check_in_peft

    modules = {tensor.module for tensor in spec.tensors}
    experts = [expert for module in modules if (expert := expert_layer(module)) is not None]
    if not {needs_beside(expert, known) for expert in experts} <= {None, *modules}:
        raise _some_of_the_experts(spec)
    try:
        check_in_peft(model, spec)
    except (ModelError, ValueError) as error:
        if not experts:
            raise
        raise _some_of_the_experts(spec) from error


def _some_of_the_experts(spec: AdapterSpec) -> OptionError:
    some = _first(spec.target_modules + spec.target_parameters)
    expected, advice = (
        "all layers of all experts, or none of them",
        "use the words experts, attention and mlp",
    )
    return OptionError("targets", expected, f"{some}, which are some of them", advice)


def _first(names: Sequence[str], n: int = 4) -> str:
    n_more = len(names) - n
    return ", ".join(names[:n]) + (f" and {n_more} more" if n_more > 0 else "")


def shortest_parameter_names(chosen: Iterable[str], paths: Collection[str]) -> tuple[str, ...]:
    """Return a short list of names for PEFT's target_parameters that selects some parameters and no others.

    Args:    chosen: paths of the parameters.
             paths: of all parameters of the model.
    Returns: the last components of their paths, two or more, as many as are needed.
    """
    left, names = dict.fromkeys(chosen), []
    wanted = {*left}
    while left:
        path = next(iter(left))
        name, found = _shortest_name(path, wanted, paths)
        names.append(name)
        left = {other: None for other in left if other not in found}
    return tuple(names)


def _shortest_name(path: str, wanted: Collection[str], paths: Collection[str]) -> tuple[str, set[str]]:
    parts = path.split(".")
    for n in range(2, len(parts)):
        name = ".".join(parts[-n:])
        found = {other for other in paths if selects(name, other)}
        if found <= {*wanted}:
            return name, found
    return path, {path}
