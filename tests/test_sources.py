"""Sources that sample: what they draw, what they refuse, and what a device may do to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from qiskit.primitives import BaseSamplerV2
from qiskit.transpiler import generate_preset_pass_manager
from qiskit_aer import AerSimulator
from qiskit_aer.primitives import SamplerV2
from torch import Tensor

from qpa.circuits import targets as targets_module
from qpa.circuits.ansatz import make_ansatz
from qpa.circuits.circuit import Circuit
from qpa.circuits.qiskit_files import to_qiskit
from qpa.circuits.sources import backend as backend_module
from qpa.circuits.sources import sampled as sampled_module
from qpa.circuits.sources import source as source_module
from qpa.circuits.sources.noisy import noise_model
from qpa.circuits.sources.sampling_options import SamplingOptions
from qpa.circuits.sources.source import SOURCES, Cost, SourceSettings
from qpa.circuits.targets import find_device, restrict
from qpa.documents import FrozenAdapter, Measurement, TrainedGenerator
from qpa.errors import OptionError, SourceError, TargetError, VerificationError
from qpa.passes.freeze_adapter import check_frozen
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import RunDirectory
from tests.command_line import Cli

N_QUBITS, N_LAYERS = 4, 3


def on_device(target: str, *, lacks_last_layer: bool = True) -> Circuit:
    """Return a small circuit that is transpiled for a device."""
    ansatz, device = make_ansatz("ry-cnot-chain", N_QUBITS, N_LAYERS), find_device(target)
    assert device is not None
    logical = to_qiskit(ansatz, has_last_layer=not lacks_last_layer)
    native = generate_preset_pass_manager(3, target=device.target, seed_transpiler=1).run(logical)
    return Circuit(ansatz, native, device, lacks_last_layer)


def random_angles(n_circuits: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n_circuits, N_QUBITS * N_LAYERS, generator=random)


def distance(found: Tensor, exact: Tensor) -> float:
    return float(0.5 * (found - exact).abs().sum(1).mean())


def test_shots_are_drawn_from_the_exact_distribution():
    circuit = Circuit(make_ansatz("ry-cnot-chain", N_QUBITS, N_LAYERS))
    angles, shots = random_angles(20), 4000
    counts = SOURCES["shots"](SourceSettings(5, shots)).counts(circuit, angles).double()
    expected = shots * circuit.exact_probabilities(angles.double())
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = 20 * (circuit.n_states - 1)
    assert abs(statistic - degrees) < 4.5 * math.sqrt(2 * degrees)
    assert (counts.sum(1) == shots).all()


@pytest.mark.parametrize("name", ["shots", "noisy"])
def test_what_is_drawn_follows_from_the_seed_and_the_angles(name):
    circuit, angles = on_device("fake_belem"), random_angles(2)
    first, again = (SOURCES[name](SourceSettings(3, 512)) for _ in range(2))
    found = first.probabilities(circuit, angles)
    first.probabilities(circuit, random_angles(2, seed=9))
    assert torch.equal(first.probabilities(circuit, angles), found)
    assert torch.equal(again.probabilities(circuit, angles), found)
    assert not torch.equal(again.probabilities(circuit, angles + 1e-3), found)
    assert not torch.equal(SOURCES[name](SourceSettings(4, 512)).probabilities(circuit, angles), found)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(2))


@pytest.mark.parametrize("lacks_last_layer", [False, True])
@pytest.mark.parametrize("target", ["fake_belem", "fake_torino", "generic:5", "ions:5"])
def test_a_noisy_device_is_near_the_exact_distribution_and_not_at_it(target, lacks_last_layer):
    circuit, angles = on_device(target, lacks_last_layer=lacks_last_layer), random_angles(3)
    exact = circuit.exact_probabilities(angles)
    found = SOURCES["noisy"](SourceSettings(1, 20_000)).probabilities(circuit, angles)
    assert distance(found, exact) < 0.15
    # Shots alone leave about 0.011.
    assert distance(found, exact) > (0.012 if target == "ions:5" else 0.02)


def test_the_noise_of_the_used_qubits_is_that_of_the_whole_device():
    """The circuit on five qubits of a device of five gives what Aer's own model of the device gives."""
    circuit, angles = on_device("fake_belem"), random_angles(1)
    assert circuit.device is not None and circuit.native is not None
    small, target = restrict(circuit.native, circuit.device.target)
    assert (small.num_qubits, target.num_qubits) == (4, 4)
    shots = 200_000
    found = SOURCES["noisy"](SourceSettings(1, shots)).counts(circuit, angles) / shots
    whole = noise_model(circuit.device.target)
    sampler = SamplerV2(seed=7, options={"backend_options": {"noise_model": whole}})
    (register,) = (
        sampler.run([(circuit.native, angles.double().numpy())], shots=shots).result()[0].data.values()
    )
    expected = torch.zeros(1, circuit.n_states)
    for state, count in register.get_int_counts(0).items():
        expected[0, state] = count / shots
    assert distance(found, expected) < 0.006


def test_noise_wants_a_device():
    circuit = Circuit(make_ansatz("ry-cnot-chain", 2, 1))
    with pytest.raises(OptionError, match="source: expected a run that is planned for a device"):
        SOURCES["noisy"](SourceSettings()).probabilities(circuit, torch.zeros(1, 2))


def test_a_call_with_too_many_executions_is_several_jobs(monkeypatch):
    circuit, angles = on_device("fake_belem"), random_angles(5)
    whole = SOURCES["shots"](SourceSettings(1, 1000))
    assert whole.cost(circuit, 5) == Cost(5, 5000, 1)
    expected = whole.probabilities(circuit, angles)
    sizes = []
    for module in (source_module, sampled_module):
        monkeypatch.setattr(module, "MAX_EXECUTIONS", 2000)
    source = SOURCES["shots"](SourceSettings(1, 1000))
    run = source.result

    def counting(sampler: Any, units: Any) -> Any:
        ((_, values),) = units
        sizes.append(len(next(iter(values.values()))))
        return run(sampler, units)

    monkeypatch.setattr(source, "result", counting)
    assert source.cost(circuit, 5) == Cost(5, 5000, 3)
    found = source.probabilities(circuit, angles)
    assert sizes == [2, 2, 1]
    assert distance(found, expected) < 0.1


@pytest.mark.parametrize("shots", [0, -1, 10_000_001])
def test_shots_that_no_device_takes_are_refused(shots):
    with pytest.raises(OptionError, match=r"^shots: expected a number from 1 to 10,000,000"):
        SOURCES["shots"](SourceSettings(0, shots))


def test_the_exact_source_takes_no_shots_and_no_backend():
    with pytest.raises(OptionError, match=r"^shots: expected none for the exact source"):
        SamplingOptions(shots=5).make_source("exact", 0)
    with pytest.raises(OptionError, match=r"^backend: expected none for the source shots"):
        SamplingOptions(backend="fake_belem").make_source("shots", 0)
    with pytest.raises(OptionError, match=r"^backend: expected the name of a backend"):
        SamplingOptions().make_source("backend", 0)


# Backends


def aer_like_belem() -> Any:
    return AerSimulator.from_backend(backend_module.fake_backend("fake_belem"))


def a_sampler() -> BaseSamplerV2:
    return SamplerV2(seed=3)


def backend_source(name: str, shots: int = 4000, **settings: Any) -> Any:
    return SOURCES["backend"](SourceSettings(2, shots, name, **settings))


@pytest.mark.parametrize(
    "name", ["fake_belem", "tests.test_sources:aer_like_belem", "tests.test_sources:a_sampler"]
)
def test_whatever_implements_qiskit_s_interfaces_runs_the_circuits(name):
    circuit, angles = on_device("fake_belem"), random_angles(2)
    found = backend_source(name).probabilities(circuit, angles)
    assert distance(found, circuit.exact_probabilities(angles)) < 0.15


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("torino", OptionError, "^backend: expected fake_.., ibm_.. or module:callable, found torino"),
        ("no_such_module:x", OptionError, "^backend: expected a callable x of no_such_module"),
        ("math:pi", OptionError, "^backend: expected a callable pi of math"),
        (
            "builtins:list",
            OptionError,
            "^backend: expected a BackendV2 or a BaseSamplerV2 from builtins",
        ),
        ("fake_nothing", TargetError, "^target fake_nothing: .* no such target"),
    ],
)
def test_what_is_no_backend_is_refused(name, error, message):
    with pytest.raises(error, match=message):
        backend_source(name).probabilities(on_device("fake_belem"), random_angles(1))


def test_a_device_of_ibm_without_an_account_says_how_to_give_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("QISKIT_IBM_TOKEN", "QISKIT_IBM_CHANNEL"):
        monkeypatch.delenv(name, raising=False)
    source = backend_source("ibm_nowhere")
    assert source.is_paid
    with pytest.raises(SourceError, match=r"save_account.*QISKIT_IBM_TOKEN; qpa does not read or keep"):
        source.probabilities(on_device("fake_belem"), random_angles(1))


def test_a_paid_backend_wants_consent():
    source, cost = backend_source("ibm_nowhere"), Cost(3, 3000, 1)
    with pytest.raises(OptionError, match=r"^yes: expected consent to 20 jobs with 60,000 executions"):
        SamplingOptions().check_consent(source, cost.times(20))
    SamplingOptions(yes=True).check_consent(source, cost.times(20))
    SamplingOptions().check_consent(backend_source("fake_belem"), cost)


@pytest.mark.parametrize("mode", ["session", "batch"])
def test_sessions_and_batches_are_for_devices_of_ibm(mode):
    with pytest.raises(OptionError, match=rf"^{mode}: expected a device of IBM"):
        backend_source("fake_belem", **{mode: True})


def test_jobs_share_a_session_or_a_batch():
    with pytest.raises(OptionError, match=r"^batch: expected a session or a batch, found both"):
        backend_source("ibm_belem", session=True, batch=True)


def test_a_coupling_that_was_lost_since_planning_is_named():
    circuit = on_device("fake_torino")
    with pytest.raises(
        TargetError, match=r"backend fake_belem: expected .* as when the circuit was transpiled"
    ):
        backend_source("fake_belem").probabilities(circuit, random_angles(1))


def test_a_backend_s_own_target_can_be_planned_for():
    device = find_device("tests.test_sources:aer_like_belem")
    assert device is not None and device.target.num_qubits == 5
    circuit, angles = on_device("tests.test_sources:aer_like_belem"), random_angles(1)
    assert circuit.target == "tests.test_sources:aer_like_belem"
    found = backend_source(circuit.target).probabilities(circuit, angles)
    assert distance(found, circuit.exact_probabilities(angles)) < 0.15
    with pytest.raises(TargetError, match=r"expected a backend that has a target, found SamplerV2"):
        find_device("tests.test_sources:a_sampler")


@pytest.mark.parametrize("mode", ["Session", "Batch"])
def test_a_session_is_closed_when_its_source_is_gone(mode, monkeypatch):
    closed = []

    class Session:
        def __init__(self, backend: Any) -> None:
            self.backend = backend

        def close(self) -> None:
            closed.append(self.backend)

    class Sampler:
        def __init__(self, mode: Any) -> None:
            assert isinstance(mode, Session)
            self.mode = mode

        def run(self, units: Any, shots: int) -> Any:
            return SamplerV2(seed=1).run(units, shots=shots)

    belem = backend_module.fake_backend("fake_belem")
    monkeypatch.setattr(backend_module, "find_backend", lambda name: belem)
    monkeypatch.setattr(f"qiskit_ibm_runtime.{mode}", Session)
    monkeypatch.setattr("qiskit_ibm_runtime.executor_sampler.Sampler", Sampler)
    source = backend_source("ibm_belem", **{mode.lower(): True})
    for _ in range(2):
        source.probabilities(on_device("fake_belem"), random_angles(1))
    assert closed == []
    del source
    assert closed == [belem]


class Flaky(BaseSamplerV2):
    """A sampler whose first jobs fail."""

    def __init__(self, n_failures: int, missing: int = 0) -> None:
        self.n_failures, self.missing, self.n_runs = n_failures, missing, 0

    def run(self, pubs: Any, *, shots: int | None = None) -> Any:
        self.n_runs += 1
        if self.n_runs <= self.n_failures:
            raise ConnectionError("the device went away")
        assert shots is not None
        return SamplerV2(seed=1).run(pubs, shots=shots - self.missing)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(n_failures: int, missing: int = 0) -> Any:
        sampler = Flaky(n_failures, missing)
        monkeypatch.setattr(backend_module, "find_backend", lambda name: sampler)
        monkeypatch.setattr(backend_module.time, "sleep", lambda seconds: None)
        return sampler

    return make


def test_a_job_that_fails_is_submitted_again(flaky):
    sampler = flaky(2)
    backend_source("a:b").probabilities(on_device("fake_belem"), random_angles(1))
    assert sampler.n_runs == 3


def test_a_device_that_went_away_is_an_error_after_three_tries(flaky):
    sampler = flaky(3)
    with pytest.raises(SourceError, match=r"^backend a:b: .* 3 tries, found the device went away"):
        backend_source("a:b").probabilities(on_device("fake_belem"), random_angles(1))
    assert sampler.n_runs == 3


def test_missing_shots_are_an_error(flaky):
    flaky(0, missing=7)
    with pytest.raises(
        SourceError, match=r"^source backend: expected 4,000 shots of every circuit, found 3,993"
    ):
        backend_source("a:b").probabilities(on_device("fake_belem"), random_angles(1))


# The command line

TRAIN = ("--max-steps", "2", "--max-length", "32", "--batch-size", "2", "--device", "cpu")


def ok(cli: Cli, *arguments: str | Path) -> str:
    code, out, err = cli(*arguments)
    assert code == 0, err
    return out


def test_a_run_on_a_noisy_device_can_be_audited(
    cli: Cli, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ok(cli, "plan", "--model", llama, "--rank", "2", "--generator", "state", "--layers", "1", "--out", run)
    device = ("--source", "noisy", "--device-target", "fake_torino", "--shots", "700")
    _, _, err = cli("train", run, "--data", text_file, *TRAIN, *device)
    assert "each step: 1 circuit, 700 executions in 1 job" in err
    assert "measuring the trained circuits: 1 circuit, 700 executions in 1 job" in err
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["step_circuits"], first["step_executions"], first["step_jobs"]) == (1, 700, 1)
    directory = RunDirectory(run)
    trained, measurement = directory.read(TrainedGenerator), directory.read(Measurement)
    assert (trained.source, trained.shots, trained.gradient) == ("noisy", 700, "surrogate")
    assert trained.circuit == measurement.circuit is not None
    frozen = directory.read(FrozenAdapter)
    assert frozen.weight_error is not None and 0 < frozen.weight_error < 2
    assert frozen.frozen_loss is not None and frozen.frozen_loss != frozen.result.eval_loss
    shown = ok(cli, "inspect", run)
    for words in ("fake_torino", "700", "physical qubits", "calibrated", "relative weight error", "counts"):
        assert words in shown
    assert "the recorded counts give this adapter" in ok(cli, "verify", run)
    assert "--engine: expected nothing for a run" in cli("verify", run, "--engine", "peft")[2]
    # Once more, with more shots and corrected, on another device.
    again = ("--source", "noisy", "--shots", "3000", "--mitigation", "readout", "--device-target", "ions:9")
    ok(cli, "freeze", run, *again, "--data", text_file)
    measurement = directory.read(Measurement)
    assert (measurement.target, measurement.shots, measurement.mitigation) == ("ions:9", 3000, "readout")
    assert measurement.n_executions == 3 * 3000
    assert "the recorded counts give this adapter" in ok(cli, "verify", run)
    documents = directory.read_through(FrozenAdapter)
    others = tuple(
        one.model_copy(update={"mitigation": "none"}) if isinstance(one, Measurement) else one
        for one in documents
    )
    with pytest.raises(VerificationError, match="expected the probabilities that its counts give"):
        check_frozen(PassContext(0, directory.files, others))
    # Exactly, it is the live adapter.
    ok(cli, "freeze", run, "--source", "exact")
    measurement = directory.read(Measurement)
    assert (measurement.shots, measurement.distance, measurement.counts) == (None, 0.0, None)
    assert directory.read(FrozenAdapter).weight_error == 0.0


def test_targets_are_listed_with_their_errors(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    known = targets_module.fake_backends("a test")
    few = {name: known[name] for name in ("fake_belem", "fake_torino")}
    monkeypatch.setattr(targets_module, "fake_backends", lambda subject: few)
    shown = ok(cli, "targets")
    assert "fake_torino" in shown and "generic:27" in shown and "ions:27" in shown
    listed = {entry["target"]: entry for entry in json.loads(ok(cli, "targets", "--json"))["targets"]}
    torino = listed["fake_torino"]
    assert (torino["n_qubits"], torino["gates"]) == (133, ["cz", "id", "rz", "sx", "x"])
    assert 1e-3 < torino["median_two_qubit_error"] < 2e-2 < 10 * torino["median_readout_error"] < 1
    assert listed["ions:27"]["median_two_qubit_error"] == 2e-3
