"""The ONNX graph of a causal language model, with LoRA tensors as inputs or without: all ONNX formats use it.

Rules:
1. Inputs are input_ids and attention_mask, position_ids where the model takes them, and
   past_key_values.<layer>.key and .value; outputs are logits, present.<layer>.key and .value. The names are
   those of the optimum library. Batch, sequence and past are of any length; the past may be empty.
2. Attention is transformers' eager one, made of plain operators, and experts are batched matrix products;
   every layer's cache is whole, and a sliding window is a matter of the mask.
3. The file says nothing of where it was traced: no doc strings, no metadata, no stack traces.
4. Where a model takes its mask from a table of its whole context, as GPT-Neo does, no sequence is longer.
5. Weights beyond `EXTERNAL_DATA_BYTES` go to a file of their own beside the graph.

Source: ours; torch.onnx's exporter traces the graph.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from qpa.compat.logging_ import without_logs
from qpa.compat.torch_ import promise
from qpa.compat.transformers_ import cached_states, use_batched_experts
from qpa.documents import TensorRef
from qpa.errors import ExportError, one_sentence
from qpa.exporters.onnx.files import OPSET
from qpa.models.linear_layers import submodule
from qpa.store.disk_space import room_for

EXTERNAL_DATA_BYTES = 1_900_000_000
"""Weights up to here stay in the graph's file, which protobuf limits to 2 GiB."""

LONGEST_LENGTH = 100
"""The most characters of the tracer's formula for a length; in usual models it is past + sequence or less."""

_TRACEABLE = "a model torch.onnx can trace"

Prefix = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, float32[1, n_heads, n_tokens, head_size]."""

HeadShape = tuple[int, int]
"""The number of heads, and their size."""


class NoGraphError(ExportError):
    """No graph can be made of a base model, whatever the adapter."""


class _CachedModel(torch.nn.Module):
    """A causal language model whose cache and LoRA tensors are arguments, and whose prefix is its own."""

    def __init__(self, model: Any, lora: Sequence[TensorRef], prefix: Prefix, *, transposed: bool) -> None:
        super().__init__()
        self.model = model
        self.lora = lora
        self.transposed = transposed
        self.n_prefix = prefix[0][0].shape[2] if prefix else 0
        self.n_context = _context_of_tables(model)
        for index, states in enumerate(prefix):
            for name, state in zip(("key", "value"), states, strict=True):
                self.register_buffer(f"prefix_{index}_{name}", state)

    def forward(
        self, inputs: Mapping[str, Tensor], past: list[tuple[Tensor, Tensor]], lora: list[Tensor]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return logits and the cache, longer by the sequence."""
        from transformers import DynamicCache

        tensors = [tensor if self.transposed else tensor.T for tensor in lora]
        if self.n_prefix:
            inputs, past = self._with_prefix(inputs, past)
        if self.n_context is not None:
            _bound_lengths(inputs, past, self.n_context)
        with _added(self.model, self.lora, tensors):
            output = self.model(**inputs, past_key_values=DynamicCache(past), use_cache=True)
        states, n = cached_states(output.past_key_values), self.n_prefix
        return output.logits, [(keys[:, :, n:], values[:, :, n:]) for keys, values in states]

    def _with_prefix(
        self, inputs: Mapping[str, Tensor], past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Mapping[str, Tensor], list[tuple[Tensor, Tensor]]]:
        """Return inputs and past as if the prefix's tokens had come before."""
        mask = inputs["attention_mask"]
        inputs = dict(inputs) | {
            "attention_mask": torch.cat((mask.new_ones(mask.shape[0], self.n_prefix), mask), dim=1)
        }
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + self.n_prefix
        return inputs, [
            (self._behind_prefix(index, "key", keys), self._behind_prefix(index, "value", values))
            for index, (keys, values) in enumerate(past)
        ]

    def _behind_prefix(self, index: int, name: str, states: Tensor) -> Tensor:
        prefix = self.get_buffer(f"prefix_{index}_{name}")
        return torch.cat((prefix.expand(states.shape[0], -1, -1, -1), states), dim=2)


def _context_of_tables(model: Any) -> int | None:
    """Return the context length of a model that keeps its attention mask as a table; None without a table.

    The table is a mask for all rows and heads, [1, 1, context, context]. GPT-BigCode's is [context, context],
    which no layer reads.
    """
    n_context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    shapes = {tuple(buffer.shape) for buffer in model.buffers()}
    return n_context if (1, 1, n_context, n_context) in shapes else None


def _bound_lengths(inputs: Mapping[str, Tensor], past: list[tuple[Tensor, Tensor]], n_context: int) -> None:
    """Tell the tracer that past and sequence together are within the context, whatever the layer.

    Of a slice of a table it otherwise knows only min(past + sequence, context) - min(past, context). That
    becomes the layer's sequence, stands in its place in the next layer's, and so on: the time to simplify
    the last one grows exponentially with the layers. Each tensor's lengths are symbols of their own until
    they are said to be equal.
    """
    states = [tensor for layer in past for tensor in layer]
    n_rows, n_new = inputs["input_ids"].shape
    n_past = states[0].shape[2]
    for tensor in (*inputs.values(), *states):
        promise(tensor.shape[0] == n_rows)
    for tensor in states:
        promise(tensor.shape[2] == n_past)
    if "position_ids" in inputs:
        promise(inputs["position_ids"].shape[1] == n_new)
    promise(n_past + n_new <= n_context)


@contextmanager
def _added(model: Any, lora: Sequence[TensorRef], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Add (x A^T) B^T to what each adapted module returns.

    Args:    tensors: A^T and B^T, in the order of `lora`.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for ref, tensor in zip(lora, tensors, strict=True):
        factors.setdefault(ref.module, {})[ref.axis] = tensor
    handles = [
        submodule(model, module).register_forward_hook(_lora_hook(pair["row"], pair["column"]))
        for module, pair in factors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lora_hook(a: Tensor, b: Tensor) -> Any:
    def add(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (inputs[0] @ a) @ b

    return add


def trace_causal_lm(
    model: Any,
    lora: Sequence[TensorRef] = (),
    *,
    prefix: Prefix = (),
    transposed: bool = False,
) -> onnx_ir.Model:
    """Return the ONNX graph of a causal language model with a key-value cache.

    Args:    model: of transformers, float32, on the CPU; its attention is set to the eager one.
             lora: the LoRA tensors that become inputs, in the order of their paths. An initializer of zeros,
             of rank 1, bears the same name, so that an input may be left out.
             prefix: keys and values that every layer finds before the past.
             transposed: the inputs are lora_A [in, rank] and lora_B [rank, out].
    Returns: a graph as in the module's rules, with the model's weights in it.
    Raises:  NoGraphError: the model keeps something else than keys and values, cannot be traced, or computes
             in bfloat16, for which onnxruntime has few operators.
    Source:  ours.
    """
    lora = sorted(lora, key=lambda tensor: tensor.path)
    name = type(model).__name__
    try:
        with _quiet(), torch.no_grad(), _simple_lengths(name):
            model.requires_grad_(False).set_attn_implementation("eager")
            # ONNX has no operator for experts in groups; a dense model is left as it is.
            use_batched_experts(model)
            heads = cache_shapes(model)
            wrapped = _CachedModel(model, lora, prefix, transposed=transposed)
            program = _trace(wrapped, heads)
    except ExportError:
        raise
    except Exception as error:  # the tracer has errors of many families
        cause = _first_cause(error)  # the error itself only tells how to report it
        if isinstance(cause, ExportError):
            raise cause from None
        found = one_sentence(f"{type(cause).__name__}: {cause}", limit=200)
        raise NoGraphError(name, _TRACEABLE, found) from error
    graph: onnx_ir.Model = program.model
    if any(value.dtype == onnx_ir.DataType.BFLOAT16 for node in graph.graph for value in node.outputs):
        raise NoGraphError(name, "a model that computes in float32", "bfloat16 within it")
    _strip(graph)
    _make_optional(graph.graph, lora, transposed)
    return graph


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not isinstance(error, ExportError):
        error = error.__cause__
    return error


def _trace(wrapped: _CachedModel, heads: list[tuple[HeadShape, HeadShape]]) -> Any:
    """Trace with 2 rows of 2 tokens after 3 of the past, and rank 2: lengths of 0 and 1 would be fixed."""
    dim = torch.export.Dim
    longest = None if wrapped.n_context is None else wrapped.n_context - wrapped.n_prefix
    rows, past, rank = dim("batch_size"), dim("past_length", max=longest), dim("rank")
    # Only the past may be empty. MPT cuts its bias from a table in a way that needs at least one token.
    new, total = (dim(name, min=1, max=longest) for name in ("sequence_length", "total_length"))
    inputs = {"input_ids": torch.ones(2, 2, dtype=torch.int64)}
    inputs["attention_mask"] = torch.ones(2, 5, dtype=torch.int64)
    if "position_ids" in inspect.signature(wrapped.model.forward).parameters:
        inputs["position_ids"] = torch.tensor([[3, 4], [3, 4]])
    cache = [
        (torch.zeros(2, n_key, 3, key_size), torch.zeros(2, n_value, 3, value_size))
        for (n_key, key_size), (n_value, value_size) in heads
    ]
    axes = [_rank_axis(tensor, wrapped.transposed) for tensor in wrapped.lora]
    tensors = [_zeros(tensor, 2, wrapped.transposed) for tensor in wrapped.lora]
    paths = [tensor.path for tensor in wrapped.lora]
    program = torch.onnx.export(
        wrapped,
        (inputs, cache, tensors),
        dynamic_shapes=(
            {name: {0: rows, 1: total if name == "attention_mask" else new} for name in inputs},
            [({0: rows, 2: past}, {0: rows, 2: past}) for _ in heads],
            [{axis: rank} for axis in axes],
        ),
        input_names=[*inputs, *_cache_names("past_key_values", len(heads)), *paths],
        output_names=["logits", *_cache_names("present", len(heads))],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    return program


def _cache_names(prefix: str, n_layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(n_layers) for part in ("key", "value")]


def cache_shapes(model: Any) -> list[tuple[HeadShape, HeadShape]]:
    """Return the number of heads and their size for each layer's keys and for its values.

    In latent attention the heads of values are smaller than those of keys.

    Raises:  NoGraphError: the model keeps something else.
    """
    cache = model(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=True).past_key_values
    layers = cached_states(cache)
    states = [state for layer in layers for state in layer]
    if not states or not all(isinstance(state, Tensor) and state.ndim == 4 for state in states):
        expected = "a model whose cache is keys and values in every layer"
        raise NoGraphError(type(model).__name__, expected, type(cache).__name__)
    return [((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in layers]


@contextmanager
def _simple_lengths(name: str) -> Iterator[None]:
    """Stop the tracer at lengths whose formulas it would need endless time to simplify.

    Args:    name: of the model.
    Raises:  NoGraphError: out of the module whose output has them.
    """

    def check(_: Any, __: Any, output: Any) -> None:
        lengths = map(str, output.shape if isinstance(output, Tensor) else ())
        longest = max(lengths, key=len, default="")
        if len(longest) > LONGEST_LENGTH:
            found = "lengths that become longer formulas with every layer"
            raise NoGraphError(name, _TRACEABLE, found)

    handle = register_module_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's remarks on its own parts from the user."""
    with without_logs(logging.WARNING), warnings.catch_warnings(action="ignore"):
        yield


def _strip(model: onnx_ir.Model) -> None:
    """Remove everything that says how and where the graph was traced."""
    model.doc_string = None
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.doc_string = None
        graph.metadata_props.clear()
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            values += node.outputs
        for value in values:
            value.doc_string = None
            value.metadata_props.clear()


def _rank_axis(tensor: TensorRef, transposed: bool) -> int:
    """Return the axis of an input that is as long as the rank."""
    return int((tensor.axis == "row") == transposed)


def _zeros(tensor: TensorRef, rank: int, transposed: bool) -> Tensor:
    """Return the value of an input of this rank that adds nothing to the model."""
    n_rows, n_columns = (rank, tensor.shape[1]) if tensor.axis == "row" else (tensor.shape[0], rank)
    return torch.zeros((n_columns, n_rows) if transposed else (n_rows, n_columns))


def _make_optional(graph: onnx_ir.Graph, lora: Sequence[TensorRef], transposed: bool) -> None:
    inputs = {value.name: value for value in graph.inputs}
    for tensor in lora:
        zeros = _zeros(tensor, 1, transposed).numpy()
        inputs[tensor.path].const_value = onnx_ir.tensor(zeros, name=tensor.path)
        graph.register_initializer(inputs[tensor.path])


def write_graph(model: onnx_ir.Model, path: Path) -> list[str]:
    """Write a graph, with its weights beside it when they are large.

    Args:    path: of a new file, in a directory that is there.
    Returns: the names of the files that were written.
    Raises:  DiskFullError, OSError: they cannot be written.
    """
    weights = [value.const_value for value in model.graph.initializers.values()]
    n_bytes = sum(tensor.nbytes for tensor in weights if tensor is not None)
    data = None if n_bytes <= EXTERNAL_DATA_BYTES else f"{path.name}.data"
    with room_for(path.parent / (data or path.name), n_bytes):
        onnx_ir.save(model, path, external_data=data)
    return [path.name, data] if data else [path.name]
