"""Prefix tuning: keys and values that the attention of every layer finds before the text's own.

They start as the keys and values of tokens drawn from the vocabulary, since activations of real words were
found better than random numbers. In PEFT, the prefixes of all layers are parts of one parameter, in turn.

Source: arXiv 2101.00190; names as in PEFT, roles ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.adapters.kind import AdapterKind, PlannedAdapter, Rates, Request
from qpa.adapters.peft_directory import (
    COMMON_FIELDS,
    Fields,
    PeftDirectory,
    common_config,
    is_count,
    is_one_of,
)
from qpa.adapters.peft_model import wrap_in_peft
from qpa.compat.peft_ import PROMPT_KEY, PROMPT_PARAMETER, WEIGHTS_FILE, complete_prompt_config
from qpa.compat.transformers_ import cached_states
from qpa.documents import AdapterSpec, AdapterTensor, FrozenAdapter, TensorRules
from qpa.documents.base import JsonObject
from qpa.documents.finding import Finding, several
from qpa.documents.tensors import Role
from qpa.errors import ModelError, OptionError, one_sentence
from qpa.seeds import split_seed

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from qpa.adapters.frozen_arrays import FrozenArrays
    from qpa.adapters.parameter_view import AdapterParameter
    from qpa.store.tensor_file import Array, TensorFile

KEYS = Role("prefix_key", "row", "base")
VALUES = Role("prefix_value", "row", "base")


def _check(shapes: Sequence[tuple[int, int]], rank: int) -> None:
    if len({width for _, width in shapes}) > 1:
        raise ValueError(f"shapes {[*shapes]} are of several modules")


RULES = TensorRules(roles=(KEYS, VALUES), check=_check)


@final
class _Directory(PeftDirectory):
    """One tensor prompt_embeddings [n_tokens, n_layers * 2 * width], in which the layers stand in turn."""

    tag: ClassVar[str] = "prefix-tuning"
    fields: ClassVar[Fields] = {
        **COMMON_FIELDS,
        "num_layers": is_count,
        "num_transformer_submodules": is_one_of(1),
        "num_virtual_tokens": is_count,
        "peft_type": is_one_of("PREFIX_TUNING"),
        "prefix_projection": is_one_of(False),
    }

    def config(self, frozen: FrozenAdapter) -> JsonObject:
        """Return the config; what it leaves out, the number of heads, PEFT takes from the base model."""
        return common_config(frozen) | {
            "num_layers": len(frozen.modules),
            "num_transformer_submodules": 1,
            "num_virtual_tokens": frozen.rank,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,
        }

    def shapes(self, frozen: FrozenAdapter) -> dict[str, tuple[int, ...]]:
        """Return the shape of the one tensor."""
        return {PROMPT_KEY: (frozen.rank, sum(tensor.shape[1] for tensor in frozen.tensors))}

    def read(self, arrays: FrozenArrays, key: str) -> Array:
        """Return keys and values of all layers, side by side."""
        import numpy as np

        return np.concatenate([arrays.read(tensor.path) for tensor in arrays.frozen.tensors], axis=1)

    def check(self, config: JsonObject, file: TensorFile) -> Iterator[Finding]:
        """Yield a finding where the file has other tensors than this one, or this one has another shape."""
        n_tokens, n_layers = config["num_virtual_tokens"], config["num_layers"]
        assert isinstance(n_layers, int)
        shape = file.entries[PROMPT_KEY].shape if file.entries.keys() == {PROMPT_KEY} else ()
        if len(shape) != 2 or shape[0] != n_tokens or shape[1] == 0 or shape[1] % (2 * n_layers):
            expected = f"{PROMPT_KEY} [{n_tokens}, 2 * {n_layers} * width] alone"
            found = str(list(shape)) if shape else several(sorted(file.entries) or ["nothing"])
            yield Finding("L24", WEIGHTS_FILE, expected, found)


@final
class Prefix(AdapterKind):
    """Prefix tuning: prefix_key and prefix_value [n_tokens, n_key_value_heads * head_size] in every layer."""

    name: ClassVar[str] = "prefix"
    title: ClassVar[str] = "prefix tuning"
    place: ClassVar[str] = "the attention of every layer"
    rules: ClassVar[TensorRules] = RULES
    default_rank: ClassVar[int] = 16
    has_targets: ClassVar[bool] = False
    peft: ClassVar[PeftDirectory] = _Directory()
    formats: ClassVar[tuple[str, ...]] = ("peft", "onnx")
    rate: ClassVar[float] = 1e-1
    direct_rates: ClassVar[Rates] = (3e-2, 1e-1, 3e-1)
    generated_rates: ClassVar[Rates] = (1e-2, 3e-2, 1e-1)

    def words(self, rank: int) -> str:
        """Return "prefix tuning, 16 tokens in every layer"."""
        return f"{self.title}, {rank} tokens in every layer"

    def phrase(self, rank: int) -> str:
        """Return "a prefix of 16 virtual tokens"."""
        return f"a prefix of {rank} virtual tokens"

    def plan(self, model: Any, request: Request) -> PlannedAdapter:
        """Return keys and values of every layer."""
        n_tokens = request.rank or self.default_rank
        _check_layers(model, n_tokens)
        config = _peft_config(model, n_tokens)
        shapes = [(n_tokens, config.token_dim)] * 2
        layers = [f"layers.{index}" for index in range(config.num_layers)]
        tensors = [self.tensors_of(layer, shapes, module_type="layers") for layer in layers]
        return PlannedAdapter(n_tokens, float(n_tokens), tuple(t for pair in tensors for t in pair))

    def wrap(self, model: Any, spec: AdapterSpec) -> Any:
        """Return a `peft.PeftModel`."""
        return wrap_in_peft(model, _peft_config(model, spec.rank), self.title)

    def parameter_name(self, tensor: AdapterTensor, modules: Collection[str]) -> str:
        """Return the name of the one parameter for all layers."""
        return PROMPT_PARAMETER

    def part(self, parameter: Parameter, tensor: AdapterTensor, spec: AdapterSpec) -> AdapterParameter:
        """Return one layer's keys or values, some columns of the parameter.

        Raises:  ModelError: the model has fewer layers than were planned for.
        """
        import torch

        from qpa.adapters.parameter_view import ParameterView

        width = tensor.shape[1]
        first = spec.tensors.index(tensor) * width
        if parameter.shape[1] < first + width:
            expected = f"at least {first + width} numbers per token"
            raise ModelError(tensor.path, expected, str(parameter.shape[1]))
        return ParameterView(parameter, partial(torch.narrow, dim=1, start=first, length=width))

    def values_of_base(self, wrapped: Any, spec: AdapterSpec) -> dict[str, Tensor]:
        """Return the keys and values of random tokens.

        Raises:  ModelError: the model has no cache of them in every layer.
        """
        states = _states_of_random_tokens(wrapped.get_base_model(), spec)
        values = {}
        for tensor, state in zip(spec.tensors, states, strict=True):
            values[tensor.path] = state[0].transpose(0, 1).flatten(1).float()
            if (found := tuple(values[tensor.path].shape)) != tensor.shape:
                expected = f"keys and values of shape {tensor.shape}, as PEFT has a prefix"
                raise ModelError(tensor.path, expected, str(found), "use another `method`")
        return values

    def put_into(self, model: Any, arrays: FrozenArrays) -> None:
        """Leave the model as it is: a prefix is in no module."""

    def prefix(self, arrays: FrozenArrays) -> Sequence[Array]:
        """Return keys and values of each layer in turn."""
        return [arrays.read(tensor.path) for tensor in arrays.frozen.tensors]

    def n_positions(self, rank: int) -> int:
        """Return the number of tokens, which are in the model's context before the text."""
        return rank


KIND = Prefix()


def _peft_config(model: Any, n_tokens: int) -> Any:
    """Return a `peft.PrefixTuningConfig` with the number of layers and the width of keys and values.

    Raises:  ModelError: the model has no such prefix.
    """
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(num_virtual_tokens=n_tokens, task_type="CAUSAL_LM")
    try:
        complete_prompt_config(config, model.config)
    except (ValueError, AttributeError, KeyError) as error:
        raise ModelError(type(model).__name__, "layers with keys and values", one_sentence(error)) from error
    return config


def _check_layers(model: Any, n_tokens: int) -> None:
    """Check that the context has room for more than the prefix, and that every layer has attention."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and n_tokens >= limit:
        expected = f"fewer tokens than the base model's context of {limit}"
        raise OptionError("rank", expected, str(n_tokens))
    others = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if others:
        expected, found = "layers with keys and values for a prefix", ", ".join(sorted(map(str, others)))
        raise ModelError(type(model).__name__, expected, found, "use another `method`")


def _states_of_random_tokens(model: Any, spec: AdapterSpec) -> list[Tensor]:
    """Return float[1, n_heads, n_tokens, head_size], keys and values of each layer in turn."""
    import torch

    random = torch.Generator().manual_seed(split_seed(spec.seed, "prefix"))
    n_vocabulary = int(model.config.get_text_config().vocab_size)
    tokens = torch.randint(n_vocabulary, (1, spec.rank), generator=random)
    was_training = model.training
    try:
        with torch.no_grad():
            cache = model.eval()(input_ids=tokens.to(model.device), use_cache=True).past_key_values
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise _no_cache(model, type(error).__name__) from error
    finally:
        model.train(was_training)
    states = [state for layer in cached_states(cache) for state in layer]
    if len(states) != len(spec.tensors) or any(state is None for state in states):
        raise _no_cache(model, f"{len(states) // 2} layers with such a cache")
    return states


def _no_cache(model: Any, found: str) -> ModelError:
    expected = "a cache of keys and values in every layer, for the prefix to be in"
    return ModelError(type(model).__name__, expected, found, "use another `method`")
