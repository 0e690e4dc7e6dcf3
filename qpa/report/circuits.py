"""What a run's circuit is, on its device and as it was measured, as rows for a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qpa.circuits.circuit import NO_DEVICE
from qpa.circuits.sources.source import DEFAULT_SHOTS, Cost, jobs_for
from qpa.circuits.targets import RESET_S, Device, median_errors
from qpa.documents import Document, FrozenAdapter, Measurement, NativeCircuit, WeightLayout
from qpa.pipeline.pass_protocol import newest
from qpa.report.rows import Rows, number, several


def circuit_rows(layout: WeightLayout, native: NativeCircuit) -> Rows:
    """Return the layout's circuit and what the target makes of it, or what there is in its place."""
    rows: Rows = [("generator", layout.generator)]
    if layout.groups:
        rows += [("features", layout.features.kind), *_context_rows(layout)]
        rows += [("chunks", number(layout.n_chunks))]
    rows += _parametrized_rows(layout)
    if not layout.features.has_circuits:
        words = "none, a control in their place" if layout.groups else "none to measure"
        return [*rows, ("circuits", words)]
    return [
        *rows,
        ("circuits", number(layout.n_circuits)),
        ("ansatz", layout.ansatz.kind),
        ("qubits x layers", f"{layout.ansatz.n_qubits} x {layout.ansatz.n_layers}"),
        *native_rows(native),
        *_step_rows(layout, native),
    ]


def _parametrized_rows(layout: WeightLayout) -> Rows:
    """Return how many tensors come without chunks, by what they are parametrized with."""
    found: dict[str, int] = {}
    for tensor in layout.parametrized:
        words = ", ".join([tensor.kind, *(f"{name} {n}" for name, n in tensor.sizes)])
        found[words] = found.get(words, 0) + 1
    return [("tensors", f"{number(n)} of {words}") for words, n in found.items()]


def _context_rows(layout: WeightLayout) -> Rows:
    """Return what programs the features, where anything does."""
    contexts = layout.features.contexts
    if contexts is None:
        return []
    return [
        ("contexts", ", ".join(contexts.names)),
        ("a context is", f"{contexts.kind}, {contexts.size} numbers"),
    ]


def native_rows(native: NativeCircuit) -> Rows:
    """Return what the circuit is on its target."""
    probability, length_s = native.estimated_success_probability, native.duration_s
    rows: Rows = [
        ("target", native.target),
        ("depth", number(native.depth)),
        ("two-qubit gates", number(native.n_two_qubit_gates)),
        ("success probability", "not reported" if probability is None else f"{probability:.3f}"),
    ]
    if native.physical_qubits:
        rows.append(("physical qubits", " ".join(map(str, native.physical_qubits))))
    if native.calibrated:
        rows.append(("calibrated", native.calibrated))
    if native.lacks_last_layer:
        rows.append(("last entangling layer", "applied to the counts, exactly"))
    if length_s is not None:
        rows.append(("duration of a run", f"{1e6 * length_s:.1f} us"))
    return rows


def _step_rows(layout: WeightLayout, native: NativeCircuit) -> Rows:
    """Return what a training step would cost on the target, with the default number of shots."""
    if native.target == NO_DEVICE:
        return []
    n_circuits = layout.n_circuits
    rows: Rows = []
    for name, n_shifted in (("surrogate", 0), ("spsa", 2), ("parameter-shift", 2 * layout.ansatz.n_angles)):
        n_runs = n_circuits * (1 + n_shifted)
        n_jobs = sum(jobs_for(n, DEFAULT_SHOTS) for n in (n_circuits, n_circuits * n_shifted) if n)
        cost = Cost(n_runs, n_runs * DEFAULT_SHOTS, n_jobs)
        time_s = cost.n_executions * ((native.duration_s or 0.0) + RESET_S)
        rows.append((f"a step, {name}", f"{cost_text(cost)}, about {time_s:,.1f} s on the device"))
    return rows


def cost_text(cost: Cost) -> str:
    """Return what is run, in words."""
    circuits, jobs = several(cost.n_circuits, "circuit"), several(cost.n_jobs, "job")
    return f"{circuits}, {number(cost.n_executions)} executions in {jobs}"


DEVICE_HEADER = ("target", "qubits", "gates", "two-qubit error", "readout error", "calibrated")


def device_rows(devices: Sequence[Device]) -> Rows:
    """Return the size and the errors of devices, under the words of `DEVICE_HEADER`."""
    return [
        (
            facts["target"],
            number(facts["n_qubits"]),
            " ".join(facts["gates"]),
            *("-" if facts[name] is None else f"{facts[name]:.2e}" for name in _ERRORS),
            (facts["calibrated"] or "-")[:10],
        )
        for facts in map(device_json, devices)
    ]


_ERRORS = ("median_two_qubit_error", "median_readout_error")


def device_json(device: Device) -> dict[str, Any]:
    """Return the same by name."""
    target = device.target
    errors = dict(zip(_ERRORS, median_errors(target), strict=True))
    gates = sorted(name for name in target.operation_names if name not in _NO_GATES)
    return {
        "target": device.name,
        "n_qubits": target.num_qubits,
        "gates": gates,
        "calibrated": device.calibrated,
        **errors,
    }


_NO_GATES = ("measure", "reset", "delay", "if_else", "for_loop", "switch_case", "while_loop", "break_loop")


def measurement_rows(documents: Sequence[Document]) -> Rows:
    """Return what was measured for a frozen adapter, and how far it is from the exact one."""
    measurement, frozen = newest(documents, Measurement), newest(documents, FrozenAdapter)
    measured_by = "none" if measurement.probabilities is None else measurement.backend or measurement.source
    rows: Rows = [("circuits measured by", measured_by)]
    if frozen.result.quantization is not None and frozen.frozen_loss is not None:
        rows.append(("loss on the base as it is", f"{frozen.frozen_loss:.4f}"))
    if measurement.shots is None:
        return rows
    rows += [
        ("target", measurement.target),
        ("shots of a circuit", number(measurement.shots)),
        ("seed", str(measurement.provenance.seed)),
        ("mitigation", measurement.mitigation),
        ("executions", number(measurement.n_executions)),
        ("distance to exact", f"{measurement.distance:.4f}, largest total variation"),
    ]
    if frozen.weight_error is not None:
        rows.append(("relative weight error", f"{frozen.weight_error:.4f}"))
    if frozen.frozen_loss is not None:
        change = frozen.frozen_loss - frozen.result.eval_loss
        rows.append(("frozen loss", f"{frozen.frozen_loss:.4f}, {change:+.4f} against the live adapter"))
    for name in ("counts", "circuit", "device"):
        attachment = getattr(measurement, name)
        if attachment is not None:
            rows.append((name, f"{attachment.file[:16]}..{attachment.file[64:]}"))
    return rows


def measurement_json(documents: Sequence[Document]) -> dict[str, Any]:
    """Return the same by name."""
    measurement, frozen = newest(documents, Measurement), newest(documents, FrozenAdapter)
    return {
        **measurement.model_dump(mode="json", exclude={"provenance"}),
        "seed": measurement.provenance.seed,
        "weight_error": frozen.weight_error,
        "frozen_loss": frozen.frozen_loss,
    }


def circuit_json(layout: WeightLayout, native: NativeCircuit) -> dict[str, Any]:
    """Return the same numbers by name."""
    return {
        "generator": layout.generator,
        "features": layout.features.kind,
        "contexts": layout.features.contexts.model_dump() if layout.features.contexts else None,
        "n_chunks": layout.n_chunks,
        "n_parametrized": len(layout.parametrized),
        "n_circuits": layout.n_circuits,
        "n_qubits": layout.ansatz.n_qubits,
        "n_layers": layout.ansatz.n_layers,
        "ansatz": layout.ansatz.kind,
        "target": native.target,
        "depth": native.depth,
        "n_two_qubit_gates": native.n_two_qubit_gates,
        "estimated_success_probability": native.estimated_success_probability,
        "physical_qubits": list(native.physical_qubits),
        "calibrated": native.calibrated,
        "lacks_last_layer": native.lacks_last_layer,
        "duration_s": native.duration_s,
    }


def transpiled_rows(documents: Sequence[Document]) -> Rows:
    """Return what a device makes of a run's circuit."""
    return circuit_rows(newest(documents, WeightLayout), newest(documents, NativeCircuit))


def transpiled_json(documents: Sequence[Document]) -> dict[str, Any]:
    """Return the same by name."""
    return circuit_json(newest(documents, WeightLayout), newest(documents, NativeCircuit))
