"""What a kind of features is, and the kinds there are.

The features of a chunk are numbers that depend on the chunk's basis state alone: those of circuits, or those
of a control in the circuits' place. A kind says how many numbers it trains, and builds a module with one
parameter or a few. `run` of the module gives probabilities, where there are any; the module maps them to
features float[2**n_qubits, n_circuits].

Adding a kind is a file of its own and a line in `FEATURES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from qpa.documents import Ansatz, WeightLayout, Windows
from qpa.errors import OptionError
from qpa.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from qpa.circuits.execution import Execution


class FeatureModule(Protocol):
    """A torch module that gives the features of every basis state."""

    def run(self) -> Tensor | None:
        """Run the circuits; return float[n_circuits, 2**n_qubits], None where there are none."""
        ...

    def connect(self, measured: Tensor | None) -> Tensor | None:
        """Return what an earlier `run` measured, connected to the angles again."""
        ...

    def __call__(self, probabilities: Tensor | None) -> Tensor:
        """Return float[2**n_qubits, n_circuits]."""
        ...

    def parameters(self) -> Iterator[Parameter]: ...


class Room(NamedTuple):
    """What the numbers of a control have to describe.

    Args:    n_circuits: the number of independent circuits, or of a control's columns.
             windows, registers: those of the features, see `qpa.documents.Features`.
             ansatz: of the circuits that the control stands in for.
             states: the basis states that chunks read.
             limit: the most numbers that the control may train; None for as many as suit it.
    """

    n_circuits: int
    windows: Windows | None
    registers: tuple[int, ...]
    ansatz: Ansatz
    states: Sequence[int]
    limit: int | None


class FeatureKind(ABC):
    """A kind of features.

    Class attributes: `name` is how a user asks for it; `needs_registers` says that it reads the registers of
    a basis state, which only some generators arrange; `n_sign_qubits` is how many qubits, before all others,
    tell the sign of a feature, and are 0 in the basis states of chunks.
    """

    name: ClassVar[str]
    needs_registers: ClassVar[bool] = False
    n_sign_qubits: ClassVar[int] = 0

    @abstractmethod
    def n_control(self, room: Room) -> int:
        """Return how many numbers a control trains in the place of angles; 0 for circuits.

        Raises:  OptionError: the smallest possible number is above the limit.
        """

    def within(self, room: Room, smallest: int, default: int) -> int:
        """Return the limit of a control, or its default, where it reaches the control's smallest size.

        Raises:  OptionError: it does not.
        """
        if room.limit is None:
            return default
        if room.limit < smallest:
            expected = f"at least {smallest} with `features` {self.name}"
            raise OptionError("control_size", expected, str(room.limit))
        return room.limit

    @abstractmethod
    def build(self, layout: WeightLayout, seed: int, execution: Execution) -> Any:
        """Return the `FeatureModule` of a layout at its initial values."""


FEATURES: Registry[FeatureKind] = Registry(
    "features",
    {
        "circuit": "qpa.generators.features.circuit:CIRCUIT",
        "signed": "qpa.generators.features.circuit:SIGNED",
        "classical": "qpa.generators.features.table:CLASSICAL",
        "random": "qpa.generators.features.circuit:RANDOM",
        "bits": "qpa.generators.features.bits:BITS",
        "constant": "qpa.generators.features.tied:CONSTANT",
        "log-linear": "qpa.generators.features.log_linear:LOG_LINEAR",
        "tables": "qpa.generators.features.register_tables:REGISTER_TABLES",
        "network": "qpa.generators.features.network:NETWORK",
        "projection": "qpa.generators.features.projection:PROJECTION",
        "tying": "qpa.generators.features.tied:TYING",
        "shared": "qpa.generators.features.tied:SHARED",
        "own": "qpa.generators.features.tied:OWN",
    },
)


class WithoutCircuits:
    """The half of a `FeatureModule` that a control without circuits needs not write."""

    def run(self) -> None:
        """Return no probabilities."""

    def connect(self, measured: None) -> None:
        """Return no probabilities."""
