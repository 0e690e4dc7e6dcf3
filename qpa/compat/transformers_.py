"""What qpa uses of transformers beyond its documented interface, as seen in transformers 5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def tied_parameters(model: Any) -> Mapping[str, str]:
    """Return the name of every parameter that shares another one's numbers, with that other one's name."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def is_conv1d(module: Any) -> bool:
    """Return whether a module is a linear layer that stores its weight as [in, out], as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def cached_states(cache: Any) -> list[tuple[Any, Any]]:
    """Return the keys and values of every layer of a cache, None where a layer keeps something else."""
    layers = getattr(cache, "layers", ())
    return [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]


def stores_experts_transposed(experts: Any) -> bool:
    """Return whether fused experts say that their weights are [n_experts, in, out], which PEFT asks too."""
    return bool(getattr(experts, "is_transposed", False))


def use_batched_experts(model: Any) -> None:
    """Let the experts of a mixture be batched matrix products; a dense model is left as it is."""
    model.set_experts_implementation("batched_mm")


def loaded_names(keys: Iterable[str], model: Any) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Yield, for every key the model reads, its name in the model and whether it is converted on the way."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    prefix, parameters = model.base_model_prefix, model.state_dict()
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = rename_source_key(key, [], [], prefix, parameters)
        if name in parameters:
            yield key, (name, pattern is not None)


def use_one_device(arguments: Any) -> None:
    """Keep a trainer from wrapping its model in DataParallel, which it does where it sees several devices.

    Args:    arguments: `transformers.TrainingArguments`.
    """
    arguments._n_gpu = 1


def keep_weights_on_resume(trainer: Any) -> None:
    """Keep a trainer from reading weights when it resumes; its counters and its data order it does resume.

    Args:    trainer: `transformers.Trainer`, whose optimizer's state makes the adapter again.
    """
    trainer._load_from_checkpoint = lambda *_, **__: None


def render_with_marks(
    template: str, messages: Sequence[Any], tokenizer: Any, **arguments: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and where its template says that the model generates.

    Args:    template: with `{% generation %}` marks.
             arguments: further variables of the template.
    Returns: the text, and the start and end of every marked piece, in characters.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, marks = render_jinja_template(
        conversations=[list(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **arguments},
    )
    return texts[0], [(int(start), int(end)) for start, end in marks[0]]


def use_row_order(trainer: Any, order: Any) -> None:
    """Let a trainer take its rows in an order of ours.

    Args:    trainer: `transformers.Trainer`.
             order: a sampler of torch.
    """
    trainer._get_train_sampler = lambda *_: order


def sharded_over(n_processes: int) -> Any:
    """Return what lets `from_pretrained` load a share of every layer into each of several processes (FSDP2).

    An adapter that is put on such a model is whole in every process, and a trainer averages its gradients.
    """
    from transformers.distributed import DistributedConfig

    return DistributedConfig(fsdp_size=n_processes)
