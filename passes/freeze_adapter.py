"""freeze-adapter: from measured circuits to plain tensors.

Rules:
1. The frozen tensors are what the decoders make of the measurement, added to the initial adapter.
2. Where they agree with what the training process recorded, to float32 rounding, the recorded tensors are
   taken, so that the frozen adapter is the live model's bit for bit, and so is its probe. An exact
   measurement of a generator that was trained exactly always agrees; after any other the adapted model
   answers a probe of its own.
3. An adapter that was trained on a base with rounded weights is for the base as it is. Its tensors are the
   live model's, bit for bit, and its probe is not: the adapter answers once more on the base in full, and is
   scored there where the data is given. What was rounded, and how, stays in the result of the training, whose
   losses are those of the rounded base.
4. How far an adapter of counts is from the one that exact probabilities give is written down: the relative
   error of its weights and, where the training's data is given again, its loss on the evaluation split.
5. An adapter on a shared basis is decoded as `qpa.serve` decodes it, and not by torch, from the angles
   where the measurement is exact. The training has set the live model to the same bits.
6. Nothing downstream needs the generator, the layout or a circuit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, cast, final

from qpa.circuits.circuit import Circuit
from qpa.documents import (
    AdapterSpec,
    Attachment,
    DataSummary,
    Document,
    FrozenAdapter,
    MeasuredContext,
    Measurement,
    TrainedGenerator,
    WeightLayout,
)
from qpa.documents.trained_generator import INITIAL_PREFIX
from qpa.errors import DataError, DocumentError, VerificationError, one_sentence
from qpa.pipeline.options import option
from qpa.pipeline.pass_protocol import PassContext
from qpa.training.data.data_options import TrainingData, names_of

if TYPE_CHECKING:
    from torch import Tensor

    from qpa.progress import Progress
    from qpa.training.data.token_rows import Row
    from qpa.training.evaluation import RowLosses
    from qpa.training.objectives.objective import Objective
    from qpa.training.training_options import TrainingOptions

TOLERANCE = 1e-5


@final
@dataclass(frozen=True, slots=True)
class FreezeAdapter(TrainingData):
    """Keep the generated weights and leave the generator behind.

    Args:    data .. chat_template: the data of the training, to score an adapter that is not the live one.
             trust_remote_code: the user allows the model's own Python code to run, now.
    Source:  ours.
    """

    name: ClassVar[str] = "freeze-adapter"
    consumes: ClassVar[type] = Measurement
    requires: ClassVar[tuple[type[Document], ...]] = (AdapterSpec, WeightLayout, TrainedGenerator)
    produces: ClassVar[type[Document]] = FrozenAdapter
    section: ClassVar[str] = "train"

    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the model.", provenance=False
    )

    def run(self, source: Measurement, context: PassContext) -> FrozenAdapter:
        """Decode the measurement and describe the adapter.

        Raises:  DocumentError: a file is missing or damaged, or an exact measurement gives another adapter
                 than the one that was trained.
                 DataError: the data is not that of the training.
        """
        from safetensors.torch import load_file

        spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
        trained = context.document(TrainedGenerator)
        vector, live = context_vector(source, context), trained.live(source.context_name)
        recorded = load_file(context.files.get(live.adapter))
        arrays = load_file(context.files.get(trained.arrays))
        probabilities = measured_probabilities(source, context)
        generated = frozen_values(spec, layout, arrays, source, probabilities, vector)
        _check_names(recorded, generated)
        difference = _difference(recorded, generated)
        is_live = source.context is None or source.context.name is not None
        is_the_same = is_live and source.source == trained.source and source.shots is None
        if is_the_same and difference is not None:
            raise difference
        adapter, probe, result = live
        weight_error: float | None = 0.0
        frozen_loss: float | None = result.eval_loss
        if difference is not None or trained.result.quantization is not None:
            values = recorded if difference is None else generated
            probe, frozen_loss = self._ask(spec, values, trained, source, context)
        if difference is not None:
            adapter = context.put_tensors(generated)
            weight_error = relative_error(spec, layout, arrays, generated, vector)
        return FrozenAdapter(
            provenance=context.provenance(self, source),
            base=spec.base,
            method=spec.method,
            rank=spec.rank,
            alpha=spec.alpha,
            target_modules=spec.target_modules,
            target_parameters=spec.target_parameters,
            fan_in_fan_out=spec.fan_in_fan_out,
            tensors=tuple(tensor.ref for tensor in spec.tensors),
            arrays=adapter,
            probe=probe,
            source=source.source,
            shots=source.shots,
            weight_error=weight_error,
            frozen_loss=frozen_loss,
            generator=layout.generator,
            account=layout.account,
            result=result,
            context=source.context.words if source.context else None,
        )

    def _ask(
        self,
        spec: AdapterSpec,
        adapter: dict[str, Tensor],
        trained: TrainedGenerator,
        measured: Measurement,
        context: PassContext,
    ) -> tuple[Attachment, float | None]:
        """Return the probe and the loss of the base as it is with an adapter, not of the live model."""
        from safetensors.torch import load_file

        from qpa.models.probe import record_probe

        context.progress("asking the adapted model", 0, 1)
        scorer = Scorer.of(spec, trained, self, context, self.trust_remote_code, measured.context)
        loss = scorer.loss(adapter)
        probe = trained.live(measured.context_name).probe
        prompt = load_file(context.files.get(probe))["input_ids"]
        return context.put_tensors(record_probe(scorer.model, prompt)), loss


@dataclass(frozen=True)
class Scorer:
    """The base model with an adapter, and how the training scored it.

    Args:    model: with the adapter, float32 on the CPU.
             parameters: the adapter's, by path.
             objective: of the training; None where there is no data.
             rows: its evaluation split.
             progress: called while rows are scored.
    """

    model: Any
    parameters: Any
    objective: Objective | None
    rows: Sequence[Row]
    progress: Progress

    @classmethod
    def of(
        cls,
        spec: AdapterSpec,
        trained: TrainedGenerator,
        data: TrainingData,
        context: PassContext,
        trust_remote_code: bool = False,
        measured: MeasuredContext | None = None,
    ) -> Scorer:
        """Load the base model, and read the training's data again where it is given.

        Args:    measured: the context whose data scores; where it is a prompt, no data is its own.

        Raises:  DataError: the data is not that of the training.
        """
        from qpa.adapters.attach import adapter_parameters, attach_adapter
        from qpa.adapters.parent import parent_of
        from qpa.models.base_model import load_model, load_tokenizer
        from qpa.seeds import split_seed
        from qpa.training.data.splits import Splits
        from qpa.training.objectives.objective import OBJECTIVES
        from qpa.training.tasks import digest_of, read_tasks, together

        base = load_model(spec.base, keep_dtype=False, trust_remote_code=trust_remote_code)
        model = attach_adapter(base, spec, parent=parent_of(spec, context))
        parameters = adapter_parameters(model, spec)
        if data.data is None or (measured is not None and measured.name is None):
            return cls(model, parameters, None, (), context.progress)
        options = _options_of(trained, data)
        tokenizer = load_tokenizer(spec.base, trust_remote_code=trust_remote_code)
        objective = OBJECTIVES[options.objective](options, tokenizer)
        seed = split_seed(trained.provenance.seed, "split")
        tasks = read_tasks(options, tokenizer, context.document(WeightLayout).features.contexts, seed)
        splits = together(tasks) if tasks else objective.rows(seed)
        if digest_of(splits, tasks) != trained.result.data_digest:
            raise _other_data(data, trained, splits.summary)
        if measured is not None:
            splits = next(task.splits for task in tasks if task.name == measured.name)
        to_score = Splits([], splits.evaluation, splits.summary)
        scored = objective.with_reference(model, to_score, context.progress).evaluation
        return cls(model, parameters, objective, scored, context.progress)

    def with_rows(self, n_rows: int | None, seed: int) -> Scorer:
        """Return a scorer of so many rows, drawn without replacement and in their order; None is all."""
        if n_rows is None or n_rows >= len(self.rows):
            return self
        drawn = Random(seed).sample(range(len(self.rows)), n_rows)
        return replace(self, rows=[self.rows[index] for index in sorted(drawn)])

    def row_losses(self, adapter: dict[str, Tensor]) -> RowLosses:
        """Give the model an adapter, and return the losses of single rows; the data has to be there."""
        from qpa.adapters.attach import set_adapter

        assert self.objective is not None
        set_adapter(self.parameters, adapter)
        return self.objective.row_losses(self.model, self.rows)

    def loss(self, adapter: dict[str, Tensor]) -> float | None:
        """Give the model an adapter, and return its loss on the training's evaluation split."""
        from qpa.adapters.attach import set_adapter
        from qpa.training.objectives.objective import LOSS

        set_adapter(self.parameters, adapter)
        if self.objective is None:
            return None
        words = "evaluating the frozen adapter"
        return self.objective.scores(self.model, self.rows, self.progress, words)[LOSS]


def _options_of(trained: TrainedGenerator, data: TrainingData) -> TrainingOptions:
    """Return the options of a training, with the places where its data is now."""
    from qpa.training.training_options import TrainingOptions

    revisions = {one.revision for one in trained.data.hub} if trained.data else set()
    revision = data.data_revision or (revisions.pop() if len(revisions) == 1 else None)
    return TrainingOptions(
        data=data.data or (),
        eval_data=data.eval_data,
        data_revision=revision,
        chat_template=data.chat_template,
        **cast(Any, trained.provenance.option_values),
    )


def _other_data(data: TrainingData, trained: TrainedGenerator, found: DataSummary | None) -> DataError:
    """Return the error for data that gives other rows than those of the training."""
    before = trained.data.chat_template if trained.data else None
    differs = before is not None and found is not None and found.chat_template != before
    advice = "give its `chat_template` too" if differs else ""
    words = "another chat template" if differs else "other data"
    return DataError(", ".join(names_of(data.data or ())), "the data of the training", words, advice)


def check_frozen(context: PassContext) -> tuple[Measurement, int]:
    """Freeze a run's measurement once more, from its counts, and compare bit for bit.

    Returns: the measurement, and how many tensors are equal. An adapter of exact probabilities is the live
             one, which its own generator gives to float32 rounding.
    Raises:  VerificationError: the counts give other probabilities, or these another adapter.
             DocumentError: a file is missing or damaged.
    """
    from safetensors.torch import load_file

    from qpa.passes.measure_circuit import probabilities_of

    frozen, measurement = context.document(FrozenAdapter), context.document(Measurement)
    spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
    trained = context.document(TrainedGenerator)
    probabilities, again = (
        measured_probabilities(measurement, context),
        probabilities_of(measurement, context),
    )
    if probabilities is not None and again is not None and not again.equal(probabilities):
        raise VerificationError(measurement.kind, "the probabilities that its counts give", "others")
    for run in (measurement, trained):
        for kept_file in (run.circuit, run.device):
            if kept_file is not None:
                context.files.get(kept_file)
    arrays = load_file(context.files.get(trained.arrays))
    kept = load_file(context.files.get(frozen.arrays))
    vector = context_vector(measurement, context)
    found = frozen_values(spec, layout, arrays, measurement, probabilities, vector)
    is_live = frozen.arrays == trained.live(measurement.context_name).adapter
    for path, tensor in found.items():
        same = (
            _difference({path: kept[path]}, {path: tensor}) is None if is_live else kept[path].equal(tensor)
        )
        if not same:
            raise VerificationError(path, "the numbers that the measurement gives", "others", "freeze again")
    return measurement, len(found)


def frozen_values(
    spec: AdapterSpec,
    layout: WeightLayout,
    arrays: dict[str, Tensor],
    measurement: Measurement,
    probabilities: Tensor | None,
    vector: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the tensors that are frozen, see rules 1 and 5; the arguments are those of `decode_adapter`."""
    from qpa.adapters.attach import initial_adapter
    from qpa.generators.canonical import canonical_adapter, refusal

    if spec.basis is None or refusal(layout) is not None:
        return decode_adapter(spec, layout, arrays, probabilities, vector)
    kept = kept_probabilities(layout, measurement, probabilities)
    return canonical_adapter(spec, layout, arrays, initial_adapter(spec), kept)


def kept_probabilities(
    layout: WeightLayout, measurement: Measurement, probabilities: Tensor | None
) -> Tensor | None:
    """Return what a compact file keeps in the place of the angles; None where it keeps the angles."""
    from qpa.generators.canonical import keeps_probabilities

    is_exact = measurement.source == "exact" and measurement.shots is None
    return None if is_exact and not keeps_probabilities(layout) else probabilities


def relative_error(
    spec: AdapterSpec,
    layout: WeightLayout,
    arrays: dict[str, Tensor],
    found: dict[str, Tensor],
    vector: Tensor | None = None,
) -> float | None:
    """Return ||found - exact|| / ||exact - initial|| over the tensors that differ from the exact ones.

    A tensor that no circuit changes, such as one of fixed directions, says nothing. None where the exact ones
    are the initial ones.
    """
    import torch

    from qpa.generators.generator import angles_of

    circuit = Circuit(layout.ansatz)
    probabilities = None
    if layout.features.has_circuits:
        probabilities = circuit.exact_probabilities(angles_of(layout, arrays, vector))
    exact = decode_adapter(spec, layout, arrays, probabilities, vector)
    initial = initial_values(spec, layout, arrays)
    paths = [path for path in exact if not torch.equal(exact[path], found[path])]
    if not paths:
        return 0.0
    wrong = torch.stack([(found[path] - exact[path]).norm() for path in paths]).norm()
    moved = torch.stack([(exact[path] - initial[path]).norm() for path in paths]).norm()
    return float(wrong / moved) if moved > 0 else None


def decode_adapter(
    spec: AdapterSpec,
    layout: WeightLayout,
    arrays: dict[str, Tensor],
    probabilities: Tensor | None,
    vector: Tensor | None = None,
    features: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return initial + decoded for a trained generator's arrays, float32 on the CPU, by path.

    Args:    probabilities: float32[n_circuits, 2**n_qubits], as they were measured; None for a control.
             vector: of the context, float32[size]; None where the layout has none.
             features: float32[2**n_qubits, n_features], to be decoded in the place of those that the
             probabilities give.
    Raises:  DocumentError: the arrays or the probabilities are not this layout's.
    """
    import torch

    from qpa.generators.generator import load_generator

    initial = initial_values(spec, layout, arrays)
    generator = load_generator(layout, arrays, vector)
    try:
        with torch.no_grad():
            seen = generator.features(probabilities) if features is None else features
            outputs = [output.detach() for output in generator.decode(seen)]
    except (RuntimeError, IndexError) as error:
        expected, found = "tensors of this layout", one_sentence(error)
        raise DocumentError("the generator's arrays", expected, found, "train again") from error
    values = dict(initial)  # what a generator leaves alone stays as it started
    for tensor, output in zip(layout.tensors, outputs, strict=True):
        values[tensor.path] = initial[tensor.path] + output
    return {tensor.path: values[tensor.path] for tensor in spec.tensors}


def initial_values(spec: AdapterSpec, layout: WeightLayout, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter as the training started with it, float32 on the CPU, by path.

    Raises:  DocumentError: the arrays lack values that the base model or the parent gave.
    """
    from qpa.adapters.attach import initial_adapter
    from qpa.generators.chunks import kept_rows

    given = _given(arrays)
    _check_given(spec, given)
    return initial_adapter(spec, kept_rows(layout), given)


def _given(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the initial values that the base model or the parent gave, by path."""
    return {
        name.removeprefix(INITIAL_PREFIX): array
        for name, array in arrays.items()
        if name.startswith(INITIAL_PREFIX)
    }


def context_vector(measurement: Measurement, context: PassContext) -> Tensor | None:
    """Return float32[size], the context that was measured; None where the layout has none."""
    if measurement.context is None:
        return None
    return _only_array(measurement.context.vector, "context", context)


def measured_probabilities(measurement: Measurement, context: PassContext) -> Tensor | None:
    if measurement.probabilities is None:
        return None
    return _only_array(measurement.probabilities, "probabilities", context)


def _only_array(attachment: Attachment, name: str, context: PassContext) -> Tensor:
    from safetensors.torch import load_file

    path = context.files.get(attachment)
    arrays = load_file(path)
    if arrays.keys() != {name}:
        raise DocumentError(str(path), f"one tensor, {name}", ", ".join(sorted(arrays)) or "none")
    array: Tensor = arrays[name]
    return array


def _check_given(spec: AdapterSpec, found: dict[str, Tensor]) -> None:
    expected = {tensor.path: tensor.shape for tensor in spec.given}
    for path in sorted(expected.keys() | found.keys()):
        shape = tuple(found[path].shape) if path in found else None
        if shape != expected.get(path):
            wanted = f"initial values of shape {expected.get(path)}"
            raise DocumentError(path, wanted, str(shape), "train again")


def _check_names(recorded: dict[str, Tensor], generated: dict[str, Tensor]) -> None:
    if recorded.keys() != generated.keys():
        raise DocumentError(
            "the recorded adapter", f"{len(generated)} tensors", f"{len(recorded)} other tensors"
        )
    for path, tensor in generated.items():
        if recorded[path].shape != tensor.shape:
            raise DocumentError(path, f"shape {tuple(tensor.shape)}", str(tuple(recorded[path].shape)))


def _difference(recorded: dict[str, Tensor], generated: dict[str, Tensor]) -> DocumentError | None:
    """Return what differs by more than float32 rounding, as an error to be raised where it is one."""
    for path, tensor in generated.items():
        scale = max(1.0, float(tensor.abs().max()))
        difference = float((recorded[path] - tensor).abs().max())
        if not difference <= TOLERANCE * scale:
            found = f"a difference of {difference:.1e}"
            return DocumentError(path, "what the generator gives", found, "train again")
    return None
