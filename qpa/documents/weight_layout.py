"""WeightLayout: which numbers form which chunk, how many circuits, which decoders, and what it costs."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qpa.documents.base import Document, Record

MAX_QUBITS = 24

ChunkAxis = Literal["row", "column", "flat"]


class ChunkedTensor(Record):
    """An adapter tensor as the layout sees it: its path in the AdapterSpec and its shape."""

    path: str
    shape: tuple[int, int]

    @property
    def n_numbers(self) -> int:
        """Return how many numbers the tensor has."""
        return self.shape[0] * self.shape[1]


class ChunkGroup(Record):
    """Chunks that share one decoder.

    Chunk `first_chunk + i` is, for axis "row", row i of the tensors stacked on top of each other; for
    "column", column i of the tensors laid side by side; for "flat", numbers i * chunk_size and
    following of the tensors raveled in C order and laid end to end, the last chunk padded.

    Args:    name: "q_proj.lora_A", or "all" for the flat layout.
             tensors: in the order in which their chunks are numbered.
             decoder_widths: layer widths from n_features to chunk_size.
             decoder_bias: every layer of the decoder has a bias.
    """

    name: str
    axis: ChunkAxis
    tensors: tuple[ChunkedTensor, ...]
    first_chunk: int
    n_chunks: int
    chunk_size: int
    decoder_widths: tuple[int, ...]
    decoder_bias: bool

    @property
    def n_decoder_parameters(self) -> int:
        """Return the decoder's parameter count."""
        pairs = zip(self.decoder_widths, self.decoder_widths[1:], strict=False)
        return sum((n_in + self.decoder_bias) * n_out for n_in, n_out in pairs)

    def chunks_of(self, tensor: ChunkedTensor) -> int:
        """Return how many chunks one tensor of an aligned group has."""
        return tensor.shape[0] if self.axis == "row" else tensor.shape[1]

    @model_validator(mode="after")
    def _verify(self) -> Self:
        n_numbers = sum(tensor.n_numbers for tensor in self.tensors)
        if self.chunk_size < 1 or self.n_chunks != -(-n_numbers // self.chunk_size):
            raise ValueError(
                f"{self.name}: {self.n_chunks} chunks of {self.chunk_size} do not cover {n_numbers}"
            )
        if self.axis != "flat":
            vector = {tensor.shape[1] if self.axis == "row" else tensor.shape[0] for tensor in self.tensors}
            if vector != {self.chunk_size}:
                raise ValueError(f"{self.name}: a chunk is one {self.axis}, so its size must be {vector}")
        if len(self.decoder_widths) < 2 or self.decoder_widths[-1] != self.chunk_size:
            raise ValueError(f"{self.name}: the decoder must end in chunk_size numbers")
        return self


class ParameterAccount(Record):
    """Trainable numbers of the generator against those of the adapter it generates.

    Args:    n_angles: circuit angles, n_circuits * n_layers * n_qubits.
             n_decoder: decoder weights and biases of all groups.
             n_adapter: m, the trainable numbers of the same adapter without a generator.
    """

    n_angles: int
    n_decoder: int
    n_adapter: int

    @property
    def n_generator(self) -> int:
        """Return all trainable numbers of the generator."""
        return self.n_angles + self.n_decoder

    @property
    def percent(self) -> float:
        """Return the generator's size in percent of the adapter's."""
        return 100.0 * self.n_generator / self.n_adapter


class WeightLayout(Document):
    """How a generator's outputs become the adapter.

    Invariants: groups number their chunks without gap; no tensor occurs twice; 2**n_qubits basis
    states are enough for all chunks; decoders take n_features numbers; the account adds up.

    Args:    generator: "aligned" (ours: a chunk is a rank-1 vector, linear decoders per module type
             and role) or "paper" (arXiv 2410.09846: flat chunks, one affine mapping model).
             n_circuits: independent circuits ("heads"), each giving one feature per chunk.
             index_bits: the bits of the chunk index are features too, most significant first.
    """

    kind: ClassVar[str] = "weight-layout"

    generator: Literal["aligned", "paper"]
    n_circuits: int
    n_layers: int
    n_qubits: int
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
    def tensors(self) -> tuple[ChunkedTensor, ...]:
        """Return all tensors, in the order in which the generator emits them."""
        return tuple(tensor for group in self.groups for tensor in group.tensors)

    @model_validator(mode="after")
    def _verify(self) -> Self:
        self._verify_groups()
        if min(self.n_circuits, self.n_layers) < 1 or not 1 <= self.n_qubits <= MAX_QUBITS:
            raise ValueError(f"circuits and layers must be at least 1, qubits within 1 and {MAX_QUBITS}")
        if self.n_chunks > 2**self.n_qubits:
            raise ValueError(f"{self.n_chunks} chunks do not fit 2**{self.n_qubits} basis states")
        expected = ParameterAccount(
            n_angles=self.n_circuits * self.n_layers * self.n_qubits,
            n_decoder=sum(group.n_decoder_parameters for group in self.groups),
            n_adapter=sum(tensor.n_numbers for tensor in self.tensors),
        )
        if self.account != expected:
            raise ValueError(f"the account {self.account} is not {expected}")
        return self

    def _verify_groups(self) -> None:
        if not self.groups:
            raise ValueError("a layout has at least one group")
        paths = [tensor.path for tensor in self.tensors]
        if len(set(paths)) != len(paths):
            raise ValueError("a tensor belongs to one group only")
        first_chunk = 0
        for group in self.groups:
            if group.first_chunk != first_chunk:
                raise ValueError(f"{group.name}: first_chunk must be {first_chunk}")
            if group.decoder_widths[0] != self.n_features:
                raise ValueError(f"{group.name}: the decoder must take {self.n_features} features")
            first_chunk += group.n_chunks
