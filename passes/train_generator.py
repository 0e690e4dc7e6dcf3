"""train-generator: the only pass that touches base weights and data.

Rules:
1. The base model carries an ordinary adapter (`qpa.adapters.attach`) and trains under TRL's SFTTrainer, or
   under transformers' Trainer what TRL does not take; the generator lives in the optimizer
   (`qpa.training.optimizer`).
2. Delta W is exactly zero before the first step: the plan's seed draws lora_A and the angles, lora_B and
   the decoders' last layers are zero. (A prefix alone changes the model from the start.) Directions of
   spectra are those of the gradient of a few batches of the training split, read before the first step
   (`qpa.training.calibration`).
3. Everything random during training is a function of the training seed and the step, so a resumed
   training continues with the same bits.
4. Losses count real tokens only: padding and the prompt of prompt/completion rows do not.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.adapters.registry import KINDS
from qpa.circuits.gradients.estimator import GRADIENTS
from qpa.circuits.sources.source import SOURCES
from qpa.documents import (
    AdapterSpec,
    Checkpoint,
    Document,
    FrozenAdapter,
    LogicalCircuit,
    Measurement,
    TrainedGenerator,
    TrainingResult,
    WeightLayout,
)
from qpa.documents.trained_generator import INITIAL_PREFIX, perplexity
from qpa.errors import CheckpointError, DivergedError, OptionError
from qpa.generators.generator import GENERATORS
from qpa.models.base_model import DEVICES
from qpa.pipeline.options import check_options, defaults_by_name, option
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import CHECKPOINTS, METRICS

if TYPE_CHECKING:
    from qpa.training.training_log import TrainingLog

MAX_NUMBER = 1e6
"""Above any sensible learning rate, number of epochs or warm-up, and within float32."""


@final
@dataclass(frozen=True, slots=True)
class TrainGenerator:
    """Train angles and decoders through the loss of the base model.

    Args:    data, eval_data: text or jsonl files, see `qpa.training.text_data`.
             max_steps: optimizer steps; None means `epochs` passes over the data.
             batch_size, grad_accum: rows per micro-batch, micro-batches per step.
             max_length: tokens per row.
             source: what runs the circuits, a name in `qpa.circuits.sources.source.SOURCES`.
             gradient: how gradients are pulled back through it, a name in
             `qpa.circuits.gradients.estimator.GRADIENTS`.
             lr: peak learning rate of the decoders, with cosine decay to zero; None means what suits the
             generator.
             angle_lr: of the angles; None means the decoders'.
             warmup: steps of linear warm-up, or below 1 the share of all steps.
             bf16: bfloat16 autocast, base weights in the checkpoint's own dtype.
             device: "auto", "cpu" or "cuda".
             trust_remote_code: let the model's own Python code run.
             save_steps: steps between checkpoints.
             resume: continue from the newest checkpoint; the result is the same, to the bit.
    Source:  ours.
    """

    name: ClassVar[str] = "train-generator"
    consumes: ClassVar[type] = LogicalCircuit
    requires: ClassVar[tuple[type[Document], ...]] = (AdapterSpec, WeightLayout)
    produces: ClassVar[type[Document]] = TrainedGenerator
    section: ClassVar[str] = "train"

    # What the files hold is pinned by a digest; where they are changes nothing.
    data: str = option(
        help='Text, or jsonl with "text" or with "prompt" and "completion".', is_path=True, provenance=False
    )
    eval_data: str | None = option(
        None,
        help="Evaluation split.",
        is_path=True,
        shown_default="a tenth of `data`, held out",
        provenance=False,
    )
    max_steps: int | None = option(None, help="Optimizer steps, instead of `epochs`.", at_least=1)
    epochs: float = option(1.0, help="Passes over the data.", above=0, at_most=MAX_NUMBER)
    batch_size: int = option(8, help="Rows per micro-batch.", at_least=1)
    grad_accum: int = option(1, help="Micro-batches per optimizer step.", at_least=1)
    max_length: int = option(256, help="Tokens per row.", at_least=2, unit="tokens")
    source: str = option("exact", help="What runs the circuits: {choices}.", choices=SOURCES)
    gradient: str = option(
        "adjoint", help="How gradients are pulled back through `source`: {choices}.", choices=GRADIENTS
    )
    lr: float | None = option(
        None,
        help="Peak learning rate of the decoder.",
        above=0,
        at_most=MAX_NUMBER,
        shown_default=lambda: _default_rates(),
    )
    angle_lr: float | None = option(
        None,
        help="Peak learning rate of the circuit's angles.",
        at_least=0,
        at_most=MAX_NUMBER,
        shown_default="as `lr`",
    )
    warmup: float = option(
        0.05,
        help="Steps of linear warm-up; below 1, the share of all steps.",
        at_least=0,
        at_most=MAX_NUMBER,
    )
    bf16: bool = option(False, help="bfloat16 autocast; the adapter stays float32.")
    device: str = option("auto", help="{choices}.", choices=DEVICES)
    save_steps: int = option(100, help="Steps between checkpoints.", at_least=1, provenance=False)
    resume: bool = option(False, help="Continue from the newest checkpoint.", provenance=False)
    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the model.", provenance=False
    )

    def run(self, source: LogicalCircuit, context: PassContext) -> TrainedGenerator:
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
            advice = (
                "for several, use qpa.training.optimizer.GeneratedAdapterOptimizer in a script of your own"
            )
            raise OptionError("qpa train", "one process", f"WORLD_SIZE={n_processes}", advice)
        check_options(self)


class _Training:
    """One training: the model, its generator's optimizer, and TRL's trainer around them."""

    def __init__(self, options: TrainGenerator, source: LogicalCircuit, context: PassContext) -> None:
        from qpa.adapters.attach import adapter_parameters, attach_adapter
        from qpa.adapters.registry import KINDS
        from qpa.circuits.circuit import load_circuit
        from qpa.circuits.execution import Execution
        from qpa.generators.chunks import kept_rows
        from qpa.generators.generator import make_generator
        from qpa.models.base_model import load_model, load_tokenizer, torch_device
        from qpa.training.optimizer import GeneratedAdapterOptimizer

        self.options, self.context = options, context
        self.provenance = context.provenance(options, source)
        self.root = context.files.path / CHECKPOINTS
        spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
        device = torch_device(options.device)
        trust = options.trust_remote_code
        context.progress("loading the base model and the data", 0, 1)
        tokenizer = load_tokenizer(spec.base, trust_remote_code=trust)
        splits = self._read_splits(tokenizer)
        model = load_model(spec.base, keep_dtype=options.bf16, trust_remote_code=trust).to(device)
        n_before = KINDS[spec.method].n_positions(spec.rank)
        _check_length(options.max_length, n_before, model.config)
        self.lr, self.angle_lr = _learning_rates(options, spec, layout)
        self.model = attach_adapter(model, spec, kept_rows(layout))
        self.parameters = adapter_parameters(self.model, spec)
        self.from_base = {
            f"{INITIAL_PREFIX}{tensor.path}": self.parameters[tensor.path].detach().cpu().clone()
            for tensor in spec.tensors
            if tensor.initial == "base"
        }
        circuit = load_circuit(context, native=SOURCES[options.source].runs_native)
        execution = Execution.named(circuit, options.source, options.gradient, context.seed_for("circuits"))
        self.optimizer = GeneratedAdapterOptimizer(
            [self.parameters[tensor.path] for tensor in layout.tensors],
            make_generator(layout, layout.seed, execution=execution),
            lr=self.lr,
            angle_lr=self.angle_lr,
        )
        self.trainer = self._make_trainer(tokenizer, splits)
        self.n_steps = self._count_steps()

    def run(self) -> TrainedGenerator:
        from qpa.training.checkpoints import restore_optimizer
        from qpa.training.evaluation import digest_of_rows

        train_rows, eval_rows = self.trainer.train_dataset, self.trainer.eval_dataset
        data_digest = digest_of_rows(train_rows, eval_rows)
        checkpoint = self._checkpoint_to_resume(data_digest)
        with self.model.disable_adapter():
            base_loss, n_eval_tokens = self._evaluate("evaluating the base model", 0)
        log = self._open_log(checkpoint, base_loss)
        if checkpoint is None:
            self._calibrate()
        if checkpoint is None or checkpoint[1].step < self.n_steps:
            self._fit(checkpoint, data_digest, log)
        else:
            restore_optimizer(checkpoint[0], self.optimizer, checkpoint[1])
        eval_loss, _ = self._evaluate("evaluating the adapted model", self.n_steps)
        log.write(self.n_steps, {"eval_loss": eval_loss, "eval_perplexity": perplexity(eval_loss)})
        result = TrainingResult(
            n_steps=self.n_steps,
            n_train_tokens=_count_rows(train_rows),
            n_eval_tokens=n_eval_tokens,
            base_loss=base_loss,
            eval_loss=eval_loss,
            data_digest=data_digest,
        )
        return self._document(result, eval_rows[0]["input_ids"])

    def _read_splits(self, tokenizer: Any) -> Any:
        from qpa.training.text_data import read_splits

        eval_data = Path(self.options.eval_data) if self.options.eval_data else None
        seed = self.context.seed_for("split")
        return read_splits(Path(self.options.data), eval_data, tokenizer, self.options.max_length, seed)

    def _calibrate(self) -> None:
        """Give the generator's spectra the directions of the gradient of a few training batches."""
        import torch

        from qpa.models.base_model import torch_device
        from qpa.training.calibration import choose_rows, gradient_bases

        rows, batch_size = self.trainer.train_dataset, self.options.batch_size
        chosen = choose_rows(len(rows), batch_size, self.context.seed_for("calibration"))
        batches = [self.trainer.data_collator([rows[i] for i in batch]) for batch in chosen]
        device = torch_device(self.options.device)

        def loss(batch: Any) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=self.options.bf16):
                answer = self.model(**{name: tensor.to(device) for name, tensor in batch.items()})
                mean: torch.Tensor = answer.loss
                return mean

        self.context.progress("reading the gradient", 0, 1)
        generator, spec = self.optimizer.generator, self.context.document(AdapterSpec)
        generator.set_bases(gradient_bases(self.parameters, spec, generator.layout, loss, batches))
        self.optimizer.push_forward()

    def _make_trainer(self, tokenizer: Any, splits: Any) -> Any:
        from qpa.training.objectives.sft import make_trainer

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
            learning_rate=self.lr,
            bf16=options.bf16,
            logging_steps=10,
        )

    def _count_steps(self) -> int:
        """Return how many optimizer steps there will be, and set the warm-up by it.

        A share of the steps is rounded down: the trainer would round it up, and train nothing in one step.
        """
        n_batches = math.ceil(len(self.trainer.train_dataset) / self.options.batch_size)
        n_per_epoch = math.ceil(n_batches / self.options.grad_accum)
        n_steps = self.options.max_steps or math.ceil(self.options.epochs * n_per_epoch)
        warmup = self.options.warmup
        self.trainer.args.warmup_steps = int(warmup * n_steps if warmup < 1 else warmup)
        return n_steps

    def _checkpoint_to_resume(self, data_digest: str) -> tuple[Path, Checkpoint] | None:
        from qpa.training.checkpoints import newest_checkpoint

        if not self.options.resume:
            return None
        path, document = newest_checkpoint(self.root, self.provenance)
        if document.data_digest != data_digest:
            raise CheckpointError(str(path), "the data it was trained on", "other data in the same files")
        return path, document

    def _evaluate(self, description: str, step: int) -> Any:
        from qpa.training.evaluation import evaluate

        score = evaluate(
            self.model,
            self.trainer.eval_dataset,
            self.trainer.data_collator,
            batch_size=self.options.batch_size,
            bf16=self.options.bf16,
            progress=self.context.progress,
            description=description,
        )
        if not math.isfinite(score.loss):
            advice = "lower `lr` or `angle_lr`" if step else "the base model itself gives it"
            raise DivergedError(f"step {step}", "a finite evaluation loss", str(score.loss), advice)
        return score

    def _open_log(self, checkpoint: tuple[Path, Checkpoint] | None, base_loss: float) -> TrainingLog:
        """Start metrics.jsonl over, together with checkpoints and results, or cut it at the checkpoint."""
        from qpa.store.atomic_files import remove_leftovers
        from qpa.training.checkpoints import remove_checkpoints
        from qpa.training.training_log import TrainingLog

        folder = self.context.files.path
        if checkpoint is not None:
            remove_leftovers(self.root)
            return TrainingLog(folder / METRICS, checkpoint[1].step)
        for kind in (TrainedGenerator, Measurement, FrozenAdapter):
            (folder / kind.file_name()).unlink(missing_ok=True)
        remove_checkpoints(self.root)
        log = TrainingLog(folder / METRICS)
        log.write(0, {"eval_loss": base_loss, "eval_perplexity": perplexity(base_loss)})
        return log

    def _fit(self, checkpoint: tuple[Path, Checkpoint] | None, data_digest: str, log: TrainingLog) -> None:
        from qpa.training.objectives.sft import GeneratorCallback

        callback = GeneratorCallback(
            peft_model=self.model,
            optimizer=self.optimizer,
            log=log,
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

        from qpa.models.probe import record_probe

        model = self.model.cpu().float()
        state = self.optimizer.generator.state_dict()
        generator = {name: tensor.cpu().contiguous() for name, tensor in state.items()} | self.from_base
        adapter = {path: parameter.detach().cpu().contiguous() for path, parameter in self.parameters.items()}
        probe = record_probe(model, torch.tensor(prompt))
        put = self.context.files.put
        return TrainedGenerator(
            provenance=self.provenance,
            arrays=put("{sha256}.safetensors", save(generator, {"format": "pt"})),
            adapter=put("{sha256}.safetensors", save(adapter, {"format": "pt"})),
            probe=put("{sha256}.safetensors", save(probe, {"format": "pt"})),
            source=self.options.source,
            gradient=self.options.gradient,
            result=result,
        )


def _learning_rates(options: TrainGenerator, spec: AdapterSpec, layout: WeightLayout) -> tuple[float, float]:
    """Return the peak learning rates of decoders and angles."""
    lr = GENERATORS[layout.generator].rate(spec) if options.lr is None else options.lr
    return lr, lr if options.angle_lr is None else options.angle_lr


def _default_rates() -> str:
    """Return the default learning rates: the first generator's, those of kinds of adapters, the others'."""
    words = {name: GENERATORS[name].defaults.get("lr") for name in GENERATORS}
    own = {name: float(rate) for name, rate in words.items() if rate is not None}
    of_kinds = {name: rate for name in KINDS if (rate := KINDS[name].rate) is not None}
    first = next(iter(own))
    return defaults_by_name({first: own.pop(first), **of_kinds, **own})


def _check_length(max_length: int, n_before: int, config: Any) -> None:
    """Check that the text fits the base model's context behind a prefix's tokens."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length + n_before > limit:
        prefix = f" less the prefix's {n_before} tokens" if n_before else ""
        expected = f"at most {limit - n_before}, the base model's context{prefix}"
        raise OptionError("max_length", expected, str(max_length))


def _count_rows(rows: Any) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])
