"""genai: a directory that onnxruntime-genai loads, and an adapter it adds at run time.

Rules:
1. model.onnx is the graph of `qpa.exporters.formats.onnx` with LoRA inputs, key-value cache included, and the
   base's weights. Without an adapter it is the base model.
2. LoRA inputs are named as onnxruntime-genai's model builder names them, with the scaling folded in:
   model.layers.0.self_attn.q_proj is model.layers.0.attn.q_proj.lora_A.MatMul.weight [in, rank] and
   .lora_B.MatMul.weight [rank, out], of any rank.
3. genai_config.json describes the graph, as a model of type "decoder": attention, masks and windows are the
   graph's own affair. Past and present do not share a buffer.
4. adapter.onnx_adapter holds the tensors in onnxruntime's own format.

Source: ours; onnxruntime-genai's documentation of its configuration and of multi-LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.adapters.frozen_arrays import FrozenArrays
from qpa.documents import FrozenAdapter, Manifest, TensorRef
from qpa.documents.finding import Finding
from qpa.errors import ExportError
from qpa.exporters.contracts.genai import CONFIG_FILE, SESSION_OPTIONS, check_genai_contract
from qpa.exporters.directory import ExportDirectory
from qpa.exporters.onnx.files import ADAPTER_FILE, GRAPH_FILE, write_adapter
from qpa.exporters.onnx.format import OnnxExporter

if TYPE_CHECKING:
    import onnx_ir


@final
@dataclass(frozen=True, slots=True)
class ExportGenai(OnnxExporter):
    """Write a base graph, an adapter for it, and onnxruntime-genai's configuration.

    Args:    dtype: "float32".
             model: where the base model is now; None is where it was.
             trust_remote_code: the user allows the model's own Python code to run, now.
    Source:  ours.
    """

    name: ClassVar[str] = "genai"
    words: ClassVar[str] = "the same for onnxruntime-genai"
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, GRAPH_FILE, ADAPTER_FILE)
    engines: ClassVar[tuple[str, ...]] = ("onnxruntime-genai",)

    @classmethod
    def check_content(cls, directory: Path, manifest: Manifest) -> Iterator[Finding]:
        """Yield what onnxruntime-genai's configuration breaks of its contract."""
        yield from check_genai_contract(directory)

    def write_adapter(self, arrays: FrozenArrays, directory: ExportDirectory) -> None:
        """Write the tensors, transposed, by the model builder's names."""
        tensors = {genai_name(t): arrays.read(t.path).T.copy() for t in arrays.frozen.tensors}
        write_adapter(tensors, directory.path / ADAPTER_FILE)
        directory.take(ADAPTER_FILE)

    def write_graph(self, arrays: FrozenArrays, model: Any, directory: ExportDirectory) -> None:
        """Write the base graph and the configuration that describes it."""
        from qpa.exporters.onnx.graph import write_graph

        graph = _graph(arrays.frozen, model)
        directory.write_json(CONFIG_FILE, genai_config(model, graph.graph.inputs))
        for name in write_graph(graph, directory.path / GRAPH_FILE):
            directory.take(name)


def genai_name(tensor: TensorRef) -> str:
    """Return the model builder's name for a LoRA tensor."""
    return f"{tensor.module.replace('.self_attn.', '.attn.')}.{tensor.role}.MatMul.weight"


def _graph(frozen: FrozenAdapter, model: Any) -> onnx_ir.Model:
    from qpa.exporters.onnx.graph import trace_causal_lm

    tensors = {tensor.path: tensor for tensor in frozen.tensors}
    graph = trace_causal_lm(model, frozen.tensors, transposed=True)
    for value in graph.graph.inputs:
        if value.name in tensors:
            # The graph's table of initializers follows the value's new name.
            value.name = genai_name(tensors[value.name])
    return graph


def genai_config(model: Any, inputs: Sequence[onnx_ir.Value]) -> dict[str, Any]:
    """Return the content of genai_config.json.

    Args:    model: the base model.
             inputs: of the graph, float32[batch, heads, past, head size] for the cache.
    Raises:  ExportError: onnxruntime-genai has no field for what the model is.
    """
    names = {value.name or "": value.shape for value in inputs}
    caches = [shape for name, shape in names.items() if name.startswith("past_key_values.")]
    sizes = {(shape[1], shape[3]) for shape in caches if shape is not None}
    if len(sizes) != 1:
        raise _unfit(model, "one number and size of key heads in all layers", f"{len(sizes)} of them")
    config, ((n_heads, head_size),) = model.config, sizes
    n_context = getattr(config, "max_position_embeddings", None)
    if not isinstance(n_context, int):
        raise _unfit(model, "max_position_embeddings in the base's config", "none")
    tokens = ("input_ids", "attention_mask", "position_ids")
    decoder = {
        "session_options": SESSION_OPTIONS,
        "filename": GRAPH_FILE,
        "head_size": head_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(caches) // 2,
        "num_key_value_heads": n_heads,
        "inputs": {name: name for name in tokens if name in names}
        | {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")},
        "outputs": {"logits": "logits"}
        | {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")},
    }
    return {
        "model": _special_tokens(model)
        | {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": n_context,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": n_context, "past_present_share_buffer": False},
    }


def _special_tokens(model: Any) -> dict[str, Any]:
    """Return the tokens that begin, end and pad; onnxruntime-genai wants all three."""
    found = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        generation = getattr(model.generation_config, name, None)
        found[name] = generation if generation is not None else getattr(model.config, name, None)
    end = found["eos_token_id"]
    if end is None:
        raise _unfit(model, "an end-of-text token in the base's config", "none")
    first = end[0] if isinstance(end, list) else end
    return {name: first if token is None else token for name, token in found.items()}


def _unfit(model: Any, expected: str, found: str) -> ExportError:
    return ExportError(type(model).__name__, expected, found, "use `format` onnx-adapter")
