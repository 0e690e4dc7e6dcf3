"""The base model as a training sees it: on its device, in its type, its weights rounded on request."""

from __future__ import annotations

from typing import Any

import torch

from qpa.documents import AdapterSpec
from qpa.errors import OptionError, one_of
from qpa.models.base_model import load_config, load_model
from qpa.models.causality import check_causal
from qpa.models.quantization import METHODS_ON_ROUNDED, check_rounded, loading_quantised
from qpa.training.processes import Processes
from qpa.training.trackers import check_trackers
from qpa.training.training_options import TrainingOptions


def check_machine(options: TrainingOptions, device: str) -> None:
    """Check that this machine has what the options need, before anything is loaded.

    Raises:  OptionError: it lacks something.
    """
    check_trackers(options.report_to or ())
    if options.fp16 and device != "cuda":
        raise OptionError("fp16", "a CUDA device", f"`device` {device}", "use `bf16`")


def load_base(options: TrainingOptions, spec: AdapterSpec, device: str, processes: Processes) -> Any:
    """Return the base model of an adapter.

    Raises:  OptionError: its weights are to be rounded, and that cannot be; or it is to be sharded, and
             the adapter's start is read off its weights.
             ModelError: it cannot be loaded, or is not causal.
    """
    keep_dtype, trust = options.autocast_to is not None, options.trust_remote_code
    if options.quantize:
        _check_roundable(options, spec, processes)
        rounding = loading_quantised(options.quantize, device, options.autocast_to or torch.float32)
        model = load_model(spec.base, keep_dtype=keep_dtype, trust_remote_code=trust, arguments=rounding)
        check_rounded(model, options.quantize)
        return model
    if processes.is_sharded and any(tensor.initial == "base" for tensor in spec.tensors):
        expected = "an adapter that starts from none of the base model's weights, where FSDP shards them"
        raise OptionError("method", expected, spec.method, "start the processes without FSDP")
    n_shards = processes.n if processes.is_sharded else 1
    model = load_model(spec.base, keep_dtype=keep_dtype, trust_remote_code=trust, n_shards=n_shards)
    model = model if processes.is_sharded else model.to(device)
    check_causal(model, spec.base.name_or_path, bf16=keep_dtype)
    return model


def _check_roundable(options: TrainingOptions, spec: AdapterSpec, processes: Processes) -> None:
    """Check that the base is stored as it is, and that the adapter is one that rounded weights carry."""
    if spec.method not in METHODS_ON_ROUNDED:
        raise OptionError("quantize", f"`method` {one_of(METHODS_ON_ROUNDED)}", spec.method)
    by_weight = [name for name in spec.target_parameters if name.endswith(".weight")]
    if by_weight:  # PEFT adds these to the weight itself, and not to what the layer returns
        found = f"one that is added to {', '.join(by_weight)}"
        advice = "plan with `targets` attention,experts"
        raise OptionError("quantize", "an adapter beside the weights that are rounded", found, advice)
    if processes.is_sharded:
        raise OptionError("quantize", "a base that each process holds whole", "one of shards")
    base = spec.base
    config = load_config(
        base.name_or_path, revision=base.revision, trust_remote_code=options.trust_remote_code
    )
    if any(getattr(part, "quantization_config", None) for part in (config, config.get_text_config())):
        raise OptionError("quantize", "a base whose weights are stored as they are", "quantised weights")
