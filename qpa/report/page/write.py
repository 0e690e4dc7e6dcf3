"""Write the page of a run: what its documents, log and exports say, in one file.

The page is a function of these, of the prompts and of where the run is: the same bytes each time.
What the run does not have yet is said in a sentence, or left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from qpa import __version__
from qpa.adapters.registry import KINDS
from qpa.documents import (
    AdapterSpec,
    Document,
    Explanation,
    FrozenAdapter,
    LogicalCircuit,
    Measurement,
    NativeCircuit,
    Selection,
    TrainedContext,
    TrainedGenerator,
    TrainingResult,
    WeightLayout,
    read_manifest,
)
from qpa.documents.manifest import FORMATS
from qpa.documents.trained_generator import perplexity_text
from qpa.documents.verification import read_verification
from qpa.errors import DocumentError, ModelError
from qpa.explanation.parts import left_out
from qpa.exporters.format import INT16, Exported
from qpa.exporters.registry import found_file
from qpa.pipeline.pass_protocol import PassContext, newest
from qpa.pipeline.stages import STAGES
from qpa.progress import Progress, silent
from qpa.report.circuits import circuit_rows, measurement_rows
from qpa.report.data import DATA_HEADER, data_rows
from qpa.report.explanation import contribution_text, parts_title
from qpa.report.exports import VERIFICATION_HEADER, verification_rows, verification_title
from qpa.report.facts import account_rows, adapter_words, result_rows, run_title
from qpa.report.page import figures
from qpa.report.page.explanation_figures import MARKS, explanation_figures
from qpa.report.page.loading import ways_to_load
from qpa.report.page.parts import Figure, Table
from qpa.report.rows import Rows, number
from qpa.report.samples import printable, probe_prompt
from qpa.report.selection import SELECTION_HEADER, selection_rows, selection_title
from qpa.store.atomic_files import write_file
from qpa.store.run_directory import METRICS, REPORT, RunDirectory
from qpa.training.continuation import Continuation, ContinuePrompts, Prompt
from qpa.training.training_log import read_log

FOLDER = Path(__file__).parent

D = TypeVar("D", bound=Document)

PLAIN = ContinuePrompts()
"""Greedy, on the prompts as they are."""


def write_report(
    run: RunDirectory,
    out: Path | None = None,
    *,
    exports: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    options: ContinuePrompts = PLAIN,
    progress: Progress = silent,
) -> Path:
    """Write the page of a run, whole or not at all, and return its path.

    Args:    out: the file; None for report.html in the run.
             exports: directories and files that were exported from this run.
             prompts: to continue before and after; () for the beginning of the evaluation split.
             options: how they are continued.
    Raises:  DocumentError: a document or file of the run or of an export is damaged, stale, or another run's.
             OptionError: a prompt is empty or too long.
    """
    page = render_report(run, exports=exports, prompts=prompts, options=options, progress=progress)
    path = run.path / REPORT if out is None else out
    write_file(path, page.encode())
    return path


def render_report(
    run: RunDirectory,
    *,
    exports: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    options: ContinuePrompts = PLAIN,
    progress: Progress = silent,
) -> str:
    """Return the page of a run as HTML; see `write_report`."""
    documents = _documents(run)
    frozen = _find(documents, FrozenAdapter)
    context = PassContext(documents[0].provenance.seed, run.files, documents)
    made = [(path, _exported_to(path, run, frozen, context)) for path in exports]
    samples, no_samples = _samples(run, documents, prompts, options, progress)
    content = {
        "name": run.path.resolve().name,
        "run": str(run.path),
        "title": run_title(documents),
        "version": __version__,
        "style": (FOLDER / "style.css").read_text(),
        "lead": _lead(documents),
        "result": _result(documents),
        "samples": samples,
        "no_samples": no_samples,
        "sampling": _sampling(options),
        "losses": figures.loss_figure(read_log(run.path / METRICS)),
        "training": _training(documents),
        "data": _data(documents),
        "account": _account(documents),
        "circuit": _circuit(run, documents),
        "explanation": _explanation(documents),
        "histograms": _histograms(run, documents),
        "trained": frozen,
        "exports": [_export(path, exported) for path, exported in made],
        "loading": ways_to_load(frozen, run.path.resolve().name, made, context) if frozen else (),
        "provenance": _provenance(documents),
    }
    return _render(content | {"sections": _sections(content)})


def _render(content: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )
    template = environment.get_template("page.html.j2")
    return template.render(content | {"style": Markup(content["style"])})


def _sections(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the page's sections: their ids and their names."""
    every = [
        ("result", "Result", True),
        ("samples", "Samples", True),
        ("training", "Training", content["losses"]),
        ("account", "Account", True),
        ("circuit", "Circuit", True),
        ("explanation", "Parts", content["explanation"]),
        ("numbers", "Numbers", content["histograms"]),
        ("verification", "Verification", content["trained"]),
        ("loading", "Loading", content["trained"]),
        ("provenance", "Provenance", True),
    ]
    return [(id_, words) for id_, words, is_there in every if is_there]


def _documents(run: RunDirectory) -> tuple[Document, ...]:
    """Return the documents of a run that are made, oldest first."""
    documents: tuple[Document, ...] = ()
    for stage in STAGES:
        if run.has(stage.document):
            documents = run.read_through(stage.document)
    return documents


def _find(documents: Sequence[Document], kind: type[D]) -> D | None:
    return next((document for document in documents if isinstance(document, kind)), None)


def _exported_to(
    path: Path, run: RunDirectory, frozen: FrozenAdapter | None, context: PassContext
) -> Exported:
    """Return what is to say of an export; of a directory its manifest."""
    if path.is_file() and frozen is not None:
        found: Exported | None = found_file(frozen, path, context)
    else:
        manifest = read_manifest(path)
        parents = () if frozen is None else (frozen.digest, run.written_digest(FrozenAdapter))
        found = manifest if manifest.provenance.parent in parents else None
    if found is None:
        raise DocumentError(
            str(path), f"an export of {run.path}", "one of another run, or of an earlier training"
        )
    return found


def _lead(documents: Sequence[Document]) -> str:
    """Return what the run is and did, in two sentences."""
    spec, layout = newest(documents, AdapterSpec), newest(documents, WeightLayout)
    account, result = layout.account, _training_result(documents)
    first = (
        f"{number(account.n_generator)} trained numbers generate {KINDS[spec.method].phrase(spec.rank)} "
        f"of {number(account.n_adapter)} numbers for {spec.base.name_or_path}."
    )
    if result is None:
        return first + " It is planned, and not trained yet."
    change = "falls" if result.eval_loss < result.base_loss else "does not fall: it goes"
    unit = " nats per token" if result.has_perplexity else ""
    return (
        f"{first} On {number(result.n_eval_tokens)} tokens that were held out, the loss {change} from "
        f"{result.base_loss:.3f} to {result.eval_loss:.3f}{unit}."
    )


def _training_result(documents: Sequence[Document]) -> TrainingResult | None:
    trained = _find(documents, TrainedGenerator)
    return None if trained is None else trained.result


def _result(documents: Sequence[Document]) -> dict[str, Any] | None:
    result, frozen = _training_result(documents), _find(documents, FrozenAdapter)
    if result is None:
        return None
    contexts = newest(documents, TrainedGenerator).contexts
    if contexts:
        return {
            "n_tokens": number(result.n_eval_tokens),
            "table": _table_of_contexts(result, contexts, frozen),
        }
    losses = [("base model", result.base_loss), ("with the adapter", result.eval_loss)]
    if frozen is not None and frozen.frozen_loss is not None and frozen.frozen_loss != result.eval_loss:
        shots, rounded = frozen.shots, result.quantization is not None
        words = "with it, on the base as it is" if rounded else f"frozen from {number(shots or 0)} shots"
        losses.append((words, frozen.frozen_loss))
    rows: Rows = [
        (
            name,
            f"{loss:.4f}",
            perplexity_text(loss) if result.has_perplexity else "",
            f"{loss - result.base_loss:+.4f}" if index else "",
        )
        for index, (name, loss) in enumerate(losses)
    ]
    header = ("", "loss", "perplexity", "change of loss")
    return {"n_tokens": number(result.n_eval_tokens), "table": Table("Evaluation", header, rows)}


def _table_of_contexts(
    result: TrainingResult, contexts: Sequence[TrainedContext], frozen: FrozenAdapter | None
) -> Table:
    """Return the losses of every context with its own adapter; the frozen one is marked."""
    losses = [(one.name, one.base_loss, one.eval_loss) for one in contexts]
    words = {frozen.context: "frozen"} if frozen is not None else {}
    rows: Rows = [
        (name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}", words.get(name, ""))
        for name, before, after in [*losses, ("all tokens", result.base_loss, result.eval_loss)]
    ]
    if frozen is not None and frozen.context not in [one.name for one in contexts]:
        rows.append((frozen.context or "", "", "not scored", "", "frozen"))
    return Table("Evaluation", ("context", "base loss", "loss", "change of loss", ""), rows)


def _samples(
    run: RunDirectory,
    documents: Sequence[Document],
    prompts: Sequence[str],
    options: ContinuePrompts,
    progress: Progress,
) -> tuple[list[Continuation], str]:
    """Return the samples, or why there are none."""
    if _find(documents, FrozenAdapter) is None:
        return [], "There is no adapter yet."
    asked: list[Prompt] = [*prompts] or [probe_prompt(documents, run.files)]
    try:
        found = options(documents, run.files, asked, progress)
    except ModelError as error:
        return [], f"Left out, since the base model does not load here. {error}."
    return [*found], ""


def _sampling(options: ContinuePrompts) -> str:
    if not options.temperature:
        return "Each time the most probable token is taken."
    return f"Tokens are drawn at temperature {options.temperature:g} with seed {options.seed}."


def _training(documents: Sequence[Document]) -> Rows:
    result = _training_result(documents)
    return result_rows(result)[:3] if result else []


def _data(documents: Sequence[Document]) -> Table | None:
    trained = _find(documents, TrainedGenerator)
    if trained is None or trained.data is None:
        return None
    return Table(f"Data of shape {trained.data.shape}", DATA_HEADER, data_rows(trained.data))


def _account(documents: Sequence[Document]) -> dict[str, Any]:
    spec, layout = newest(documents, AdapterSpec), newest(documents, WeightLayout)
    words = adapter_words(spec.method, spec.rank, spec.target_modules)
    figure = figures.account_figure(
        layout.account, account_rows(layout.account), adapter_words(spec.method, spec.rank)
    )
    return {"words": f"{words}, alpha {spec.alpha:g}." if spec.pairs else f"{words}.", "figure": figure}


def _circuit(run: RunDirectory, documents: Sequence[Document]) -> dict[str, Any]:
    layout, native = newest(documents, WeightLayout), newest(documents, NativeCircuit)
    measured = _find(documents, Measurement) and _find(documents, FrozenAdapter)
    facts = circuit_rows(layout, native) + (measurement_rows(documents) if measured else [])
    if not layout.features.has_circuits:
        control = "This generator has a control in the place of circuits, so there is nothing to draw."
        words = "This generator has no circuit that is measured. Every tensor comes of numbers of its own."
        return {
            "sentences": [control if layout.groups else words],
            "drawings": [],
            "facts": facts,
            "selection": None,
        }
    n_angles = f"{number(layout.ansatz.n_angles)} trained angles"
    several = f"{number(layout.n_circuits)} copies of it run, each with {n_angles} of its own."
    return {
        "sentences": [
            f"It has {n_angles}." if layout.n_circuits == 1 else several,
            "Decoders turn the probabilities of its basis states into the adapter's numbers, "
            "and the adapter itself holds nothing of it.",
        ],
        "drawings": figures.circuit_figures(newest(documents, LogicalCircuit), native, run.files),
        "facts": facts,
        "selection": _selection(run),
    }


def _selection(run: RunDirectory) -> Table | None:
    """Return the ways to run the circuit of which one was chosen, where they were tried."""
    path = run.path / Selection.file_name()
    if not path.is_file():
        return None
    selection = Selection.from_json(path.read_bytes(), str(path))
    title = selection_title(selection)
    return Table(f"{title[:1].upper()}{title[1:]}.", SELECTION_HEADER, selection_rows(selection))


def _explanation(documents: Sequence[Document]) -> dict[str, Any] | None:
    found, layout = _find(documents, Explanation), newest(documents, WeightLayout)
    if found is None:
        return None
    title = parts_title(found)
    return {
        "sentences": [
            f"{title[:1].upper()}{title[1:]}. All together are worth {contribution_text(found.gain)}.",
            "Above zero a part lowers the loss; at zero the model does as well without it; below zero it "
            "would do better. Parts act together, so that their contributions do not add up.",
            MARKS,
            *filter(None, [left_out(layout)]),
        ],
        "figures": explanation_figures(found),
    }


def _histograms(run: RunDirectory, documents: Sequence[Document]) -> list[Figure]:
    measurement, frozen = _find(documents, Measurement), _find(documents, FrozenAdapter)
    found = [figures.probability_figure(measurement, run.files)] if measurement else []
    found += figures.weight_figures(frozen, run.files) if frozen else []
    return [figure for figure in found if figure is not None]


def _export(path: Path, exported: Exported) -> dict[str, Any]:
    facts: dict[str, Any] = {"path": str(path), "format": exported.format, "verification": None}
    if FORMATS[exported.format].is_file:
        n_bytes = number(exported.files[-1].n_bytes)
        gives = "what this run gives, which expands to its adapter"
        if exported.dtype == INT16:
            gives = "this run's numbers, rounded, which expand to nearly its adapter"
        words = f"{n_bytes} bytes, {exported.dtype}: {gives}"
        return facts | {"unverified": f"{words}. A file of numbers records no answers to ask engines for"}
    verification = read_verification(path)
    if verification is None or not verification.is_of(path):
        stale = "The verification there is that of another export" if verification else "Not verified yet"
        return facts | {"unverified": f"{stale}: qpa verify {path}"}
    title = verification_title(exported.dtype, None)
    table = Table(title, VERIFICATION_HEADER, verification_rows(verification))
    return facts | {"verification": table}


def _provenance(documents: Sequence[Document]) -> dict[str, Any]:
    rows: Rows = [
        (one.kind, one.provenance.pass_name, str(one.provenance.seed), one.provenance.qpa_version, one.digest)
        for one in documents
    ]
    options = [
        {
            "title": one.provenance.pass_name,
            "rows": [(option.name, _value(option.value)) for option in one.provenance.options],
        }
        for one in documents
        if one.provenance.options
    ]
    result = _training_result(documents)
    if result is not None:
        rows.append(("tokenised data", "", "", "", result.data_digest))
    header = ("document", "made by", "seed", "qpa", "digest")
    return {"documents": Table("Documents", header, rows), "options": options}


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "not given" if value is None else str(value)
