"""What shots, noise and mitigation do to a trained adapter: the study of `qpa noise`.

Every cell measures the trained circuits once more, on one target with one number of shots and one mitigation,
freezes what was measured, and says how far it is from the adapter of exact probabilities. Rules:

1. The target "none" stands for a device without errors, of which only counts are seen.
2. With a mitigation the shots of its calibration come on top, and the executions that are reported count
them.
3. A cell is a line of results.jsonl. A study that was interrupted goes on with the same command.
4. The run itself stays as it is.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from qpa.circuits.circuit import NO_DEVICE
from qpa.circuits.mitigation.mitigation import NONE, RECOMMENDED, parse_mitigations
from qpa.circuits.targets import find_device
from qpa.documents import (
    AdapterSpec,
    Document,
    LogicalCircuit,
    TrainedGenerator,
    WeightLayout,
)
from qpa.documents.trained_generator import ANGLES_ARRAY
from qpa.errors import OptionError
from qpa.passes.freeze_adapter import (
    Scorer,
    decode_adapter,
    measured_probabilities,
    relative_error,
)
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.pipeline.options import check_options, option
from qpa.pipeline.pass_protocol import PassContext, newest
from qpa.progress import Progress
from qpa.store.atomic_files import write_file
from qpa.store.run_directory import DirectoryStore
from qpa.training.data.data_options import TrainingData

RESULTS, TABLE, PLOT = "results.jsonl", "table.md", "noise.png"
Line = dict[str, Any]


@dataclass(frozen=True)
class NoiseStudy(TrainingData):
    """What a study compares.

    Args:    shots: of every circuit.
             targets: names of devices, "none" for one without errors.
             mitigations: how counts are corrected, see `MeasureCircuit`; on "none" counts stay as they are.
             data .. chat_template: of the training, for the loss of every frozen adapter.
             seeds: measurements of every cell.
    """

    section: ClassVar[str] = "noise"

    shots: tuple[str, ...] = option(
        ("256", "1024", "8192", "65536"), help="Shots of every circuit, separated by commas."
    )
    targets: tuple[str, ...] = option(
        (NO_DEVICE, "fake_torino"), help="Devices, separated by commas; none is one without errors."
    )
    mitigations: tuple[str, ...] = option(
        (NONE, RECOMMENDED), name="mitigation", help="How counts are corrected, separated by commas."
    )
    seeds: int = option(3, help="Measurements of every cell.", at_least=1)

    def n_shots(self) -> list[int]:
        """Return the numbers of shots.

        Raises:  OptionError: one is no number above 0.
        """
        for text in self.shots:
            if not text.isdecimal() or int(text) < 1:
                raise OptionError("shots", "whole numbers of at least 1", text)
        return [int(text) for text in self.shots]

    def check(self) -> None:
        """Check all options before anything is run.

        Raises:  OptionError, TargetError: one is out of range, or is the name of nothing.
        """
        check_options(self)
        self.n_shots()
        for target in self.targets:
            find_device(target)
        for mitigation in self.mitigations:
            parse_mitigations(mitigation)


def run_study(
    study: NoiseStudy, run: Path, documents: tuple[Document, ...], out: Path, progress: Progress
) -> None:
    """Measure the cells that are missing in a directory of results.

    Args:    documents: of the run, through the trained generator.
    Raises:  OptionError, TargetError: the study cannot be made; DataError: the data is not the training's.
    """
    study.check()
    trained = newest(documents, TrainedGenerator)
    layout = newest(documents, WeightLayout)
    features = layout.features
    if not features.has_circuits:
        control = ("features", "a control in their place")
        subject, instead = control if layout.groups else ("generator", layout.generator)
        raise OptionError(subject, "circuits, which can be measured", instead)
    if features.contexts is not None:
        found, advice = ",".join(features.contexts.names), "freeze a context with `source` noisy"
        raise OptionError("contexts", "one adapter for all data, in a study of noise", found, advice)
    done = {_key(line) for line in lines_of(out, trained) if study.data is None or line["loss"] is not None}
    with tempfile.TemporaryDirectory() as folder:
        # A copy, since passes leave files: a study changes nothing in the run.
        copy = Path(folder, "run")
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
        context = PassContext(documents[0].provenance.seed, DirectoryStore(copy), documents, progress)
        cells = list(_cells(study))
        logical = context.document(LogicalCircuit)
        # One at a time: the files of the next device replace those of the last.
        transpiled = lru_cache(maxsize=1)(lambda target: TranspileCircuit(target).run(logical, context))
        scorer: Scorer | None = None
        for number, (target, mitigation, shots, seed) in enumerate(cells):
            progress("measuring", number, len(cells))
            if (target, mitigation, shots, seed) in done:
                continue
            scorer = scorer or Scorer.of(newest(documents, AdapterSpec), trained, study, context)
            native = transpiled(target)
            cell = PassContext(seed, context.files, (*documents, native), progress)
            line = _measure(target, mitigation, shots, cell, scorer)
            out.mkdir(parents=True, exist_ok=True)
            lines = [*read_lines(out), line]
            write_file(out / RESULTS, "".join(json.dumps(one) + "\n" for one in lines).encode())


def _cells(study: NoiseStudy) -> Iterator[tuple[str, str, int, int]]:
    for target in study.targets:
        for mitigation in study.mitigations if target != NO_DEVICE else (NONE,):
            for shots in study.n_shots():
                for seed in range(study.seeds):
                    yield target, mitigation, shots, seed


def _key(line: Line) -> tuple[str, str, int, int]:
    return line["target"], line["mitigation"], line["shots"], line["seed"]


def _measure(target: str, mitigation: str, shots: int, cell: PassContext, scorer: Scorer) -> Line:
    """Return the line of one cell, whose context has its seed and its native circuit."""
    from safetensors.torch import load_file

    trained, spec = cell.document(TrainedGenerator), cell.document(AdapterSpec)
    layout = cell.document(WeightLayout)
    source = "shots" if target == NO_DEVICE else "noisy"
    measurement = MeasureCircuit(source=source, shots=shots, mitigation=mitigation).run(trained, cell)
    arrays = load_file(cell.files.get(trained.arrays))
    adapter = decode_adapter(spec, layout, arrays, measured_probabilities(measurement, cell))
    return {
        "run": trained.digest,
        "target": target,
        "mitigation": mitigation,
        "shots": shots,
        "seed": cell.seed,
        "n_executions": measurement.n_executions,
        "n_circuits": len(arrays[ANGLES_ARRAY]),
        "distance": measurement.distance,
        "weight_error": relative_error(spec, layout, arrays, adapter),
        "loss": scorer.loss(adapter),
        "live_loss": trained.result.eval_loss,
    }


def read_lines(out: Path) -> list[Line]:
    """Return the lines of a directory of results; none where there is no file.

    A last line without an end is that of a study that was interrupted, and is left out.
    """
    path = out / RESULTS
    if not path.is_file():
        return []
    return [json.loads(text) for text in path.read_text().splitlines(keepends=True) if text.endswith("\n")]


def lines_of(out: Path, trained: TrainedGenerator) -> list[Line]:
    """Return the lines of one trained generator, of each cell the newest."""
    lines = (line for line in read_lines(out) if line["run"] == trained.digest)
    return list({_key(line): line for line in lines}.values())


HEADER = (
    "target",
    "mitigation",
    "shots",
    "executions",
    "total variation",
    "weight error",
    "loss - live loss",
)


def table_rows(lines: list[Line]) -> list[tuple[str, ...]]:
    """Return a row for each cell, means over its seeds, with the spread of the loss."""
    cells: dict[tuple[str, str, int], list[Line]] = defaultdict(list)
    for line in lines:
        cells[line["target"], line["mitigation"], line["shots"]].append(line)
    return [
        (target, mitigation, f"{shots:,}", f"{cell[0]['n_executions']:,}", *_means(cell))
        for (target, mitigation, shots), cell in cells.items()
    ]


def _means(cell: list[Line]) -> Iterator[str]:
    yield f"{statistics.mean(line['distance'] for line in cell):.4f}"
    errors, changes = _errors(cell), _changes(cell)
    yield f"{statistics.mean(errors):.4f}" if errors else "-"
    spread = f" (sd {statistics.stdev(changes):.4f})" if len(changes) > 1 else ""
    yield f"{statistics.mean(changes):+.4f}{spread}" if changes else "-"


def write_study(out: Path, trained: TrainedGenerator) -> list[tuple[str, ...]]:
    """Write OUT/table.md and OUT/noise.png from the results of one run; return the rows of the table."""
    from qpa.bench.report import markdown_table

    lines = lines_of(out, trained)
    rows = table_rows(lines)
    write_file(out / PLOT, _draw(lines))
    text = f"# qpa noise\n\n![]({PLOT})\n\n{markdown_table([HEADER, *rows])}\n"
    write_file(out / TABLE, text.encode())
    return rows


def _draw(lines: list[Line]) -> bytes:
    """Return a PNG: weight error, and where it was scored the loss, against shots."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    curves: dict[tuple[str, str], dict[int, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        curves[line["target"], line["mitigation"]][line["shots"]].append(line)
    for (target, mitigation), points in curves.items():
        label = "no noise" if target == NO_DEVICE else f"{target}, {mitigation}"
        shots = sorted(points)
        for panel, values in zip(panels, (_errors, _changes), strict=True):
            found = [(n, values(points[n])) for n in shots]
            known = [(n, statistics.mean(value)) for n, value in found if value]
            panel.plot([n for n, _ in known], [value for _, value in known], marker="o", label=label)
    for panel, words in zip(panels, ("relative weight error", "loss less the live one, nats"), strict=True):
        panel.set(xscale="log", xlabel="shots of a circuit", ylabel=words)
    panels[0].set_yscale("log")
    panels[0].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _errors(cell: list[Line]) -> list[float]:
    return [line["weight_error"] for line in cell if line["weight_error"] is not None]


def _changes(cell: list[Line]) -> list[float]:
    return [line["loss"] - line["live_loss"] for line in cell if line["loss"] is not None]
