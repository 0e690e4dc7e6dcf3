"""What a generator is: for the planner a kind that lays an adapter out, for the optimizer a module.

    options, adapter spec --kind.plan--> WeightLayout --kind.build--> a module: angles -> probabilities
                                                                      -> features -> the adapter's tensors

To add a kind, write a file of its own and add a line to `GENERATORS`. What a kind lays out in chunks is
executed by `qpa.generators.chunked`, and what comes without chunks by `qpa.generators.parametrized`; a kind
may bring a module of its own instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

from qpa.adapters.registry import KINDS
from qpa.documents import AdapterSpec, Provenance, WeightLayout
from qpa.documents.trained_generator import ANGLES_ARRAY, INITIAL_PREFIX
from qpa.errors import DocumentError, OptionError, one_of, one_sentence
from qpa.generators.layout_options import ALL, LayoutOptions
from qpa.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from qpa.circuits.execution import Execution

L = TypeVar("L", bound=LayoutOptions)

Bases = Mapping[str, "Tensor"]
"""Singular vectors by path: for lora_A the right ones, float[n, in], for lora_B the left, float[out, n]."""


class ParameterGroup(NamedTuple):
    """Parameters that are trained alike.

    Args:    name: the name of the group, such as "decoder" or "features".
             rate: the learning rate that they follow.
             decays: whether weight decay applies to them.
    """

    name: str
    parameters: tuple[Parameter, ...]
    rate: Literal["lr", "angle_lr"]
    decays: bool


class Generator(Protocol):
    """A torch module that gives what is added to the initial adapter.

    The quantum part and the classical part are apart, so that what a device measured is decoded, and decoded
    again, without another run.
    """

    layout: WeightLayout

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """Return everything that is trained, in an order that never changes."""
        ...

    def run(self) -> Tensor | None:
        """Run the circuits once.

        Returns: float[n_circuits, 2**n_qubits], from which autograd reaches the angles; None where no circuit
                 is run.
        """
        ...

    def connect(self, measured: Tensor | None) -> Tensor | None:
        """Return what an earlier `run` gave, from which autograd reaches the angles again."""
        ...

    def features(self, probabilities: Tensor | None) -> Tensor:
        """Return what the decoders see."""
        ...

    def decode(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return the generated part of every tensor, in the order and shapes of `layout.tensors`."""
        ...

    def set_bases(self, bases: Bases) -> None:
        """Take the singular vectors of the gradient.

        Raises:  ShapeError: they are not the layout's.
        """
        ...

    def __call__(self) -> tuple[Tensor, ...]:
        """Run, and decode what the run gave."""
        ...

    def parameters(self) -> Iterator[Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...

    def to(self, device: Any) -> Any: ...


class GeneratorKind(ABC):
    """A way to lay out an adapter for a generator.

    Class attributes: `name` is how a user asks for it; `words` say in a sentence what it is; `origin` says in
    a model card what an adapter's numbers were in training; `defaults` say by field what the options of
    plan-layout and train-generator mean where they are not given; `own_options` are options of plan-layout
    that generators refuse unless they name them; `needs_product` says that it generates
    products of two factors only, such as LoRA's; `angle_ratio` is the learning rate of the angles over that
    of the decoders, where the user names none; `nats_per_efold` is the loss, in nats per token, that e times
    as many trained numbers save (docs/results.md, qpa bench); `registers` are words for what the registers of
    its layouts count, without one for the sign.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    origin: ClassVar[str] = (
        "produced by a small generator around a parameterised quantum circuit, which was then evaluated once "
        "and left behind"
    )
    defaults: ClassVar[Mapping[str, str]] = {}
    own_options: ClassVar[tuple[str, ...]] = ()
    needs_product: ClassVar[bool] = False
    angle_ratio: ClassVar[float] = 1.0
    nats_per_efold: ClassVar[float] = 0.1
    registers: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def check(self, options: LayoutOptions, spec: AdapterSpec) -> None:
        """Refuse options that the kind does not have, or an adapter that it cannot generate.

        Raises:  OptionError: with what would have been right.
        """

    @abstractmethod
    def plan(self, options: LayoutOptions, spec: AdapterSpec, provenance: Provenance) -> WeightLayout:
        """Return the layout of checked options.

        Raises:  OptionError: the options do not fit each other or the adapter.
        """

    @abstractmethod
    def sizes(self, options: L, spec: AdapterSpec) -> Sequence[L]:
        """Return options of every size that the planner may choose, by growing size.

        Raises:  OptionError: the kind's size is not the planner's to choose.
        """

    def n_trained(self, options: LayoutOptions, spec: AdapterSpec) -> int:
        """Return how many numbers the layout of options trains.

        Raises:  OptionError: there is no such layout.
        """
        self.check(options, spec)
        return self.plan(options, spec, spec.provenance).account.n_generator

    @abstractmethod
    def size_words(self, options: LayoutOptions) -> str:
        """Return in words the options that make one of `sizes`, such as "circuits 4"."""

    @abstractmethod
    def rate(self, spec: AdapterSpec) -> float:
        """Return the default learning rate of decoders; see docs/results.md."""

    def smaller(self, options: L, spec: AdapterSpec) -> Sequence[L]:
        """Return options of sizes of another generator, for budgets that are too small for this one.

        Returns: options by growing size, of fewer numbers than any of `sizes` that the planner may choose.
        """
        return ()

    def build(
        self, layout: WeightLayout, seed: int, bases: Bases | None = None, execution: Execution | None = None
    ) -> Generator:
        """Return the module of a layout at its initial values.

        Args:    seed: of everything it draws.
                 bases: singular vectors of the gradient, where they are known already.
                 execution: how the circuits are run; None simulates them exactly.
        Raises:  ShapeError: the bases are not the layout's.
        """
        from qpa.generators.chunked import ChunkedGenerator
        from qpa.generators.parametrized import ParametrizedGenerator

        if not layout.groups:
            return ParametrizedGenerator(layout, seed)
        return ChunkedGenerator(layout, seed, bases, execution)


GENERATORS: Registry[GeneratorKind] = Registry(
    "generator",
    {
        "spectral": "qpa.generators.spectral:SPECTRAL",
        "state": "qpa.generators.state:STATE",
        "aligned": "qpa.generators.aligned:ALIGNED",
        "paper": "qpa.generators.paper:PAPER",
        "quantum-peft": "qpa.generators.quantum_peft:QUANTUM_PEFT",
        "direct": "qpa.generators.direct:DIRECT",
        "mpo": "qpa.generators.mpo:MPO",
    },
)


def make_generator(
    layout: WeightLayout, seed: int, bases: Bases | None = None, execution: Execution | None = None
) -> Generator:
    """Return the generator that a layout describes, see `GeneratorKind.build`.

    Raises:  OptionError: this qpa has no such kind.
             ShapeError: the bases are not the layout's, or the module trains another number of parameters
             than the layout's account says.
    """
    return GENERATORS[layout.generator].build(layout, seed, bases, execution)


def load_generator(
    layout: WeightLayout, arrays: Mapping[str, Tensor], context: Tensor | None = None
) -> Generator:
    """Return the generator of a layout with the arrays of a training.

    Args:    arrays: see `qpa.documents.TrainedGenerator`.
             context: float32[size], what its features are programmed from; None where nothing programs them.
    Raises:  DocumentError: the arrays are not this layout's.
    """
    from qpa.generators.fast_weights import contexts_of

    generator = make_generator(layout, layout.seed)
    try:
        generator.load_state_dict({n: a for n, a in arrays.items() if not n.startswith(INITIAL_PREFIX)})
    except (RuntimeError, IndexError) as error:
        expected, found = "tensors of this layout", one_sentence(error)
        raise DocumentError("the generator's arrays", expected, found, "train again") from error
    if context is not None:
        contexts_of(generator).choose(context)
    return generator


def angles_of(layout: WeightLayout, arrays: Mapping[str, Tensor], context: Tensor | None = None) -> Tensor:
    """Return the trained angles, float32[n_circuits, n_angles], in radians.

    Args:    arrays, context: see `load_generator`.
    Raises:  DocumentError: there are none, or they are not those of the layout's circuits.
    """
    if context is not None:
        programmed: Any = load_generator(layout, arrays, context)
        found: Tensor | None = programmed.chunk_features.angles.detach()
    else:
        found = arrays.get(ANGLES_ARRAY)
    if found is None or found.shape[1:] != (layout.ansatz.n_angles,):
        shape = "none" if found is None else str(list(found.shape))
        expected = f"{ANGLES_ARRAY} [n_circuits, {layout.ansatz.n_angles}]"
        raise DocumentError("the generator's arrays", expected, shape, "train again")
    return found


def kind_for(options: LayoutOptions, spec: AdapterSpec) -> GeneratorKind:
    """Return the kind that options ask for, or the one that suits the adapter."""
    return GENERATORS[options.generator or default_generator(spec)]


def default_generator(spec: AdapterSpec) -> str:
    """Return the name of the generator that suits an adapter."""
    return KINDS[spec.method].default_generator


def layout_of(options: LayoutOptions, spec: AdapterSpec, provenance: Provenance) -> WeightLayout:
    """Return the layout of options, whatever its budget.

    Raises:  OptionError: the options do not fit each other or the adapter.
    """
    kind = kind_for(options, spec)
    kind.check(options, spec)
    layout = kind.plan(options, spec, provenance)
    if options.contexts is not None and layout.features.contexts is None:
        raise OptionError("contexts", f"none with `generator` {kind.name}", ",".join(options.contexts))
    return layout


def refuse_budget(options: LayoutOptions) -> OptionError:
    """Return the error of a generator whose size the planner does not choose."""
    if options.generator is None and options.circuits is None and options.vectors == (ALL,):
        expected = "no budget, since the planner chooses the size of LoRA and DoRA alone"
        return OptionError("max_params", expected, str(options.max_params), "use `circuits`")
    expected = "neither `circuits`, `vectors` nor another generator, whose size it would choose"
    return OptionError("max_params", expected, str(options.max_params), "leave one out")


def check_product(spec: AdapterSpec, generator: str) -> None:
    """Check that an adapter is a product of two factors.

    Raises:  OptionError: it is not, and the error names the generators that do not need one.
    """
    if not spec.pairs:
        others = one_of([name for name in GENERATORS if not GENERATORS[name].needs_product])
        expected = f"{others} with `method` {spec.method}, which is no product of factors"
        raise OptionError("generator", expected, generator)


def refuse_chunk_size(options: LayoutOptions, generator: str) -> None:
    """Check that no chunk size is asked of a generator whose chunks are rows and columns.

    Raises:  OptionError: a chunk size is asked for.
    """
    if options.chunk_size is not None:
        expected = f"no chunk size with `generator` {generator}, whose chunks are rows and columns"
        advice = "leave it out or use `generator` paper"
        raise OptionError("chunk_size", expected, str(options.chunk_size), advice)


def refuse_own_options(options: LayoutOptions, kind: GeneratorKind, spec: AdapterSpec) -> None:
    """Check that no option is given that other generators have, and neither this one nor the adapter.

    Raises:  OptionError: one is given; the error names the generators that have it.
    """
    for name in sorted({name for other in GENERATORS for name in GENERATORS[other].own_options}):
        given = getattr(options, name)
        if given is not None and name not in (*kind.own_options, *KINDS[spec.method].more_options):
            others = one_of([other for other in GENERATORS if name in GENERATORS[other].own_options])
            expected = f"no such option with `generator` {kind.name}"
            raise OptionError(name, expected, str(given), f"leave it out or use `generator` {others}")


def refuse_options(options: LayoutOptions, generator: str, taken: Collection[str]) -> None:
    """Check that none of the options of chunks and circuits is given, but for those that a generator takes.

    Raises:  OptionError: one is given.
    """
    for field in fields(LayoutOptions):
        given = getattr(options, field.name)
        if field.name not in ("generator", "max_params", *taken) and given != field.default:
            expected = f"no such option with `generator` {generator}, which has no chunks"
            text = ",".join(given) if isinstance(given, tuple) else str(given)
            raise OptionError(field.name, expected, text, "leave it out")
