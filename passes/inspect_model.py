"""inspect-model: from a base model's config to the tensors of an adapter.

Rules:
1. Only the config is read; the model is built on the meta device.
2. The kind of adapter chooses its modules and their tensors (`qpa.adapters`). Of a model that also sees or
   hears, only the language model and the head are adapted.
3. target_modules and target_parameters of the result are the shortest lists of names that select exactly
   these modules in PEFT: module types where they are unambiguous, longer paths where they are not. What a
   target means and the adapter cannot be on, the result says in left_out.
4. The adapter is tried on a model without weights: PEFT refuses some modules, and where a model keeps its
   experts fused, PEFT takes some names to mean the experts, even where other modules have them.
5. An adapter that goes on from a frozen one has its tensors, rank and alpha, and keeps a copy of its values:
   the first step starts where the other training ended.
6. An adapter on a basis has the tensors, rank, alpha and seed of the basis; the training takes its directions
   from there.
7. As far as a config tells, a model that is not causal is refused, and one whose quantised weights cannot be
   loaded here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, final

from qpa.adapters.kind import AdapterKind, Request
from qpa.adapters.matrix_product import bond_dimension_option
from qpa.adapters.on_basis import PlannedBasis
from qpa.adapters.parent import Parent
from qpa.adapters.qtha import FUSIONS
from qpa.adapters.registry import DEFAULT, KINDS
from qpa.adapters.targets import ALL_LINEAR, HELP, WORDS
from qpa.documents import AdapterSpec, BaseModelReference, Document
from qpa.errors import OptionError
from qpa.models.base_model import build_on_meta, config_file_digest, load_config
from qpa.models.causality import check_causal_config
from qpa.models.linear_layers import head_path
from qpa.models.quantization import check_quantization
from qpa.models.tied_weights import ties_head
from qpa.pipeline.options import check_options, defaults_by_name, option
from qpa.pipeline.pass_protocol import PassContext


@final
@dataclass(frozen=True, slots=True)
class InspectModel:
    """Find the modules to adapt and the shapes of their adapter.

    Args:    model: local directory or Hub id.
             rank: of LoRA and DoRA, width of a feed-forward adapter, tokens of a prefix, size of Cayley's
             blocks, qubits of QTHA; None means the kind's default, or the largest that the adapted modules
             allow where that is less.
             alpha: of LoRA and DoRA; None means 2 * rank, as in arXiv 2410.09846.
             targets: words such as "all-linear" (`qpa.adapters.targets`), module names, or both; None means
             the kind's own.
             method: the kind of adapter, by its name in `qpa.adapters.registry`.
             bond_dimension, circuit_layers, fusion: of QTHA; None means the kind's defaults. The generator of
             matrix product operators has a bond dimension too, so plan-layout says who has none.
             continue_from: a run whose frozen adapter this one starts as; it gives rank, alpha, targets
             and other options of its kind where they are not said.
             basis: a directory of `qpa basis`; likewise.
             trust_remote_code: the user allows the model's own Python code to run.
    Source:  ours.
    """

    name: ClassVar[str] = "inspect-model"
    consumes: ClassVar[type] = type(None)
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = AdapterSpec
    section: ClassVar[str] = "plan"

    model: str = option(help="Base model: a local directory or a Hub id. Only its config is read.")
    rank: int | None = option(
        None,
        help="Rank, at most the smallest side of an adapted layer; tokens of a prefix; width of a "
        "feed-forward adapter; size of Cayley's blocks, which divides the inputs of every adapted layer; "
        "qubits of QTHA.",
        at_least=1,
        shown_default=lambda: _by_kind(lambda kind: kind.default_rank if kind.has_rank else None),
    )
    alpha: float | None = option(
        None,
        help="Scale of a product of two factors: it is multiplied by alpha / rank.",
        above=0,
        shown_default="2 * rank",
    )
    targets: tuple[str, ...] | None = option(
        None,
        help=HELP,
        shown_default=lambda: _by_kind(_default_targets),
    )
    method: str = option(
        DEFAULT,
        help="Kind of adapter: {choices}.",
        choices=KINDS,
        choice_words=lambda name: KINDS[name].title,
    )
    bond_dimension: int | None = bond_dimension_option()
    circuit_layers: int | None = option(
        None,
        help="Layers of the circuits that read a layer's input.",
        at_least=1,
        shown_default=lambda: _by_kind(lambda kind: kind.more_options.get("circuit_layers")),
    )
    fusion: str | None = option(
        None,
        help="How such a circuit and its input are put together: {choices}.",
        choices=FUSIONS,
        shown_default=lambda: _by_kind(lambda kind: kind.more_options.get("fusion")),
    )
    continue_from: str | None = option(
        None,
        help="Run whose frozen adapter this one starts as, for the same base model and layers.",
        is_path=True,
        provenance=False,
    )
    basis: str | None = option(
        None,
        help="Directory of qpa basis, whose directions the adapter shares.",
        is_path=True,
        provenance=False,
    )
    revision: str | None = option(None, help="Branch, tag or commit on the Hub.")
    trust_remote_code: bool = option(False, help="Run Python code that comes with the model.")

    def run(self, source: None, context: PassContext) -> AdapterSpec:
        """Build the model on the meta device and describe its adapter.

        Raises:  OptionError: method, rank or alpha out of range, a target that matches nothing, or some of
                 the layers of a mixture's experts.
                 ModelError: no config, an unknown architecture, a model that is not causal, weights
                 quantised in a way for which packages are missing, or nothing that can be adapted.
        """
        check_options(self)
        kind = KINDS[self.method]
        self._check_kind(kind)
        config = load_config(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)
        check_quantization(config, self.model)
        model = build_on_meta(config, self.model, trust_remote_code=self.trust_remote_code)
        check_causal_config(config, self.model, trust_remote_code=self.trust_remote_code)
        base = self._reference(config, model)
        if self.continue_from is not None and self.basis is not None:
            raise OptionError("basis", "one of `basis` and `continue_from`", "both", "leave one out")
        basis = None if self.basis is None else PlannedBasis.read(Path(self.basis))
        parent = None if self.continue_from is None else Parent.read(Path(self.continue_from))
        asked = Request(**{field.name: getattr(self, field.name) for field in fields(Request)})
        origin = parent or basis
        planned = kind.plan(model, asked if origin is None else origin.completed(asked))
        tensors = planned.tensors
        if origin is not None:
            origin.check(base, self.method, planned)
        if parent is not None:
            tensors = tuple(tensor.model_copy(update={"initial": "parent"}) for tensor in tensors)
        spec = AdapterSpec(
            provenance=context.provenance(self, None),
            base=base,
            method=self.method,
            rank=planned.rank,
            alpha=planned.alpha,
            target_modules=planned.target_modules,
            target_parameters=planned.target_parameters,
            left_out=planned.left_out,
            fan_in_fan_out=planned.fan_in_fan_out,
            tensors=tensors,
            seed=context.seed if basis is None else basis.spec.seed,
            basis=None if basis is None else basis.reference,
            parent=None if parent is None else parent.copied_to(context),
        )
        kind.check(model, spec)
        return spec

    def _check_kind(self, kind: AdapterKind) -> None:
        if self.targets is not None and not self.targets:
            raise OptionError("targets", f"{', '.join(WORDS)} or module names", "none")
        for name, value, is_known in (
            ("alpha", self.alpha, kind.has_alpha),
            ("rank", self.rank, kind.has_rank),
            ("targets", ",".join(self.targets or ()) or None, kind.has_targets),
            ("circuit_layers", self.circuit_layers, "circuit_layers" in kind.more_options),
            ("fusion", self.fusion, "fusion" in kind.more_options),
        ):
            if value is not None and not is_known:
                expected = f"no such option with `method` {kind.name}"
                raise OptionError(name, expected, str(value), "leave it out")

    def _reference(self, config: Any, model: Any) -> BaseModelReference:
        return BaseModelReference(
            name_or_path=self.model,
            local=Path(self.model).is_dir(),
            revision=self.revision,
            config_digest=config_file_digest(self.model, revision=self.revision),
            model_type=config.model_type,
            architecture=type(model).__name__,
            head=head_path(model),
            ties_lm_head=ties_head(model),
            trust_remote_code=self.trust_remote_code,
        )


def _by_kind(default: Callable[[AdapterKind], object]) -> str:
    """Return a default in words, by the kind of adapter; None where a kind has none."""
    values = {name: default(KINDS[name]) for name in (DEFAULT, *KINDS)}
    return defaults_by_name({name: value for name, value in values.items() if value is not None})


def _default_targets(kind: AdapterKind) -> str | None:
    if not kind.has_targets:
        return None
    names = getattr(kind, "default_targets", ())
    return ALL_LINEAR if ALL_LINEAR in names else "layers of the kind's own"
