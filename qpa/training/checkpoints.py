"""Checkpoints that resume to the same bits, without pickle.

    checkpoints/step-00000100/
      adapter_model.safetensors  adapter_config.json   a valid PEFT adapter, where PEFT has the kind
      optimizer.safetensors                            generator, AdamW moments; in float16 also the scale of
                                                       the loss and the step of the schedule
      trainer_state.json                               transformers' own counters, the best evaluation, and
                                                       the steps that metrics.jsonl has no line for yet
      checkpoint.json                                  the Checkpoint document, written last

Nothing random is stored: the trainer draws its data order and dropout from the seed and the step.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerState

from qpa.compat.peft_ import ADAPTER_NAME
from qpa.documents import Checkpoint, ChosenBank, Provenance
from qpa.errors import CheckpointError, DocumentError, one_sentence
from qpa.pipeline.options import options_of
from qpa.store.atomic_files import new_directory, remove_leftovers
from qpa.store.run_directory import DirectoryStore, has_parents, list_checkpoints
from qpa.training.optimizer import GeneratedAdapterOptimizer
from qpa.training.training_options import TrainingOptions

OPTIMIZER_FILE = "optimizer.safetensors"
TRAINER_STATE = "trainer_state.json"

Resumed = tuple[Path, Checkpoint]
"""A checkpoint's directory and document."""


def save_checkpoint(
    root: Path,
    peft_model: Any,
    optimizer: GeneratedAdapterOptimizer,
    trainer_state: Any,
    *,
    provenance: Provenance,
    data_digest: str,
    bank: ChosenBank | None,
    n_kept: int = 2,
    best_step: int | None = None,
    more: Mapping[str, Tensor] = {},
) -> Path:
    """Write a checkpoint whole or not at all, and drop all but the newest ones and the best.

    Args:    root: the run's checkpoints directory.
             trainer_state: `transformers.TrainerState`.
             bank: whose directions the generator has.
             n_kept: how many of the newest are kept.
             best_step: the step of the best one; None where there is none.
             more: further tensors for the optimizer's file.
    Raises:  OSError: the disk is full or read-only; older checkpoints are untouched.
    """
    path = checkpoint_path(root, trainer_state.global_step)
    with new_directory(path) as work:
        store = DirectoryStore(work)
        if isinstance(peft_model, PeftModel):
            peft_model.peft_config[ADAPTER_NAME].save_pretrained(work)
        store.put("adapter_model.safetensors", save(_adapter_tensors(peft_model), {"format": "pt"}))
        store.put(OPTIMIZER_FILE, save({**optimizer_tensors(optimizer), **more}))
        trainer_state.save_to_json(str(work / TRAINER_STATE))
        document = Checkpoint(
            provenance=provenance,
            step=trainer_state.global_step,
            lr=float(optimizer.param_groups[0]["lr"]),
            data_digest=data_digest,
            files=tuple(store.describe(file) for file in sorted(work.iterdir())),
            bank=bank,
        )
        store.put(Checkpoint.file_name(), document.to_json())
    best = None if best_step is None else checkpoint_path(root, best_step)
    for old in list_checkpoints(root)[:-n_kept]:
        if old != best:
            shutil.rmtree(old)
    return path


def checkpoint_path(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return root / f"step-{step:08d}"


def newest_checkpoint(root: Path, provenance: Provenance, older: Mapping[str, str]) -> Resumed:
    """Return the newest checkpoint after checking every byte of it.

    Args:    provenance: of the training that wants to go on.
             older: see `qpa.store.run_directory.older_digests`.
    Raises:  CheckpointError: there is none, it is cut short, or another training wrote it.
    """
    found = list_checkpoints(root)
    if not found:
        raise CheckpointError(str(root), "a checkpoint to resume from", "none", "train without `resume`")
    path = found[-1]
    advice = f"remove {path} to resume from the one before" if len(found) > 1 else "train without `resume`"
    return path, read_checkpoint(path, provenance, older, advice)


def read_checkpoint(path: Path, provenance: Provenance, older: Mapping[str, str], advice: str) -> Checkpoint:
    """Return a checkpoint's document after checking every byte of the checkpoint.

    Args:    provenance: of the training that wants it.
             older: see `qpa.store.run_directory.older_digests`.
             advice: what to do where it is missing or damaged.
    Raises:  CheckpointError: it is, or another training wrote it.
    """
    file = path / Checkpoint.file_name()
    try:
        document = Checkpoint.from_json(file.read_bytes(), str(file))
        for attachment in document.files:
            DirectoryStore(path).get(attachment)
    except DocumentError as error:
        raise CheckpointError(error.subject, error.expected, error.found, advice) from error
    except FileNotFoundError as error:
        raise CheckpointError(str(path), "a complete checkpoint", f"no {file.name} in it", advice) from error
    _check_same_training(path, document.provenance, provenance, older)
    return document


def best_evaluation(path: Path) -> tuple[int, float] | None:
    """Return the step and the loss of the best evaluation up to a checkpoint; None where there was none."""
    state = TrainerState.load_from_json(str(path / TRAINER_STATE))
    return None if state.best_metric is None else (int(state.best_global_step), float(state.best_metric))


def more_tensors(path: Path) -> dict[str, Tensor]:
    """Return what the optimizer's file holds besides its tensors, such as the loss's scale."""
    tensors = load_file(path / OPTIMIZER_FILE)
    own = ("generator.", "inner.", "measured")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(own)}


def restore_optimizer(path: Path, optimizer: GeneratedAdapterOptimizer, document: Checkpoint) -> None:
    """Set generator, moments, learning rate and adapter to the checkpoint's.

    Raises:  CheckpointError: the tensors are not this generator's.
    """
    try:
        tensors = load_file(path / OPTIMIZER_FILE)
    except SafetensorError as error:
        subject = str(path / OPTIMIZER_FILE)
        raise CheckpointError(subject, "a safetensors file", one_sentence(error)) from error
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = document.lr
    state["generator"] = _with_prefix(tensors, "generator.")
    state["measured"] = tensors.get("measured")
    state["inner"]["state"] = {
        index: {name: tensors[f"inner.{index}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
        for index in range(len(list(optimizer.generator.parameters())))
        if f"inner.{index}.step" in tensors
    }
    state["n_steps"] = document.step
    optimizer.load_state_dict(state)
    optimizer.share_all()


def optimizer_tensors(optimizer: GeneratedAdapterOptimizer) -> dict[str, Tensor]:
    """Return all tensors of an optimizer's state on the CPU, by flat names."""
    state = optimizer.state_dict()
    tensors = {f"generator.{name}": tensor for name, tensor in state["generator"].items()}
    if state["measured"] is not None:
        tensors["measured"] = state["measured"]
    for index, moments in state["inner"]["state"].items():
        tensors |= {f"inner.{index}.{name}": moments[name] for name in ("step", "exp_avg", "exp_avg_sq")}
    return {name: torch.as_tensor(tensor).cpu().contiguous() for name, tensor in tensors.items()}


def remove_checkpoints(root: Path) -> None:
    """Remove all checkpoints, and what killed processes left of one.

    Raises:  OSError: a checkpoint cannot be removed.
    """
    for checkpoint in list_checkpoints(root):
        shutil.rmtree(checkpoint)
    remove_leftovers(root)


def _adapter_tensors(peft_model: Any) -> dict[str, Tensor]:
    if not isinstance(peft_model, PeftModel):
        return {name: p.detach().cpu() for name, p in peft_model.named_parameters() if p.requires_grad}
    # PEFT would have all processes send their shares of a sharded base model, of which nothing is written.
    named = {name: p for name, p in peft_model.named_parameters() if not isinstance(p.data, DTensor)}
    state = get_peft_model_state_dict(
        peft_model, named, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_same_training(
    path: Path, written: Provenance, wanted: Provenance, older: Mapping[str, str]
) -> None:
    if len(written.parents) != len(wanted.parents) or not has_parents(written, wanted.parents, older):
        raise CheckpointError(
            str(path), "a checkpoint of this plan", "one of another plan", "train without `resume`"
        )
    if written.seed != wanted.seed:
        raise CheckpointError(str(path), f"`seed` {written.seed}, as before", str(wanted.seed))
    before, now = written.option_values, wanted.option_values
    # An option that there was not yet when the checkpoint was written had what is its default now.
    defaults = {option.field: option.default for option in options_of(TrainingOptions)}
    for name in now | before:
        written_value, wanted_value = (values.get(name, defaults.get(name)) for values in (before, now))
        if written_value != wanted_value:
            raise CheckpointError(str(path), f"`{name}` {written_value}, as before", str(wanted_value))
