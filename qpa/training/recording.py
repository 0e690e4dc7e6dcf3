"""What a training leaves in a run: the generator, its adapters with their probes, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qpa.adapters.attach import adapter_parameters, set_adapter, wrap_model
from qpa.adapters.parameter_view import AdapterParameter
from qpa.documents import (
    AdapterSpec,
    ChosenBank,
    Score,
    TrainedContext,
    TrainedGenerator,
    TrainingResult,
)
from qpa.documents.trained_generator import INITIAL_PREFIX
from qpa.models.base_model import load_model
from qpa.models.probe import record_probe
from qpa.training.circuits import files_of_circuit, gradient_name
from qpa.training.evaluation import count_row_tokens
from qpa.training.objectives.objective import LOSS, PERPLEXITY
from qpa.training.preparation import Session
from qpa.training.tasks import score_name


def adapters_of(session: Session) -> list[dict[str, Tensor]]:
    """Return the adapter of each context, float32 on the CPU, by path; or the only one there is."""
    adapters = []
    for index in range(max(1, len(session.tasks))):
        if session.tasks:
            session.adapted.optimizer.use_context(index)
        parameters = session.adapted.parameters.items()
        adapters.append({path: one.detach().cpu().clone().contiguous() for path, one in parameters})
    return adapters


def record(
    session: Session,
    adapters: Sequence[Mapping[str, Tensor]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    n_steps: int,
    frozen_step: int,
    bank: ChosenBank | None,
) -> TrainedGenerator:
    """Leave generator, adapters and probes of the adapted model in the files, and return their document.

    The model is on the CPU and in float32 afterwards, unless its weights were quantised.

    Args:    adapters: of each context, or the only one.
             before, after: the scores of the base model and of what is frozen.
             n_steps: the steps that were taken.
             frozen_step: the step after which the generator was as it is now.
             bank: whose directions it has.
    """
    adapted, splits, options = session.adapted, session.splits, session.options
    model, parameters = _whole_model(session)
    model = model if options.quantize else model.cpu().float()
    arrays = {name: tensor.cpu().contiguous() for name, tensor in adapted.generator.state_dict().items()}
    arrays |= {f"{INITIAL_PREFIX}{path}": tensor for path, tensor in adapted.given.items()}
    put = session.context.put_tensors
    kept = []
    for adapter, rows in zip(adapters, [task.splits for task in session.tasks] or [splits], strict=True):
        set_adapter(parameters, adapter)
        probe = record_probe(model, torch.tensor(rows.evaluation[0]["input_ids"]))
        kept.append({"adapter": put(adapter), "probe": put(probe)})
    return TrainedGenerator(
        provenance=session.provenance,
        arrays=put(arrays),
        adapter=kept[0]["adapter"],
        probe=kept[0]["probe"],
        source=options.source,
        shots=options.shots,
        backend=options.backend,
        **files_of_circuit(options, session.context),
        gradient=gradient_name(options),
        result=_result(session, before, after, n_steps, frozen_step),
        data=splits.summary,
        bank=bank,
        contexts=tuple(
            TrainedContext(
                name=task.name,
                **files,
                n_train_tokens=count_row_tokens(task.splits.training),
                n_eval_tokens=count_row_tokens(task.splits.evaluation),
                base_loss=before[score_name(task.name)],
                eval_loss=after[score_name(task.name)],
            )
            for task, files in zip(session.tasks, kept, strict=False)
        ),
    )


def _result(
    session: Session,
    before: Mapping[str, float],
    after: Mapping[str, float],
    n_steps: int,
    frozen_step: int,
) -> TrainingResult:
    return TrainingResult(
        n_steps=n_steps,
        n_train_tokens=count_row_tokens(session.splits.training),
        n_eval_tokens=count_row_tokens(session.splits.evaluation),
        base_loss=before[LOSS],
        eval_loss=after[LOSS],
        data_digest=session.data_digest,
        frozen_step=frozen_step,
        objective=session.options.objective,
        scores=tuple(
            Score(name=name, base=before[name], adapted=after[name])
            for name in before
            if name not in (LOSS, PERPLEXITY)
        ),
        quantization=session.options.quantize,
    )


def _whole_model(session: Session) -> tuple[Any, Mapping[str, AdapterParameter]]:
    """Return the adapted model without autocast, and its adapter by path.

    Of a model whose processes hold a share each it is another copy.
    """
    if not session.processes.is_sharded:
        # A trainer puts its autocast around its model's own function, and leaves it there.
        session.trainer.accelerator.unwrap_model(session.trainer.model, keep_fp32_wrapper=False)
        return session.adapted.model, session.adapted.parameters
    options, context = session.options, session.context
    spec = context.document(AdapterSpec)
    trust = options.trust_remote_code
    base = load_model(spec.base, keep_dtype=options.autocast_to is not None, trust_remote_code=trust)
    model = wrap_model(base, spec)
    return model, adapter_parameters(model, spec)
