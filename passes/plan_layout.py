"""plan-layout: from the tensors of an adapter to chunks, circuits and decoders.

Rules:
1. "aligned": a chunk is one rank-1 vector, a row of lora_A or a column of lora_B. Chunks of the same
   module type, role and length form a group and share one decoder, a linear map without bias from the
   circuits' features to the vector. All groups share the circuits; chunks are numbered through.
2. "paper": the tensors end to end, cut into chunks of `chunk_size`; one circuit; features are the bits
   of the chunk index and the circuit's feature; one affine mapping model with the widths of the paper.
3. n_qubits is the smallest number whose basis states are enough, unless more are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from qpa.documents import (
    MAX_QUBITS,
    AdapterSpec,
    ChunkedTensor,
    ChunkGroup,
    Document,
    ParameterAccount,
    WeightLayout,
)
from qpa.errors import OptionError
from qpa.pipeline import PassContext

PAPER_WIDTHS = (32, 64, 128, 128, 64, 32, 32)
"""Hidden widths of the paper's mapping model (arXiv 2410.09846, public code)."""

GENERATORS = ("aligned", "paper")


@final
@dataclass(frozen=True, slots=True)
class PlanLayout:
    """Decide how a generator's outputs become the adapter.

    Args:    generator: "aligned" or "paper".
             chunk_size: numbers per chunk of the paper's flat layout; None means 2048.
             qubits: None means as many as the chunks need.
             layers: of every circuit; None means 8.
             heads: independent circuits; None means 8 for "aligned" and 1 for "paper".
    Source:  arXiv 2410.09846, section 3.2 ("paper"); ours ("aligned").
    """

    name: ClassVar[str] = "plan-layout"
    consumes: ClassVar[type] = AdapterSpec
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = WeightLayout

    generator: str = "aligned"
    chunk_size: int | None = None
    qubits: int | None = None
    layers: int | None = None
    heads: int | None = None

    def run(self, source: AdapterSpec, context: PassContext) -> WeightLayout:
        """Plan the layout and account for its parameters.

        Raises:  OptionError: an option is out of range or contradicts the generator.
        """
        self._check_options()
        is_paper = self.generator == "paper"
        n_circuits = self.heads or (1 if is_paper else 8)
        n_layers = self.layers or 8
        drafts = [_flat_draft(source, self.chunk_size or 2048)] if is_paper else _aligned_drafts(source)
        n_chunks = sum(draft.n_chunks for draft in drafts)
        n_qubits = self._qubits_for(n_chunks)
        n_features = n_circuits + (n_qubits if is_paper else 0)
        groups = _number_chunks(drafts, n_features, PAPER_WIDTHS if is_paper else ())
        return WeightLayout(
            provenance=context.provenance(self, source),
            generator="paper" if is_paper else "aligned",
            n_circuits=n_circuits,
            n_layers=n_layers,
            n_qubits=n_qubits,
            index_bits=is_paper,
            groups=groups,
            account=ParameterAccount(
                n_angles=n_circuits * n_layers * n_qubits,
                n_decoder=sum(group.n_decoder_parameters for group in groups),
                n_adapter=source.n_numbers,
            ),
        )

    def _check_options(self) -> None:
        if self.generator not in GENERATORS:
            raise OptionError("--generator", " or ".join(GENERATORS), self.generator)
        named = {
            "chunk-size": self.chunk_size,
            "layers": self.layers,
            "heads": self.heads,
            "qubits": self.qubits,
        }
        for option, value in named.items():
            if value is not None and value < 1:
                raise OptionError(f"--{option}", "a whole number of at least 1", str(value))
        if self.chunk_size is not None and self.generator == "aligned":
            raise OptionError(
                "--chunk-size",
                "no chunk size with --generator aligned, whose chunks are rows of A and columns of B",
                str(self.chunk_size),
                "leave it out or use --generator paper",
            )

    def _qubits_for(self, n_chunks: int) -> int:
        needed = max(1, (n_chunks - 1).bit_length())
        if self.qubits is not None and self.qubits < needed:
            raise OptionError("--qubits", f"at least {needed} for {n_chunks} chunks", str(self.qubits))
        chosen = self.qubits or needed
        if chosen > MAX_QUBITS:
            advice = (
                "simulation needs memory for 2**qubits states" if self.qubits else "use a larger --chunk-size"
            )
            raise OptionError("--qubits", f"at most {MAX_QUBITS}", str(chosen), advice)
        return chosen


def _aligned_drafts(spec: AdapterSpec) -> list[ChunkGroup]:
    members: dict[tuple[str, str, int], list[ChunkedTensor]] = {}
    for tensor in spec.tensors:
        length = tensor.shape[1] if tensor.role == "lora_A" else tensor.shape[0]
        chunked = ChunkedTensor(path=tensor.path, shape=tensor.shape)
        members.setdefault((tensor.module_type, tensor.role, length), []).append(chunked)
    lengths: dict[tuple[str, str], set[int]] = {}
    for module_type, role, length in members:
        lengths.setdefault((module_type, role), set()).add(length)
    drafts = []
    for (module_type, role, length), tensors in members.items():
        suffix = f".{length}" if len(lengths[module_type, role]) > 1 else ""
        drafts.append(
            _draft(f"{module_type}.{role}{suffix}", "row" if role == "lora_A" else "column", tensors, length)
        )
    return drafts


def _flat_draft(spec: AdapterSpec, chunk_size: int) -> ChunkGroup:
    tensors = [ChunkedTensor(path=tensor.path, shape=tensor.shape) for tensor in spec.tensors]
    return _draft("all", "flat", tensors, min(chunk_size, spec.n_numbers))


def _draft(name: str, axis: str, tensors: list[ChunkedTensor], chunk_size: int) -> ChunkGroup:
    """Return a group whose place among the chunks and whose features are not decided yet."""
    n_numbers = sum(tensor.n_numbers for tensor in tensors)
    return ChunkGroup(
        name=name,
        axis=axis,  # type: ignore[arg-type]
        tensors=tuple(tensors),
        first_chunk=0,
        n_chunks=-(-n_numbers // chunk_size),
        chunk_size=chunk_size,
        decoder_widths=(1, chunk_size),
        decoder_bias=axis == "flat",
    )


def _number_chunks(
    drafts: list[ChunkGroup], n_features: int, hidden: tuple[int, ...]
) -> tuple[ChunkGroup, ...]:
    groups, first_chunk = [], 0
    for draft in drafts:
        widths = (n_features, *hidden, draft.chunk_size)
        groups.append(draft.model_copy(update={"first_chunk": first_chunk, "decoder_widths": widths}))
        first_chunk += draft.n_chunks
    return tuple(groups)
