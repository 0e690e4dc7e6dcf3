"""What a user may ask of a layout: the options of plan-layout, as the generators see them."""

from __future__ import annotations

from dataclasses import dataclass

ALL = "all"
NONE = "none"


@dataclass(frozen=True, slots=True)
class LayoutOptions:
    """The options of a layout; a generator refuses those that it does not have.

    Args:    generator: a name in `qpa.generators.generator.GENERATORS`; None means what suits the adapter.
             features: "circuit", or a control in its place: "classical", "random" or "bits".
             ansatz: a name in `qpa.circuits.ansatz.ANSATZE`.
             chunk_size: numbers per chunk of the paper's flat layout; None means 2048.
             qubits: None means as many as the chunks need.
             layers: of every circuit; None means what suits the generator.
             circuits: independent circuits; None means what suits the generator and the adapter.
             vectors: module types that have generated rows and columns beside their spectrum; or "all",
             "none". max_params: "5000", or "25%" of LoRA r=4: the size follows from it.
             spectrum, windows, share_inputs: parts of the default generator, to be left out in ablations.
    """

    generator: str | None = None
    features: str = "circuit"
    ansatz: str = "ry-cnot-chain"
    chunk_size: int | None = None
    qubits: int | None = None
    layers: int | None = None
    circuits: int | None = None
    vectors: tuple[str, ...] = (ALL,)
    max_params: str | None = None
    spectrum: bool = True
    windows: bool = True
    share_inputs: bool = True
