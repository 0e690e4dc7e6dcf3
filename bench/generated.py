"""qpa's own generator as a method of the bench, its controls, and its variants with one part changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qpa.adapters.kind import Rates
from qpa.adapters.parameter_view import AdapterParameter
from qpa.adapters.registry import DEFAULT, KINDS
from qpa.bench.method import Attached, BenchBase, Configuration
from qpa.circuits.ansatz import ANSATZE
from qpa.documents import AdapterSpec, WeightLayout
from qpa.documents.weight_layout import OF_TRAINED_CIRCUITS, WITH_CIRCUITS
from qpa.generators.direct import DIRECT
from qpa.generators.features.kind import FEATURES
from qpa.generators.generator import GENERATORS, kind_for, layout_of, make_generator
from qpa.generators.layout_options import LayoutOptions
from qpa.generators.size_search import sizes_around
from qpa.seeds import split_seed
from qpa.training.calibration import choose_rows
from qpa.training.evaluation import causal_loss
from qpa.training.generated_adapter import GeneratedAdapter, attach_generator

BATCH_SIZE = 8
ALIGNED_RANK = 8
PAPER_RANK = 4
MAX_CHUNK_SIZE = 4096
RATES = (1e-2, 2e-2, 4e-2)
DEFAULT_ANSATZ = LayoutOptions().ansatz
STATE_RATES = (1.5e-2, 5e-2, 1.5e-1)

Plans = Callable[[LayoutOptions, AdapterSpec, int], Iterable[LayoutOptions]]
Calibrate = Callable[[BenchBase, GeneratedAdapter, AdapterSpec, int], None]


def calibrate_on_data(base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, seed: int) -> None:
    """Take the directions of the gradient of a few batches of the training rows, as a training does."""
    chosen = choose_rows(len(base.train_rows), BATCH_SIZE, split_seed(seed, "calibration"))
    calibrate_on(base, adapted, spec, [base.train_rows[numbers] for numbers in chosen])


def calibrate_on(
    base: BenchBase, adapted: GeneratedAdapter, spec: AdapterSpec, batches: Sequence[Tensor]
) -> None:
    """Take the directions of the gradient of batches, int64[n_rows, length]."""
    device = next(iter(adapted.parameters.values())).device

    def loss(batch: Tensor) -> Tensor:
        return causal_loss(adapted.model, batch, batch, bf16=base.bf16)

    adapted.calibrate(spec, loss, [batch.to(device) for batch in batches])


@dataclass(frozen=True)
class Generated:
    """A generator as a method: one rule gives its sizes for a budget.

    Args:    plan: options of the layout besides its size.
             plans: the sizes around a budget, as plans.
             rank: of the adapter, where it is not what `InspectModel` chooses.
             adapter: the adapter's method, as `InspectModel` calls it.
             calibrate: gives an attached generator the directions of its spectra.
    """

    name: str
    plan: LayoutOptions
    plans: Plans
    rates: Rates = RATES
    rank: int | None = None
    adapter: str = DEFAULT
    calibrate: Calibrate = calibrate_on_data

    def sizes(self, base: BenchBase, budgets: Sequence[int]) -> Sequence[Configuration]:
        """Return the plans around each budget that are smaller than the adapter."""
        spec = self._spec(base, seed=0)
        found: dict[str, Configuration] = {}
        for budget in budgets:
            for plan in self.plans(self.plan, spec, budget):
                account = layout_of(plan, spec, spec.provenance).account
                n_trained = account.n_generator
                if n_trained >= account.n_adapter:
                    continue  # the adapter itself is smaller
                knobs = self._knobs(plan)
                label = ", ".join(f"{name} {value}" for name, value in knobs)
                found[label] = Configuration(label, knobs, n_trained)
        return sorted(found.values(), key=lambda configuration: configuration.n_trained)

    def attach(self, base: BenchBase, configuration: Configuration, *, rate: float, seed: int) -> Attached:
        """Put an ordinary adapter on the model and a generator into its optimizer.

        Args:    rate: of the decoders; the angles' is as many times higher as by default.
                 seed: of lora_A, the angles and the calibration rows.
        """
        spec = self._spec(base, seed)
        layout = self._layout(configuration, spec)
        kind = GENERATORS[layout.generator]
        # Where the budget chose another generator, the rates are those around that one's own default.
        lr = rate * kind.rate(spec) / kind_for(self.plan, spec).rate(spec)
        angle_lr = lr * kind.angle_ratio
        adapted = attach_generator(base.load(), spec, make_generator(layout, seed), lr=lr, angle_lr=angle_lr)
        self.calibrate(base, adapted, spec, seed)
        parameters = adapted.parameters
        is_lora = self.adapter == DEFAULT

        def save(folder: Path) -> None:
            save_adapter(parameters, folder)

        return Attached(adapted.model, adapted.optimizer, save, is_lora)

    def _spec(self, base: BenchBase, seed: int) -> AdapterSpec:
        spec = base.inspect(None, self.adapter)
        if self.rank is not None:
            spec = base.inspect(min(self.rank, spec.rank), self.adapter)
        return with_seed(spec, seed)

    def _layout(self, configuration: Configuration, spec: AdapterSpec) -> WeightLayout:
        knobs: dict[str, Any] = dict(configuration.knobs)
        if "vectors" in knobs:
            knobs["vectors"] = tuple(knobs["vectors"].split(" "))
        return layout_of(replace(self.plan, **knobs), spec, spec.provenance)

    def _knobs(self, plan: LayoutOptions) -> tuple[tuple[str, int | str], ...]:
        """Return the options in which a plan of some size differs from the method's own."""
        found: list[tuple[str, int | str]] = []
        for option in fields(plan):
            value = getattr(plan, option.name)
            if value != getattr(self.plan, option.name):
                found.append((option.name, " ".join(value) if isinstance(value, tuple) else value))
        return tuple(found)


def sized_plans(plan: LayoutOptions, spec: AdapterSpec, budget: int) -> list[LayoutOptions]:
    """Return the planner's sizes below and above the budget."""
    return [sized.options for sized in sizes_around(plan, spec, budget)[-2:]]


def _aligned_plans(plan: LayoutOptions, spec: AdapterSpec, budget: int) -> list[LayoutOptions]:
    """Return the numbers of circuits below and above the budget."""
    n_circuit = layout_of(replace(plan, circuits=1), spec, spec.provenance).account.n_generator
    return [replace(plan, circuits=n) for n in {max(1, budget // n_circuit), budget // n_circuit + 1}]


def _paper_plans(plan: LayoutOptions, spec: AdapterSpec, budget: int) -> list[LayoutOptions]:
    """Return the chunk size that fits the budget, or the smallest sensible one where none does."""
    smallest, per_number = 64, 33
    fixed = layout_of(replace(plan, chunk_size=smallest), spec, spec.provenance).account.n_generator
    size = smallest + max(0, budget - fixed) // per_number
    return [replace(plan, chunk_size=min(size, MAX_CHUNK_SIZE))]


def with_seed(spec: AdapterSpec, seed: int) -> AdapterSpec:
    """Return the same adapter spec with another seed."""
    return spec.model_copy(update={"seed": seed})


def save_adapter(parameters: Mapping[str, AdapterParameter], folder: Path) -> None:
    """Write an adapter's tensors by their paths."""
    tensors = {path: parameter.detach().cpu().contiguous() for path, parameter in parameters.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def _spectral(name: str, **options: Any) -> Generated:
    return Generated(name, LayoutOptions(**options), sized_plans)


CONTROLS = (
    _spectral("qpa:classical", features="classical"),
    _spectral("qpa:random", features="random"),
    _spectral("qpa:bits", features="bits"),
)
ABLATIONS = (
    _spectral("qpa:no-spectrum", spectrum=False),
    _spectral("qpa:no-windows", windows=False),
    _spectral("qpa:own-inputs", share_inputs=False),
    _spectral("qpa:four-layers", layers=4),
)
GENERATED = {
    method.name: method
    for method in (
        _spectral("qpa"),
        _spectral("qpa:spectral", generator="spectral"),
        *CONTROLS,
        *ABLATIONS,
        Generated(
            "qpa:aligned",
            LayoutOptions(generator="aligned"),
            _aligned_plans,
            (1e-3, 3e-3, 1e-2),
            ALIGNED_RANK,
        ),
        Generated(
            "qpa:paper",
            LayoutOptions(generator="paper"),
            _paper_plans,
            (3e-4, 1e-3, 3e-3),
            PAPER_RANK,
        ),
    )
}


def state_method(features: str, ansatz: str = DEFAULT_ANSATZ) -> Generated:
    """Return the generator of one state, named after its features and ansatz where they are no defaults."""
    others = [name for name in (features, ansatz) if name not in ("circuit", DEFAULT_ANSATZ)]
    plan = LayoutOptions(generator="state", features=features, ansatz=ansatz)
    return Generated(":".join(("state", *others)), plan, sized_plans, STATE_RATES)


_STATE_FEATURES = [name for name in FEATURES if name in WITH_CIRCUITS or FEATURES[name].needs_registers]
_OTHER_ANSATZE = [name for name in ANSATZE if name != DEFAULT_ANSATZ]

GENERATED_STATES = {
    method.name: method
    for method in (
        *(state_method(features) for features in _STATE_FEATURES),
        *(state_method(features, ansatz) for features in OF_TRAINED_CIRCUITS for ansatz in _OTHER_ANSATZE),
    )
}
"""One state over the directions in which the loss falls, what stands in for it, and other circuits."""


def _of_kind(name: str) -> Generated:
    """Return the generator that suits a kind of adapter."""
    kind = KINDS[name]
    plans = sized_plans if kind.rules.is_product else _aligned_plans
    return Generated(f"qpa:{name}", LayoutOptions(), plans, kind.generated_rates or RATES, adapter=name)


GENERATED_KINDS = {
    f"qpa:{name}": _of_kind(name)
    for name in KINDS
    if name != DEFAULT and KINDS[name].default_generator != DIRECT.name
}
"""Generators of the other kinds of adapters; what suits no generator is in `qpa.bench.direct` as it is."""
