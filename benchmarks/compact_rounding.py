"""What rounding the trained numbers of a compact adapter to 16 bits costs, and how large its files are.

For every size an adapter is planned on one shared basis, trained, exported with numbers of float32 and of
int16, expanded, and scored twice on the evaluation split of its training. A table is printed: trained
numbers, bytes of both files, the loss of both in nats per token, and the difference.

    python -m benchmarks.compact_rounding --model <stories260K> --data <tinyshakespeare input.txt> \\
        --max-steps 200 --out <directory for the runs>
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qpa.documents import AdapterSpec, Document, FrozenAdapter, Measurement, TrainedGenerator, WeightLayout
from qpa.exporters.formats.compact import ExportCompact
from qpa.passes import basis_pipeline, planning_pipeline, training_pipeline
from qpa.passes.calibrate_basis import CalibrateBasis
from qpa.passes.freeze_adapter import FreezeAdapter, Scorer
from qpa.passes.inspect_model import InspectModel
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.train_generator import TrainGenerator
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.pipeline.pass_protocol import PassContext
from qpa.serve.basis import Basis
from qpa.serve.compact import NUMBERS
from qpa.serve.expansion import tensors
from qpa.store.run_directory import DirectoryStore, RunDirectory

MAX_LENGTH = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing in the directory, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="Directory of a causal language model.")
    parser.add_argument("--data", required=True, help="UTF-8 text to train on.")
    parser.add_argument("--sizes", default="12,60,302,4756", help="Trained numbers, separated by commas.")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True, help="Directory for basis and runs.")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    basis = _basis(options)
    print("numbers  bytes float32  bytes int16  loss float32  loss int16  difference")
    for size in map(int, options.sizes.split(",")):
        n, n_bytes, losses = _row(options, basis, size)
        difference = losses[1] - losses[0]
        sizes = f"{n:7,}  {n_bytes[0]:13,}  {n_bytes[1]:11,}"
        print(f"{sizes}  {losses[0]:12.5f}  {losses[1]:10.5f}  {difference:+.6f}", flush=True)
    return 0


def _basis(options: argparse.Namespace) -> Path:
    """Return the basis of the data, made where it is missing."""
    files = DirectoryStore(options.out / "basis")
    if (files.path / "basis.json").is_file():
        return files.path
    files.path.mkdir(parents=True)

    def keep(document: Document) -> None:
        files.put(document.file_name(), document.to_json())

    step = CalibrateBasis(data=(options.data,), max_length=MAX_LENGTH)
    basis_pipeline(InspectModel(options.model), step).run(None, PassContext(0, files), keep)
    return files.path


def _row(
    options: argparse.Namespace, basis: Path, size: int
) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
    """Return the trained numbers of a size, the bytes of its files, and its losses, by `NUMBERS`."""
    run = RunDirectory(options.out / f"run-{size}")
    freeze = FreezeAdapter(data=(options.data,))
    if not run.has(FrozenAdapter):
        run.path.mkdir(parents=True, exist_ok=True)
        inspect = InspectModel(options.model, basis=str(basis))
        plan = planning_pipeline(inspect, PlanLayout(max_params=str(size)), TranspileCircuit())
        context = plan.run(None, PassContext(0, run.files), run.write)
        train = TrainGenerator(data=(options.data,), max_steps=options.max_steps, max_length=MAX_LENGTH)
        training_pipeline(train, MeasureCircuit(), freeze).run(context.documents[-1], context, run.write)
    documents = run.read_through(FrozenAdapter)
    context = PassContext(0, run.files, documents)
    spec, trained = context.document(AdapterSpec), context.document(TrainedGenerator)
    scorer = Scorer.of(spec, trained, freeze, context, measured=context.document(Measurement).context)
    n_bytes, losses = [], []
    for numbers in NUMBERS:
        out = options.out / "store" / f"{size}-{numbers}"
        written = ExportCompact(numbers).emit(context.document(FrozenAdapter), out, context, force=True)
        loss = scorer.loss(_adapter(out, Basis.open(basis)))
        assert loss is not None
        n_bytes.append(written.files[-1].n_bytes)
        losses.append(loss)
    return context.document(WeightLayout).account.n_generator, tuple(n_bytes), tuple(losses)


def _adapter(compact: Path, basis: Basis) -> dict[str, Tensor]:
    """Return what a compact file expands to, by the paths of the plan, with lora_B not yet scaled."""
    by_key = dict(tensors(compact, basis))
    scaled = {path: basis.scale if path not in basis.first_factors else 1.0 for path in basis.shapes}
    return {path: torch.from_numpy(by_key[key]) / scaled[path] for path, key in basis.keys.items()}


if __name__ == "__main__":
    raise SystemExit(main())
