"""train-generator: the only pass that touches base weights and data.

Rules:
1. The base model carries an ordinary PEFT adapter and trains under TRL's SFTTrainer; the generator
   lives in the optimizer (`qpa.optimizer`).
2. Delta W is exactly zero before the first step: the plan's seed draws lora_A and the angles, lora_B and
   the decoders' last layers are zero.
3. Everything random during training is a function of the training seed and the step, so a resumed
   training continues with the same bits.
4. Losses count real tokens only: padding and the prompt of prompt/completion rows do not.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

from qpa.documents import (
    AdapterSpec,
    Checkpoint,
    Document,
    NativeCircuit,
    TrainedGenerator,
    TrainingResult,
    WeightLayout,
)
from qpa.errors import CheckpointError, DivergedError, OptionError
from qpa.pipeline import PassContext

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"


@final
@dataclass(frozen=True, slots=True)
class TrainGenerator:
    """Train angles and decoders through the loss of the base model.

    Args:    data, eval_data: text or jsonl files, see `qpa.text_data`.
             max_steps: optimizer steps; None means `epochs` passes over the data.
             batch_size, grad_accum: rows per micro-batch, micro-batches per step.
             max_length: tokens per row.
             lr, angle_lr: peak learning rates of decoders and angles; cosine decay to zero.
             warmup: steps of linear warm-up, or below 1 the share of all steps.
             weight_decay: of the decoders.
             max_grad_norm: the adapter's gradient is clipped to this norm; 0 means not at all.
             bf16: bfloat16 autocast, base weights in the checkpoint's own dtype.
             device: "auto", "cpu" or "cuda".
             save_steps: steps between checkpoints.
             resume: continue from the newest checkpoint; the result is the same, to the bit.
    Source:  ours.
    """

    name: ClassVar[str] = "train-generator"
    consumes: ClassVar[type] = NativeCircuit
    requires: ClassVar[tuple[type[Document], ...]] = (AdapterSpec, WeightLayout)
    produces: ClassVar[type[Document]] = TrainedGenerator

    data: str
    eval_data: str | None = None
    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    grad_accum: int = 1
    max_length: int = 256
    lr: float = 3e-3
    angle_lr: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False
    device: str = "auto"
    save_steps: int = field(default=100, metadata={"provenance": False})
    resume: bool = field(default=False, metadata={"provenance": False})

    def run(self, source: NativeCircuit, context: PassContext) -> TrainedGenerator:
        """Evaluate, train, evaluate; leave arrays, metrics.jsonl and checkpoints in the context's files.

        Raises:  OptionError, ModelError, DataError: something to train with is wrong.
                 DivergedError: a gradient is not finite; the last checkpoint stays.
                 CheckpointError: there is none to resume, it is cut short, or other options wrote it.
        """
        self._check_options()
        return _Training(self, source, context).run()

    def _check_options(self) -> None:
        n_processes = os.environ.get("WORLD_SIZE", "1")
        if n_processes != "1":
            advice = "for several, use qpa.optimizer.GeneratedAdapterOptimizer in a script of your own"
            raise OptionError("qpa train", "one process", f"WORLD_SIZE={n_processes}", advice)
        whole = {"batch-size": self.batch_size, "grad-accum": self.grad_accum, "save-steps": self.save_steps}
        if self.max_steps is not None:
            whole["max-steps"] = self.max_steps
        for option, value in whole.items():
            if value < 1:
                raise OptionError(f"--{option}", "a whole number of at least 1", str(value))
        for option, number in {"lr": self.lr, "epochs": self.epochs}.items():
            if not (math.isfinite(number) and number > 0):
                raise OptionError(f"--{option}", "a finite number above 0", str(number))
        not_negative = {"angle-lr": self.angle_lr, "warmup": self.warmup, "weight-decay": self.weight_decay}
        for option, number in not_negative.items():
            if not (math.isfinite(number) and number >= 0):
                raise OptionError(f"--{option}", "a finite number of at least 0", str(number))

    def torch_device(self) -> str:
        """Return "cpu" or "cuda".

        Raises:  OptionError: another device, or cuda where there is none.
        """
        import torch

        if self.device not in ("auto", "cpu", "cuda"):
            raise OptionError("--device", "auto, cpu or cuda", self.device)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise OptionError("--device", "a CUDA device", "none on this machine", "use --device cpu")
        return "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"


class _Training:
    """One training: the model, its generator's optimizer, and TRL's trainer around them."""

    def __init__(self, options: TrainGenerator, source: NativeCircuit, context: PassContext) -> None:
        from qpa.adapter import adapter_parameters, attach_adapter
        from qpa.base_model import load_model, load_tokenizer
        from qpa.generator import Generator
        from qpa.optimizer import GeneratedAdapterOptimizer

        self.options, self.context = options, context
        self.provenance = context.provenance(options, source)
        self.root = context.files.path / CHECKPOINTS
        spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
        device = options.torch_device()
        tokenizer = load_tokenizer(spec.base)
        splits = self._read_splits(tokenizer)
        model = load_model(spec.base, keep_dtype=options.bf16).to(device)
        _check_length(options.max_length, model.config)
        self.model = attach_adapter(model, spec)
        self.parameters = adapter_parameters(self.model, spec)
        self.optimizer = GeneratedAdapterOptimizer(
            [self.parameters[tensor.path] for tensor in layout.tensors],
            Generator(layout, layout.provenance.seed),
            lr=options.lr,
            angle_lr=options.angle_lr,
            weight_decay=options.weight_decay,
        )
        self.trainer = self._make_trainer(tokenizer, splits)

    def run(self) -> TrainedGenerator:
        from qpa.evaluation import digest_of_rows

        train_rows, eval_rows = self.trainer.train_dataset, self.trainer.eval_dataset
        data_digest = digest_of_rows(train_rows, eval_rows)
        checkpoint = self._checkpoint_to_resume(data_digest)
        with self.model.disable_adapter():
            base_loss, n_eval_tokens = self._evaluate("evaluating the base model")
        self._fit(checkpoint, data_digest, base_loss)
        eval_loss, _ = self._evaluate("evaluating the adapted model")
        n_steps = self.trainer.state.global_step
        self.log.write(n_steps, {"eval_loss": eval_loss, "eval_tokens": n_eval_tokens})
        result = TrainingResult(
            n_steps=n_steps,
            n_train_tokens=_count_rows(train_rows),
            n_eval_tokens=n_eval_tokens,
            base_loss=base_loss,
            eval_loss=eval_loss,
            data_digest=data_digest,
        )
        return self._document(result, eval_rows[0]["input_ids"])

    def _read_splits(self, tokenizer: Any) -> Any:
        from qpa.text_data import read_splits

        eval_data = Path(self.options.eval_data) if self.options.eval_data else None
        seed = self.context.seed_for("split")
        return read_splits(Path(self.options.data), eval_data, tokenizer, self.options.max_length, seed)

    def _make_trainer(self, tokenizer: Any, splits: Any) -> Any:
        from qpa.sft import make_trainer

        options = self.options
        return make_trainer(
            self.model,
            self.optimizer,
            tokenizer,
            splits,
            output=self.root,
            seed=self.context.seed_for("data order"),
            max_steps=options.max_steps or -1,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.grad_accum,
            max_length=options.max_length,
            learning_rate=options.lr,
            warmup_steps=options.warmup,
            max_grad_norm=options.max_grad_norm,
            bf16=options.bf16,
            logging_steps=10,
        )

    def _checkpoint_to_resume(self, data_digest: str) -> tuple[Path, Checkpoint] | None:
        from qpa.checkpoints import newest_checkpoint

        if not self.options.resume:
            return None
        path, document = newest_checkpoint(self.root, self.provenance)
        if document.data_digest != data_digest:
            raise CheckpointError(str(path), "the data it was trained on", "other data in the same files")
        return path, document

    def _evaluate(self, description: str) -> Any:
        from qpa.evaluation import evaluate

        return evaluate(
            self.model,
            self.trainer.eval_dataset,
            self.trainer.data_collator,
            batch_size=self.options.batch_size,
            bf16=self.options.bf16,
            progress=self.context.progress,
            description=description,
        )

    def _fit(self, checkpoint: tuple[Path, Checkpoint] | None, data_digest: str, base_loss: float) -> None:
        from qpa.sft import GeneratorCallback
        from qpa.training_log import TrainingLog

        self.log = TrainingLog(self.context.files.path / METRICS, checkpoint[1].step + 1 if checkpoint else 0)
        if checkpoint is None:
            shutil.rmtree(self.root, ignore_errors=True)
            self.log.write(0, {"eval_loss": base_loss})
        callback = GeneratorCallback(
            peft_model=self.model,
            optimizer=self.optimizer,
            log=self.log,
            progress=self.context.progress,
            root=self.root,
            save_steps=self.options.save_steps,
            seed=self.context.seed_for("steps"),
            provenance=self.provenance,
            data_digest=data_digest,
            resume_from=checkpoint,
        )
        self.trainer.add_callback(callback)
        try:
            self.trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
        except DivergedError as error:
            kept = (
                f"the last good checkpoint is {callback.last_saved}"
                if callback.last_saved
                else "no checkpoint yet"
            )
            raise DivergedError(
                error.subject, error.expected, error.found, f"{error.advice}; {kept}"
            ) from error

    def _document(self, result: TrainingResult, prompt: list[int]) -> TrainedGenerator:
        import torch
        from safetensors.torch import save

        from qpa.probe import record_probe

        model = self.model.cpu().float()
        generator = {
            name: tensor.cpu().contiguous() for name, tensor in self.optimizer.generator.state_dict().items()
        }
        adapter = {path: parameter.detach().cpu().contiguous() for path, parameter in self.parameters.items()}
        probe = record_probe(model, torch.tensor(prompt))
        put = self.context.files.put
        return TrainedGenerator(
            provenance=self.provenance,
            arrays=put("{sha256}.safetensors", save(generator, {"format": "pt"})),
            adapter=put("{sha256}.safetensors", save(adapter, {"format": "pt"})),
            probe=put("{sha256}.safetensors", save(probe, {"format": "pt"})),
            result=result,
        )


def _check_length(max_length: int, config: Any) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise OptionError("--max-length", f"at most {limit}, the base model's context", str(max_length))


def _count_rows(rows: Any) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])
