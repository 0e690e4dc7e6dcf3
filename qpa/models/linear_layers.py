"""The layers of a causal language model that an adapter can be on, and the names by which PEFT selects them.

A linear layer maps x to W x, with a weight W [out, in]. A Conv1D, of which GPT-2 is made, stores the
transpose, and so does an embedding, whose input is all zeros but for a single 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qpa.compat.transformers_ import is_conv1d
from qpa.errors import ModelError

ABSORBED = "kv_b_proj"

Form = Literal["linear", "conv1d", "embedding", "block"]


@dataclass(frozen=True, slots=True)
class Layer:
    """What an adapter has to know of a layer.

    Args:    n_in, n_out: how many numbers go in and come out.
             form: "linear", "conv1d", "embedding", or "block" for a module that has linear layers inside.
    """

    n_in: int
    n_out: int
    form: Form = "linear"

    @property
    def is_linear(self) -> bool:
        """Return whether the layer is a linear layer, in whatever way it stores its weight."""
        return self.form in ("linear", "conv1d")


def layer_of(module: Any) -> Layer | None:
    """Return a module as a layer; None for one that is neither a linear layer nor an embedding."""
    import torch

    if isinstance(module, torch.nn.Embedding):
        return Layer(module.num_embeddings, module.embedding_dim, "embedding")
    if is_conv1d(module):
        n_in, n_out = module.weight.shape
        return Layer(n_in, n_out, "conv1d")
    if isinstance(module, torch.nn.Linear):
        n_out, n_in = module.weight.shape
        return Layer(n_in, n_out)
    return None


def stores_transpose(module: Any) -> bool:
    """Return whether a module stores its weight as [in, out]."""
    layer = layer_of(module)
    return layer is not None and layer.form in ("conv1d", "embedding")


def linear_layers(model: Any) -> dict[str, Layer]:
    """Return the linear layers of the language model and its output head, by path, without routers.

    A router's answer is a choice among experts, also where its class is a linear layer's.
    """
    inside, head = language_model_prefix(model), head_path(model)
    layers = {path: layer_of(module) for path, module in model.named_modules()}
    return {
        path: layer
        for path, layer in layers.items()
        if layer is not None
        and layer.is_linear
        and (path == head or path.startswith(inside))
        and not is_router(path, layers)
    }


def is_router(path: str, paths: Collection[str]) -> bool:
    """Return whether a path among all of a model's is that of a router, which stands beside experts."""
    parent, _, name = path.rpartition(".")
    return name in ("router", "gate") and f"{parent}.experts" in paths


def is_absorbed(path: str, paths: Collection[str]) -> bool:
    """Return whether a path among all of a model's is the layer of latent attention that engines absorb.

    It turns latent vectors into keys and values. vLLM multiplies its weight into the queries and the output
    once, when it loads the base model, and then takes a LoRA on it without a word and without using it.
    """
    parent, _, name = path.rpartition(".")
    return name == ABSORBED and f"{parent}.kv_a_proj_with_mqa" in paths


def input_embedding(model: Any) -> dict[str, Layer]:
    """Return the embedding of the tokens, by its path; nothing where the model has another module for it."""
    embedding = model.get_input_embeddings()
    path, layer = path_of(model, embedding), layer_of(embedding)
    return {path: layer} if path is not None and layer is not None and layer.form == "embedding" else {}


def blocks(model: Any) -> dict[str, Layer]:
    """Return the modules of the language model's layers that are or have linear layers, by path.

    A module that is not linear itself counts as a block of the model's width.
    """
    inside, width = language_model_prefix(model), int(model.config.get_text_config().hidden_size)
    found = {}
    for path, module in model.named_modules():
        if path.startswith(inside) and _is_in_a_layer(path) and _has_weights(module):
            layer = layer_of(module)
            is_linear = layer is not None and layer.is_linear
            found[path] = layer if layer is not None and is_linear else Layer(width, width, "block")
    return found


def _is_in_a_layer(path: str) -> bool:
    return any(part.isdecimal() for part in path.split(".")[:-1])


def _has_weights(module: Any) -> bool:
    """Return whether a module is or has a linear layer, or has the weights of several in one parameter."""
    layers = (layer_of(part) for part in module.modules())
    return any(layer is not None and layer.is_linear for layer in layers) or any(
        parameter.ndim == 3 for parameter in module.parameters()
    )


def submodule(model: Any, path: str) -> Any:
    """Return the module of a path.

    Raises:  ModelError: the model has none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(path, "a module of the base model", "none") from error


def head_path(model: Any) -> str | None:
    """Return the path of the output head; None where the model names none."""
    head = model.get_output_embeddings()
    return None if head is None else path_of(model, head)


def path_of(model: Any, wanted: Any) -> str | None:
    """Return the path of a module in a model; None where it is not in it."""
    return next((path for path, module in model.named_modules() if module is wanted), None)


def language_model_prefix(model: Any) -> str:
    """Return how the paths inside the language model start, "" where it is the whole model."""
    if model.config.get_text_config() is model.config:
        return ""
    path = path_of(model, model.get_decoder())
    return f"{path}." if path else ""


def selects(name: str, path: str) -> bool:
    """Return whether PEFT adapts the module of a path for a name in target_modules.

    A name stands for the last components of the path, whole ones.
    """
    return path == name or path.endswith(f".{name}")


def is_selected(path: str, names: Iterable[str]) -> bool:
    """Return whether one of some names selects the module of a path."""
    return any(selects(name, path) for name in names)


def shortest_names(chosen: Sequence[str], paths: Collection[str]) -> tuple[str, ...]:
    """Return the shortest list of names that selects some modules, and no others of a model.

    Args:    chosen: paths of the modules, in the order in which `paths` has them.
             paths: of all modules.
    Returns: the last component of a path where it is unambiguous, and whole paths where it is not.
    """
    names: list[str] = []
    for name in dict.fromkeys(last_component(path) for path in chosen):
        same = [path for path in chosen if last_component(path) == name]
        names += [name] if [path for path in paths if selects(name, path)] == same else same
    return tuple(names)


def last_component(path: str) -> str:
    """Return the last component of a module's path, which is the module's type to its layer."""
    return path.rpartition(".")[2]


def has_convolutions(model: Any) -> bool:
    """Return whether a model has convolutions over its tokens, as the mixers of state-space models do."""
    import torch

    return any(isinstance(module, torch.nn.Conv1d) for module in model.modules())


def layers_of_mixers(model: Any) -> set[str]:
    """Return the paths of modules beside a convolution, in the mixer of a state-space model or another.

    Such a mixer may use the weights of its linear layers without calling these layers.
    """
    import torch

    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if any(isinstance(part, torch.nn.Conv1d) for part in module.children())
        for name, _ in module.named_children()
    }
