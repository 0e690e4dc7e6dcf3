"""WeightLayout: which numbers form which chunk, how many circuits, which decoders, and what it costs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.account import ParameterAccount
from qpa.documents.base import Document, JsonObject, Record
from qpa.documents.tensors import TensorShape

MAX_QUBITS = 24

GeneratorKind = Literal["spectral", "aligned", "paper"]
FeatureKind = Literal["circuit", "classical", "random", "bits"]
ChunkAxis = Literal["row", "column", "spectrum", "flat"]


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
    lora_B; for "spectrum", one
    factor for each of chunk_size fixed rank-1 matrices u v^T, whose v are rows of lora_A after the
    generated ones, and whose u, times their factors, are columns of lora_B; for "flat", numbers
    i * chunk_size and following of the tensors raveled in C order and laid end to end, the last chunk
    padded.

    Args:    name: "q_proj.lora_A", or "all" for the flat layout.
             tensors: where the axis is "spectrum", lora_A and lora_B of each module in turn.
             states: the basis state of the circuits that gives each chunk its features.
             decoder_widths: layer widths from n_features to chunk_size.
             decoder_bias: every layer of the decoder has a bias.
    """

    name: str
    axis: ChunkAxis
    tensors: tuple[ChunkedTensor, ...]
    states: tuple[int, ...]
    chunk_size: int
    decoder_widths: tuple[int, ...]
    decoder_bias: bool

    @property
    def n_chunks(self) -> int:
        """Return the number of chunks."""
        return len(self.states)

    @property
    def n_decoder_parameters(self) -> int:
        """Return the decoder's parameter count."""
        pairs = zip(self.decoder_widths, self.decoder_widths[1:], strict=False)
        return sum((n_in + self.decoder_bias) * n_out for n_in, n_out in pairs)

    @model_validator(mode="after")
    def _verify(self) -> Self:
        if self.chunk_size < 1 or not self.states:
            raise ValueError(f"{self.name}: a group has at least one chunk of at least one number")
        if len(self.decoder_widths) < 2 or self.decoder_widths[-1] != self.chunk_size:
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
    """Circuit k starts spread evenly over the basis states whose first n_head_qubits bits are k.

    Those are the chunks of a few neighbouring layers, the k-th window of them, in every group.

    Args:    n_head_qubits: qubits that number the windows.
             n_layer_qubits: qubits that number the chunks within one; the rest number the groups.
    """

    n_head_qubits: int
    n_layer_qubits: int

    def fit(self, n_qubits: int) -> bool:
        """Return whether circuits of a size have these qubits."""
        return min(self.n_head_qubits, self.n_layer_qubits) >= 0 and (
            self.n_head_qubits + self.n_layer_qubits <= n_qubits
        )


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


class WeightLayout(Document):
    """How a generator's outputs become the adapter.

    Invariants: every chunk has a basis state of its own; a tensor is in one group, or in one of axis
    "column" and one of axis "spectrum", which together fit its rank; decoders take n_features numbers;
    the account adds up.

    Args:    generator: "spectral" (ours: rank-1 vectors shared over windows of layers, and factors of the
             gradient's singular directions), "aligned" (ours: rank-1 vectors from random circuits) or
             "paper" (arXiv 2410.09846: flat chunks, one affine mapping model).
             features: "circuit", or a control of the same size: "classical" (a trained table in place
             of the circuits), "random" (the circuits' angles stay as drawn), "bits" (the bits of the
             basis state through one layer of tanh, no circuit).
             n_circuits: independent circuits ("heads"), each giving one feature per chunk.
             windows: where a spectral layout's circuits start; None: angles uniform in [-pi, pi).
             index_bits: the bits of the basis state are features too, most significant first.
    """

    kind: ClassVar[str] = "weight-layout"
    upgrades: ClassVar[tuple[Any, ...]] = (_upgrade_1,)

    generator: GeneratorKind
    features: FeatureKind
    n_circuits: int
    n_layers: int
    n_qubits: int
    windows: Windows | None
    index_bits: bool
    groups: tuple[ChunkGroup, ...]
    account: ParameterAccount

    @property
    def n_chunks(self) -> int:
        """Return the number of chunks of all groups."""
        return sum(group.n_chunks for group in self.groups)

    @property
    def n_features(self) -> int:
        """Return how many numbers a decoder sees per chunk."""
        return self.n_circuits + (self.n_qubits if self.index_bits else 0)

    @property
    def tensors(self) -> tuple[TensorShape, ...]:
        """Return all tensors, in the order in which the generator emits them."""
        shapes = {tensor.path: tensor.shape for group in self.groups for tensor in group.tensors}
        return tuple(TensorShape(path=path, shape=shape) for path, shape in shapes.items())

    @model_validator(mode="after")
    def _verify(self) -> Self:
        # First of all, as powers of two follow from these.
        if min(self.n_circuits, self.n_layers) < 1 or not 1 <= self.n_qubits <= MAX_QUBITS:
            raise ValueError(f"circuits and layers must be at least 1, qubits within 1 and {MAX_QUBITS}")
        if self.windows is not None and not self.windows.fit(self.n_qubits):
            raise ValueError(f"{self.windows} do not fit {self.n_qubits} qubits")
        self._verify_groups()
        expected = ParameterAccount(
            n_angles=n_feature_parameters(
                self.features, self.n_circuits, self.n_layers, self.n_qubits, self.windows
            ),
            n_decoder=sum(group.n_decoder_parameters for group in self.groups),
            n_adapter=sum(tensor.n_numbers for tensor in self.tensors),
        )
        if self.account != expected:
            raise ValueError(f"the account {self.account} is not {expected}")
        return self

    def _verify_groups(self) -> None:
        if not self.groups:
            raise ValueError("a layout has at least one group")
        places = [(tensor.path, g.axis == "spectrum") for g in self.groups for tensor in g.tensors]
        if len(set(places)) != len(places):
            raise ValueError("a tensor belongs to one group only")
        states = [state for group in self.groups for state in group.states]
        if len(set(states)) != len(states) or not all(0 <= s < 2**self.n_qubits for s in states):
            raise ValueError(f"{len(states)} chunks need as many of the 2**{self.n_qubits} basis states")
        self._verify_ranks()
        for group in self.groups:
            if group.decoder_widths[0] != self.n_features:
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


def n_feature_parameters(
    features: FeatureKind, n_circuits: int, n_layers: int, n_qubits: int, windows: Windows | None
) -> int:
    """Return how many numbers a kind of features trains."""
    if features == "classical":
        n_table = n_qubits if windows is None else windows.n_head_qubits + windows.n_layer_qubits
        return n_circuits << n_table
    return {
        "circuit": n_circuits * n_layers * n_qubits,
        "random": 0,
        "bits": n_circuits * (n_qubits + 1),
    }[features]
