"""paper: the adapter laid end to end, cut into chunks, and one affine mapping model.

Rules:
1. The tensors lie end to end and are cut into chunks of `chunk_size`.
2. There is one circuit; a chunk's features are the bits of its index and the circuit's feature.
3. One affine mapping model decodes them, with the widths of the paper.

Source: Quantum Parameter Adaptation, Liu, Yang, Goan, Hsieh, ICLR 2025, arXiv 2410.09846, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from qpa.circuits.ansatz import make_ansatz
from qpa.documents import AdapterSpec, Provenance, WeightLayout
from qpa.generators.chunks import Draft, chunked, make_layout, n_qubits_for
from qpa.generators.generator import GeneratorKind, L, refuse_budget
from qpa.generators.layout_options import LayoutOptions

WIDTHS = (32, 64, 128, 128, 64, 32, 32)
"""Hidden widths of the paper's mapping model (arXiv 2410.09846, public code)."""

N_CIRCUITS = 1
N_LAYERS = 8
CHUNK_SIZE = 2048
RATE = 1e-3


@final
class PaperKind(GeneratorKind):
    """The generator of the paper."""

    name: ClassVar[str] = "paper"
    words: ClassVar[str] = "flat chunks and one mapping model, arXiv 2410.09846"
    defaults: ClassVar[Mapping[str, str]] = {
        "layers": str(N_LAYERS),
        "circuits": str(N_CIRCUITS),
        "chunk_size": str(CHUNK_SIZE),
        "lr": str(RATE),
    }

    def check(self, options: LayoutOptions, spec: AdapterSpec) -> None:
        """Refuse nothing: every option has its meaning here."""

    def plan(self, options: LayoutOptions, spec: AdapterSpec, provenance: Provenance) -> WeightLayout:
        """Return the layout: one group of all tensors."""
        draft = _draft(spec, options.chunk_size or CHUNK_SIZE)
        n_qubits = n_qubits_for(options, draft.n_chunks)
        n_circuits = options.circuits or N_CIRCUITS
        group = draft.group(range(draft.n_chunks), n_circuits + n_qubits, WIDTHS)
        ansatz = make_ansatz(options.ansatz, n_qubits, options.layers or N_LAYERS)
        return make_layout(
            self.name, options, spec, provenance, (group,), ansatz, n_circuits, has_index_bits=True
        )

    def sizes(self, options: L, spec: AdapterSpec) -> Sequence[L]:
        """Refuse a budget."""
        raise refuse_budget(options)

    def size_words(self, options: LayoutOptions) -> str:
        """Return "chunk size 2048"."""
        return f"chunk size {options.chunk_size or CHUNK_SIZE}"

    def rate(self, spec: AdapterSpec) -> float:
        """Return the rate the bench found best."""
        return RATE


PAPER = PaperKind()


def _draft(spec: AdapterSpec, chunk_size: int) -> Draft:
    size = min(chunk_size, spec.n_numbers)
    tensors = tuple(chunked(tensor, ()) for tensor in spec.tensors)
    return Draft("all", "flat", tensors, -(-spec.n_numbers // size), size)
