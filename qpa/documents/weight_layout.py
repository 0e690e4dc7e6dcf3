"""WeightLayout: which numbers form which chunk, which features and decoders give them, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.account import ParameterAccount, with_own_account
from qpa.documents.ansatz import MAX_QUBITS, Ansatz, chain_of_schema_1
from qpa.documents.base import Document, JsonObject, Record, with_parents
from qpa.documents.parametrized_tensor import ParametrizedTensor
from qpa.documents.tensors import TensorShape

ChunkAxis = Literal["row", "column", "spectrum", "flat"]


class Decoder(Record):
    """How the features of a group's chunks become their numbers.

    Args:    kind: "linear" means linear layers without activation (arXiv 2410.09846, mapping model).
             widths: the widths of the layers, from the number of features to the size of a chunk.
             has_bias: whether every layer has a bias.
    """

    kind: Literal["linear"]
    widths: tuple[int, ...]
    has_bias: bool

    @property
    def n_parameters(self) -> int:
        """Return how many numbers are trained in it."""
        pairs = zip(self.widths, self.widths[1:], strict=False)
        return sum((n_in + self.has_bias) * n_out for n_in, n_out in pairs)


class ChunkedTensor(TensorShape):
    """An adapter tensor, or a block of its rows or columns, and the chunks that fill it.

    Args:    chunks: numbers of the group's chunks, in the order of the block's rows or columns; the same
             chunks may fill several tensors. Empty in a flat group, where tensors lie end to end, and
             for the lora_A of a spectrum, which holds the basis itself.
    """

    chunks: tuple[int, ...] = ()


class ChunkGroup(Record):
    """Chunks that share one decoder.

    A chunk is, for axis "row", a row of a tensor such as lora_A; for "column", a column of one such as
    lora_B; for "spectrum", one factor for each of chunk_size fixed rank-1 matrices u v^T, whose v are rows of
    lora_A after the generated ones, and whose u, times their factors, are columns of lora_B; for "flat",
    the numbers from i * chunk_size on of all tensors, which are raveled in C order and laid end to end; the
    last chunk is padded.

    Args:    name: "q_proj.lora_A", or "all" for the flat layout.
             tensors: where the axis is "spectrum", lora_A and lora_B of each module in turn.
             states: for every chunk, the basis state of the circuits that gives its features.
             decoder: maps the layout's n_features numbers to the chunk_size numbers of a chunk.
    """

    name: str
    axis: ChunkAxis
    tensors: tuple[ChunkedTensor, ...]
    states: tuple[int, ...]
    chunk_size: int
    decoder: Decoder

    @property
    def n_chunks(self) -> int:
        """Return the number of chunks."""
        return len(self.states)

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if self.chunk_size < 1 or not self.states:
            raise ValueError(f"{self.name}: a group has at least one chunk of at least one number")
        if len(self.decoder.widths) < 2 or self.decoder.widths[-1] != self.chunk_size:
            raise ValueError(f"{self.name}: the decoder must end in chunk_size numbers")
        if self.axis == "flat":
            self._verify_flat()
        else:
            self._verify_blocks()
        return self

    def _verify_flat(self) -> None:
        n_numbers = sum(tensor.n_numbers for tensor in self.tensors)
        if self.n_chunks != -(-n_numbers // self.chunk_size):
            raise ValueError(
                f"{self.name}: {self.n_chunks} chunks of {self.chunk_size} do not cover {n_numbers}"
            )

    def _verify_blocks(self) -> None:
        used = {chunk for tensor in self.tensors for chunk in tensor.chunks}
        if used != set(range(self.n_chunks)):
            raise ValueError(f"{self.name}: {self.n_chunks} chunks, but tensors use {len(used)} of them")
        for tensor in self.tensors:
            is_row = self.axis == "row" or (self.axis == "spectrum" and not tensor.chunks)
            rank, length = tensor.shape if is_row else tensor.shape[::-1]
            n_used = len(tensor.chunks) * (self.chunk_size if self.axis == "spectrum" else 1)
            if self.axis != "spectrum" and length != self.chunk_size:
                raise ValueError(f"{self.name}: a chunk is one {self.axis} of {length} numbers")
            if n_used > rank:
                raise ValueError(f"{self.name}: {n_used} {self.axis}s do not fit rank {rank}")
        if self.axis == "spectrum" and any(bool(t.chunks) != i % 2 for i, t in enumerate(self.tensors)):
            raise ValueError(
                f"{self.name}: a spectrum has lora_A without chunks and lora_B with chunks in turn"
            )


class Windows(Record):
    """The windows of a layout: circuit k starts spread evenly over the basis states of window k.

    The first n_window_qubits bits of a basis state are the number of its window. In every group, the states
    of a window are the chunks of a few neighbouring layers of the model.

    Args:    n_window_qubits: qubits that number the windows.
             n_chunk_qubits: qubits that number a group's chunks within a window; the rest number the groups.
    """

    n_window_qubits: int
    n_chunk_qubits: int

    def fit(self, n_qubits: int) -> bool:
        """Return whether circuits of `n_qubits` qubits have enough for both."""
        return min(self.n_window_qubits, self.n_chunk_qubits) >= 0 and (
            self.n_window_qubits + self.n_chunk_qubits <= n_qubits
        )


OF_TRAINED_CIRCUITS = ("circuit", "signed")
WITH_CIRCUITS = (*OF_TRAINED_CIRCUITS, "random")
"""Kinds of features for which circuits are run, whether or not their angles are trained."""

NO_FEATURES = "none"
"""The kind of features of a layout without chunks, where nothing reads any."""


class Contexts(Record):
    """The contexts from each of which a network programs what is trained in the features.

    Args:    kind: "task" for trained vectors, "prompt" for what the base model makes of a text.
             names: of the contexts, in the order of the data's sources.
             size: how many numbers tell one context.
    """

    kind: str
    names: tuple[str, ...]
    size: int

    def n_program(self, n_programmed: int) -> int:
        """Return how many numbers are trained to program others, and to tell the contexts apart."""
        return self.size * (n_programmed + (len(self.names) if self.kind == "task" else 0))


class Features(Record):
    """What a decoder sees of a chunk: numbers that depend on the chunk's basis state alone.

    Args:    kind: a name in `qpa.generators.features.kind.FEATURES`. "circuit" means that feature k comes
             from the probability that circuit k gives to the basis state, "signed" from those of two basis
             states, "random" is as "circuit" with angles that stay as drawn. "none" is that of a layout
             without chunks. The others are controls in the circuits' place.
             n_circuits: the number of independent circuits, or of a control's columns; each gives one
             number to every chunk.
             windows: where the circuits start; None means that angles are drawn uniformly in [-pi, pi).
             registers: the qubits of each register into which the qubits are divided, the first with the
             most significant bits; the generator says what a register counts. () means no registers.
             has_index_bits: whether the bits of the basis state are features too, most significant first.
             n_control: the numbers that a control trains in the place of angles; 0 for circuits.
             contexts: what programs these numbers or the angles; None where they are the same for all data.
    """

    kind: str
    n_circuits: int
    windows: Windows | None
    registers: tuple[int, ...]
    has_index_bits: bool
    n_control: int
    contexts: Contexts | None

    @property
    def has_circuits(self) -> bool:
        """Return whether circuits are run, whether or not their angles are trained."""
        return self.kind in WITH_CIRCUITS

    def n_angles(self, ansatz: Ansatz) -> int:
        """Return how many angles are trained."""
        return self.n_circuits * ansatz.n_angles if self.kind in OF_TRAINED_CIRCUITS else 0

    def n_program(self, ansatz: Ansatz) -> int:
        """Return how many numbers are trained to program the others from contexts."""
        n_programmed = self.n_angles(ansatz) + self.n_control
        return self.contexts.n_program(n_programmed) if self.contexts else 0


class PlannedSize(Record):
    """One size that a plan could have had within or beside its budget.

    Args:    words: the options that make the size, such as "circuits 4".
             n_trained: the number of trained numbers.
             loss_difference: its expected loss less that of the chosen size, in nats per token.
             is_chosen: whether it is the size of this layout.
    """

    words: str
    n_trained: int
    loss_difference: float
    is_chosen: bool


def _upgrade_1(content: JsonObject) -> JsonObject:
    """Version 1 knew circuits without windows only, and numbered chunks without gap."""
    groups: list[Any] = content["groups"]  # type: ignore[assignment]
    n_left = 2**MAX_QUBITS
    for group in groups:
        first, n_chunks = group.pop("first_chunk"), group.pop("n_chunks")
        n_left -= n_chunks
        if n_chunks < 0 or n_left < 0:
            raise ValueError(f"{n_chunks} chunks are not within 0 and 2**{MAX_QUBITS}")
        group["states"] = list(range(first, first + n_chunks))
        placed = 0
        for tensor in group["tensors"]:
            n_used = {"row": tensor["shape"][0], "column": tensor["shape"][1]}.get(group["axis"], 0)
            if placed + n_used > n_chunks:
                raise ValueError(f"{n_chunks} chunks, but tensors use {placed + n_used} of them")
            tensor["chunks"] = list(range(placed, placed + n_used))
            placed += n_used
    return content | {"features": "circuit", "windows": None, "groups": groups}


def _upgrade_2(content: JsonObject) -> JsonObject:
    """Version 2 spread its records over the document, and called the numbers of a control angles."""
    content = with_parents(content)
    groups: list[Any] = content["groups"]  # type: ignore[assignment]
    for group in groups:
        widths, has_bias = group.pop("decoder_widths"), group.pop("decoder_bias")
        group["decoder"] = {"kind": "linear", "widths": widths, "has_bias": has_bias}
    windows: Any = content.pop("windows")
    if windows is not None:
        windows = {
            "n_window_qubits": windows["n_head_qubits"],
            "n_chunk_qubits": windows["n_layer_qubits"],
        }
    features = {
        "kind": content.pop("features"),
        "n_circuits": content.pop("n_circuits"),
        "windows": windows,
        "has_index_bits": content.pop("index_bits"),
    }
    account: Any = content["account"]
    is_control = features["kind"] in ("classical", "bits")
    n_angles = account["n_angles"]
    account = account | {
        "n_angles": 0 if is_control else n_angles,
        "n_control": n_angles if is_control else 0,
    }
    provenance: Any = content["provenance"]
    return content | {
        "features": features,
        "ansatz": chain_of_schema_1(content.pop("n_layers"), content.pop("n_qubits")),
        "account": account,
        "seed": provenance["seed"],
        "budget": None,
        "sizes": [],
    }


def _upgrade_3(content: JsonObject) -> JsonObject:
    """Version 3 knew no registers and no kept tensors; the account alone said what a control trains."""
    features: Any = content["features"]
    account: Any = content["account"]
    features = features | {"registers": [], "n_control": account["n_control"]}
    return content | {"features": features, "kept": []}


def _upgrade_4(content: JsonObject) -> JsonObject:
    """Version 4 knew tensors of chunks only, and no contexts."""
    features: Any = content["features"]
    return with_own_account(content) | {"parametrized": [], "features": features | {"contexts": None}}


class WeightLayout(Document):
    """How a generator's outputs become the adapter.

    Invariants: every chunk has a basis state of its own; a tensor is parametrized, or in one group, or in one
    of axis "column" and one of axis "spectrum", which together fit its rank; decoders take n_features
    numbers; features are read where there are groups; the account adds up.

    Args:    generator: a name in `qpa.generators.generator.GENERATORS`.
             features: what decoders see of each chunk.
             ansatz: the ansatz of the circuits whose probabilities are features. Without groups no circuit
             is run, and it is the smallest there is.
             groups: of the tensors that chunks fill; () where there are none.
             parametrized: the tensors that come of numbers of their own, without chunks.
             kept: all other tensors of the adapter, which stay as they start.
             seed: the seed of everything the generator and the adapter draw before training.
             budget: the most numbers that may be trained; None where no budget chose the size.
             sizes: the chosen size and its neighbours, by growing size; () without a budget.
    """

    kind: ClassVar[str] = "weight-layout"
    upgrades: ClassVar[tuple[Any, ...]] = (_upgrade_1, _upgrade_2, _upgrade_3, _upgrade_4)

    generator: str
    features: Features
    ansatz: Ansatz
    groups: tuple[ChunkGroup, ...]
    parametrized: tuple[ParametrizedTensor, ...]
    kept: tuple[TensorShape, ...]
    account: ParameterAccount
    seed: int
    budget: int | None
    sizes: tuple[PlannedSize, ...]

    @property
    def n_chunks(self) -> int:
        """Return the number of chunks of all groups."""
        return sum(group.n_chunks for group in self.groups)

    @property
    def states(self) -> list[int]:
        """Return the basis states of all chunks, group by group."""
        return [state for group in self.groups for state in group.states]

    @property
    def n_circuits(self) -> int:
        """Return the number of independent circuits, or of a control's columns."""
        return self.features.n_circuits

    @property
    def n_features(self) -> int:
        """Return how many numbers a decoder sees per chunk."""
        return self.n_circuits + (self.ansatz.n_qubits if self.features.has_index_bits else 0)

    @property
    def tensors(self) -> tuple[TensorShape, ...]:
        """Return all tensors, in the order in which the generator emits them."""
        shapes = {tensor.path: tensor.shape for group in self.groups for tensor in group.tensors}
        shapes |= {tensor.path: tensor.shape for tensor in self.parametrized}
        return tuple(TensorShape(path=path, shape=shape) for path, shape in shapes.items())

    @model_validator(mode="after")
    def _verify(self) -> Self:
        windows, n_qubits = self.features.windows, self.ansatz.n_qubits
        if self.n_circuits < 1:
            raise ValueError("there is at least 1 circuit")
        if windows is not None and not windows.fit(n_qubits):
            raise ValueError(f"{windows} do not fit {n_qubits} qubits")
        self._verify_features()
        self._verify_groups()
        expected = account_of(self.features, self.ansatz, self.groups, self.parametrized, self.kept)
        if self.account != expected:
            raise ValueError(f"the account {self.account} is not {expected}")
        return self

    def _verify_features(self) -> None:
        registers, n_control = self.features.registers, self.features.n_control
        if registers and (min(registers) < 1 or sum(registers) != self.ansatz.n_qubits):
            raise ValueError(f"registers of {registers} qubits do not make {self.ansatz.n_qubits}")
        if n_control < 0 or (self.features.has_circuits and n_control):
            raise ValueError(f"{self.features.kind} features do not train {n_control} numbers of a control")
        contexts = self.features.contexts
        if contexts is not None and (
            contexts.size < 1 or len(contexts.names) < 2 or len(set(contexts.names)) < len(contexts.names)
        ):
            raise ValueError("contexts have at least 1 number each, and at least 2 names, each once")

    def _verify_groups(self) -> None:
        if not self.groups and not self.parametrized:
            raise ValueError("a layout has at least one group or one parametrized tensor")
        if bool(self.groups) == (self.features.kind == NO_FEATURES):
            raise ValueError(f"{len(self.groups)} groups do not read {self.features.kind} features")
        places = [(tensor.path, g.axis == "spectrum") for g in self.groups for tensor in g.tensors]
        if len(set(places)) != len(places):
            raise ValueError("a tensor belongs to one group only")
        chunked = {path for path, _ in places}
        parametrized = {tensor.path for tensor in self.parametrized}
        if len(parametrized) != len(self.parametrized) or parametrized & chunked:
            raise ValueError("a tensor is parametrized once, and in no group")
        kept = {tensor.path for tensor in self.kept}
        if len(kept) != len(self.kept) or kept & (chunked | parametrized):
            raise ValueError("a tensor is kept once, in no group and not parametrized")
        states, n_qubits = self.states, self.ansatz.n_qubits
        if len(set(states)) != len(states) or not all(0 <= s < 2**n_qubits for s in states):
            raise ValueError(f"{len(states)} chunks need as many of the 2**{n_qubits} basis states")
        self._verify_ranks()
        for group in self.groups:
            if group.decoder.widths[0] != self.n_features:
                raise ValueError(f"{group.name}: the decoder must take {self.n_features} features")

    def _verify_ranks(self) -> None:
        """Check that what fills a lora_B, and with it what fills its lora_A, fits its rank."""
        used: dict[str, int] = {}
        for group in (group for group in self.groups if group.axis in ("column", "spectrum")):
            n_columns = group.chunk_size if group.axis == "spectrum" else 1
            for tensor in group.tensors:
                used[tensor.path] = used.get(tensor.path, 0) + n_columns * len(tensor.chunks)
                if used[tensor.path] > tensor.shape[1]:
                    raise ValueError(f"{tensor.path}: {used[tensor.path]} columns do not fit its rank")


def account_of(
    features: Features,
    ansatz: Ansatz,
    groups: Sequence[ChunkGroup],
    parametrized: Sequence[ParametrizedTensor],
    kept: Sequence[TensorShape],
) -> ParameterAccount:
    """Return the account of a generator with these features, groups and parametrized tensors."""
    sizes = {tensor.path: tensor.n_numbers for group in groups for tensor in group.tensors}
    sizes |= {tensor.path: tensor.n_numbers for tensor in (*parametrized, *kept)}
    return ParameterAccount(
        n_angles=features.n_angles(ansatz) + sum(tensor.n_angles for tensor in parametrized),
        n_control=features.n_control,
        n_program=features.n_program(ansatz),
        n_decoder=sum(group.decoder.n_parameters for group in groups),
        n_own=sum(tensor.n_own for tensor in parametrized),
        n_adapter=sum(sizes.values()),
    )
