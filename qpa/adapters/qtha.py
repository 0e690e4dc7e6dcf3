"""QTHA: a linear layer adds what a small circuit, which reads the layer's input, makes of a projection of it.

    t = D x                             D [qubits, in], a matrix product operator
    z = <Z> of each qubit               of the circuit in the state that RY(t_0) .. RY(t_n) encodes
    W x + U (t * z)                     fusion "product", v1 of the paper
    W x + U F (t_0 .. t_n, z_0 .. z_n)  fusion "linear", v2; U [out, qubits] is a matrix product operator too

The circuit is layers of RY with trained angles, each followed by a chain of CNOTs. Since it reads the input,
no change of a weight equals it: it needs a module of its own (`qpa.adapters.qtha_model`), for which formats
of plain adapters have no place. The last core of U starts at zero, so the model starts as the base.

Source: Quantum Tensor Hybrid Adaptation, arXiv 2503.12790: matrix product operators, a circuit of the input,
and both fusions. The paper does not give how the input is encoded, the bond dimension, the number of qubits,
the layers of the circuit, and where the expectations go: all that is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

from qpa.adapters.kind import Rates, Request
from qpa.adapters.matrix_product import BOND_DIMENSION, N_SITES, MatrixProduct
from qpa.adapters.module_kind import ModuleKind
from qpa.adapters.targets import EXPERTS, part_of
from qpa.documents import AdapterSpec, AdapterTensor, FrozenAdapter, TensorRules
from qpa.documents.tensors import Role
from qpa.errors import OptionError
from qpa.models.linear_layers import Layer, layers_of_mixers, linear_layers

if TYPE_CHECKING:
    from qpa.adapters.frozen_arrays import FrozenArrays

MAX_QUBITS = 8
CIRCUIT_LAYERS = 2
PRODUCT, LINEAR = "product", "linear"
FUSIONS = (PRODUCT, LINEAR)

DOWN = tuple(Role(f"qtha_down_{site}", "row", "kaiming_uniform", has_rank=None) for site in range(N_SITES))
ANGLES = Role("qtha_angles", "column", "uniform")
FUSION = Role("qtha_fusion", "row", "kaiming_uniform", is_optional=True)
UP = tuple(
    Role(f"qtha_up_{site}", "row", "zeros" if site == N_SITES - 1 else "kaiming_uniform", has_rank=None)
    for site in range(N_SITES)
)


def forms(shapes: Sequence[tuple[int, int]], rank: int) -> tuple[MatrixProduct, MatrixProduct]:
    """Return the forms of both projections of a module.

    Args:    shapes: of the module's tensors, in the order of the roles.
    Raises:  ValueError: they are not those of two matrix product operators.
    """
    return MatrixProduct.of_rows(rank, shapes[:N_SITES]), MatrixProduct.of_columns(rank, shapes[-N_SITES:])


def _check(shapes: Sequence[tuple[int, int]], rank: int) -> None:
    forms(shapes, rank)
    fusion = shapes[N_SITES + 1 : -N_SITES]
    if any(shape != (rank, 2 * rank) for shape in fusion):
        raise ValueError(f"shapes {[*fusion]} do not fuse {rank} numbers with as many")


RULES = TensorRules(roles=(*DOWN, ANGLES, FUSION, *UP), check=_check)


def _qubits(n: int) -> str:
    return f"{n} {'qubit' if n == 1 else 'qubits'}"


@final
class Qtha(ModuleKind):
    """QTHA: cores of D and U, angles [layers, qubits], and with "linear" fusion F, in every module."""

    name: ClassVar[str] = "qtha"
    title: ClassVar[str] = "QTHA"
    rules: ClassVar[TensorRules] = RULES
    default_rank: ClassVar[int] = 4
    more_options: ClassVar[Mapping[str, object]] = {
        "bond_dimension": BOND_DIMENSION,
        "circuit_layers": CIRCUIT_LAYERS,
        "fusion": PRODUCT,
    }
    formats: ClassVar[tuple[str, ...]] = ("onnx",)
    reason: ClassVar[str] = "whose circuit reads the layer's input, so that no change of a weight equals it"
    default_generator: ClassVar[str] = "direct"
    rate: ClassVar[float] = 5e-2  # 1e-1 is better on stories260K, and 2e-1 diverges
    direct_rates: ClassVar[Rates] = (3e-2, 1e-1, 3e-1)
    direct_sizes: ClassVar[tuple[Request, ...]] = (
        *(Request(rank=rank, bond_dimension=1) for rank in (1, 2, 3, 4, 6, 8)),
        *(Request(rank=4, bond_dimension=bond) for bond in (2, 3, 4, 6, 8)),
    )
    bench_variants: ClassVar[Mapping[str, Request]] = {LINEAR: Request(fusion=LINEAR)}

    def words(self, rank: int) -> str:
        """Return "QTHA of 4 qubits"."""
        return f"{self.title} of {_qubits(rank)}"

    def phrase(self, rank: int) -> str:
        """Return "a QTHA of 4 qubits"."""
        return f"a {self.words(rank)}"

    def card_note(self, frozen: FrozenAdapter) -> str:
        """Return that the circuit is in the graph, and which choices are ours."""
        module = frozen.tensors[0].module
        shapes = {tensor.role: tensor.shape for tensor in frozen.tensors if tensor.module == module}
        bonds = [bond for form in forms([*shapes.values()], frozen.rank) for bond in form.bonds]
        fusion = LINEAR if FUSION.name in shapes else PRODUCT
        return (
            "Every adapted layer adds what a circuit makes of its input; the circuit is in the graph, as\n"
            "sines, cosines and products of matrices. The method's paper (arXiv 2503.12790) leaves open how\n"
            f"the input is encoded, the circuit and the sizes. Here: RY, {_qubits(frozen.rank)}, "
            f"{shapes[ANGLES.name][0]} x RY and a chain of CNOTs,\nbond dimension {max(bonds)}. "
            f"Fusion: {fusion}."
        )

    def candidates(self, model: Any) -> dict[str, Layer]:
        """Return the linear layers, but those of experts, and those that a mixer may use without a call."""
        of_mixers = layers_of_mixers(model)
        return {
            path: layer
            for path, layer in linear_layers(model).items()
            if part_of(path) != EXPERTS and path not in of_mixers
        }

    def check_rank(self, layers: Mapping[str, Layer], rank: int | None) -> int:
        """Return the number of qubits.

        Raises:  OptionError: it is too large to be simulated for every token.
        """
        if rank is not None and rank > MAX_QUBITS:
            expected = f"at most {MAX_QUBITS} qubits with `method` {self.name}"
            raise OptionError("rank", expected, str(rank))
        return super().check_rank(layers, rank)

    def shapes(self, path: str, layer: Layer, rank: int) -> Sequence[tuple[int, int]]:
        """Return the shapes with the default options."""
        return self.shapes_for(path, layer, rank, Request())

    def shapes_for(self, path: str, layer: Layer, rank: int, request: Request) -> Sequence[tuple[int, int]]:
        """Return the shapes of the cores, of the angles, and of F where it is asked for."""
        bond_dimension = request.bond_dimension or BOND_DIMENSION
        down = MatrixProduct.of(rank, layer.n_in, bond_dimension)
        up = MatrixProduct.of(layer.n_out, rank, bond_dimension)
        angles = (request.circuit_layers or CIRCUIT_LAYERS, rank)
        fusion = [(rank, 2 * rank)] if request.fusion == LINEAR else []
        return [*down.shapes, angles, *fusion, *up.shapes]

    def wrap(self, model: Any, spec: AdapterSpec) -> Any:
        """Return a `QthaModel`."""
        from qpa.adapters.qtha_model import QthaModel

        return QthaModel(model, spec.tensors, spec.rank)

    def parameter_name(self, tensor: AdapterTensor, modules: Collection[str]) -> str:
        """Return the name in a `QthaModel`."""
        return f"model.{tensor.path}"

    def put_into(self, model: Any, arrays: FrozenArrays) -> None:
        """Let the layers add what the trained circuit makes of their input."""
        import torch

        from qpa.adapters.qtha_model import put_trained

        frozen = arrays.frozen
        values = {tensor.path: torch.from_numpy(arrays.read(tensor.path)) for tensor in frozen.tensors}
        put_trained(model, frozen.tensors, frozen.rank, values)


KIND = Qtha()
