"""explain-generator: what each part of a trained generator contributes to the loss.

Rules:
1. The evaluation split of the training is scored with the adapter as it was frozen, with the adapter as it
   started, and once for every change of `qpa.explanation`, each decoded as freezing decodes.
2. A contribution is the loss after a change less the loss of the frozen adapter, on the same rows, with an
   interval (`qpa.explanation.contributions`).
3. Contributions do not add up: parts act together, and each is changed alone.
4. The base is as it is: of a training on rounded weights the losses are not those of the training.

Source: ours; the question is that of QuXAI, arXiv 2505.10167, which asks it of the inputs of classifiers
behind a quantum feature map, by dropping and by permuting them. Parts, changes and intervals are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from qpa.documents import (
    AdapterSpec,
    Contribution,
    Document,
    ExplainedPart,
    Explanation,
    FrozenAdapter,
    Measurement,
    TrainedGenerator,
    WeightLayout,
)
from qpa.errors import DataError
from qpa.passes.freeze_adapter import (
    Scorer,
    context_vector,
    decode_adapter,
    initial_values,
    measured_probabilities,
)
from qpa.pipeline.options import option
from qpa.pipeline.pass_protocol import PassContext
from qpa.training.data.data_options import TrainingData

if TYPE_CHECKING:
    from torch import Tensor

    from qpa.explanation.part import Change, Making, Part, Subject
    from qpa.training.evaluation import RowLosses

N_PERMUTATIONS = 5

SCORING = "scoring the parts"
"""The description of the progress that counts how often the evaluation split was scored."""


@final
@dataclass(frozen=True)
class ExplainGenerator(TrainingData):
    """Change one part of a trained generator at a time, and score what it gives then.

    Args:    data .. chat_template: the data of the training.
             rows: rows of the evaluation split that are scored, drawn with the run's seed; None for all.
             permutations: how many orders of a part's values are tried.
             trust_remote_code: the user allows the model's own Python code to run, now.
    Source:  ours.
    """

    name: ClassVar[str] = "explain-generator"
    consumes: ClassVar[type] = FrozenAdapter
    requires: ClassVar[tuple[type[Document], ...]] = (
        AdapterSpec,
        WeightLayout,
        TrainedGenerator,
        Measurement,
    )
    produces: ClassVar[type[Document]] = Explanation
    section: ClassVar[str] = "explain"

    data: tuple[str, ...] = option(
        help="Data of the training, whose evaluation split is scored.", is_path=True, provenance=False
    )
    rows: int | None = option(
        None, help="Rows of the evaluation split to score, drawn.", at_least=1, shown_default="all"
    )
    permutations: int = option(N_PERMUTATIONS, help="Orders of a part's values to try.", at_least=1)
    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the model.", provenance=False
    )

    def run(self, source: FrozenAdapter, context: PassContext) -> Explanation:
        """Score every change, and say what the parts contribute.

        Raises:  DocumentError: a file is missing or damaged, or a loss is not finite.
                 DataError: the data is not that of the training.
        """
        from qpa.explanation.contributions import contributions
        from qpa.explanation.part import Change
        from qpa.explanation.parts import parts_of, whole_of
        from qpa.explanation.shares import shares_of

        subject = self.subject(context)
        parts = [whole_of(subject), *parts_of(subject)]
        names = [part.name for part in parts for _ in part.groups]
        groups = [(Change,), *(group for part in parts for group in part.groups)]
        scorer = self._scorer(context).with_rows(self.rows, context.seed_for("explained rows"))
        (trained,), *changed = _score(subject, groups, scorer, context)
        found = iter(contributions(trained, changed, names, context.seed_for("bootstrap")))
        shares = shares_of(subject)
        return Explanation(
            provenance=context.provenance(self, source),
            n_rows=len(trained.sums),
            n_tokens=int(trained.weights.sum()),
            n_evaluations=sum(map(len, groups)),
            base_loss=changed[0][0].loss,
            trained_loss=trained.loss,
            gain=next(found),
            parts=tuple(_explained(part, found) for part in parts[1:]),
            places=shares.places,
            directions=shares.directions,
            unused=shares.unused,
        )

    def subject(self, context: PassContext) -> Subject:
        """Return the run's generator, as it was measured and frozen.

        Raises:  DocumentError: a file is missing or damaged.
        """
        from safetensors.torch import load_file

        from qpa.explanation.part import Subject

        measurement, trained = context.document(Measurement), context.document(TrainedGenerator)
        return Subject.of(
            context.document(AdapterSpec),
            context.document(WeightLayout),
            load_file(context.files.get(trained.arrays)),
            measured_probabilities(measurement, context),
            context_vector(measurement, context),
            n_permutations=self.permutations,
            seed=context.seed,
        )

    def _scorer(self, context: PassContext) -> Scorer:
        """Return what scores an adapter on the data of what was measured.

        Raises:  DataError: the data is not that of the training, or the adapter is for a prompt alone.
        """
        spec, trained = context.document(AdapterSpec), context.document(TrainedGenerator)
        measured = context.document(Measurement).context
        if measured is not None and measured.name is None:
            advice = "freeze the run for a context of the training first"
            raise DataError("explain", "an adapter for data of the training", measured.words, advice)
        return Scorer.of(spec, trained, self, context, self.trust_remote_code, measured)


def _score(
    subject: Subject, groups: Sequence[tuple[Making, ...]], scorer: Scorer, context: PassContext
) -> list[list[RowLosses]]:
    """Return the losses of the rows after each change, group by group."""
    n_done, n_total = 0, sum(map(len, groups))
    found: list[list[RowLosses]] = []
    for group in groups:
        found.append([])
        for make in group:
            context.progress(SCORING, n_done, n_total)
            found[-1].append(scorer.row_losses(decode(subject, make())))
            n_done += 1
    context.progress(SCORING, n_done, n_total)
    return found


def decode(subject: Subject, change: Change) -> dict[str, Tensor]:
    """Return the adapter that a changed generator gives, float32 on the CPU, by path."""
    arrays = {**subject.arrays, **change.arrays}
    probabilities = subject.probabilities if change.probabilities is None else change.probabilities
    adapter = decode_adapter(
        subject.spec, subject.layout, arrays, probabilities, subject.vector, change.features
    )
    if not change.reset:
        return adapter
    initial = initial_values(subject.spec, subject.layout, arrays)
    return adapter | {path: initial[path] for path in change.reset}


def _explained(part: Part, found: Iterator[Contribution]) -> ExplainedPart:
    """Return a part with its contributions, the next ones of those that were found."""
    return ExplainedPart(
        kind=part.kind,
        name=part.name,
        ablation=next(found) if part.ablated else None,
        permutation=next(found) if part.permuted else None,
    )
