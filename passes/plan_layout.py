"""plan-layout: from the tensors of an adapter to chunks, circuits and decoders.

Rules:
1. "spectral": a chunk is a rank-1 vector, a row of lora_A or a column of lora_B, or the factors of some of
   the gradient's singular directions (a "spectrum"), which take what the vectors leave of the rank.
   Chunks of one kind and length form a group over all layers and share one decoder, a linear map without
   bias; modules that read the same activations share the rows of their lora_A. Circuit k starts on the
   k-th window of neighbouring layers, so with a circuit a layer the vectors are those of LoRA, rank 1.
   DoRA's magnitudes are one such vector a module.
2. "aligned": a chunk is one rank-1 vector, or one vector of another adapter, such as a token's keys. Chunks
   of the same module type, role and length form a group and share one linear decoder. All groups share the
   circuits, whose angles start at random.
3. "paper": the tensors end to end, cut into chunks of `chunk_size`; one circuit; features are the bits
   of the chunk index and the circuit's feature; one affine mapping model with the widths of the paper.
4. n_qubits is the smallest number whose basis states are enough, unless more are asked for.
5. LoRA and DoRA are "spectral" unless another generator is asked for; the other adapters, which have no
   products of two factors, "aligned".
6. With `max_params`, heads and vectors of the spectral layout follow from it (`qpa.generators.size_search`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast, final, get_args

from qpa.documents import (
    MAX_QUBITS,
    AdapterSpec,
    Document,
    FeatureKind,
    ParameterAccount,
    Provenance,
    WeightLayout,
    Windows,
    n_feature_parameters,
)
from qpa.documents.weight_layout import ChunkGroup, GeneratorKind
from qpa.errors import OptionError, one_of
from qpa.generators.layout_groups import (
    Draft,
    aligned_drafts,
    flat_draft,
    spectral_drafts,
    window_states,
    windows_of,
)
from qpa.generators.size_search import choose_size, parse_max_params
from qpa.pipeline.pass_protocol import PassContext

PAPER_WIDTHS = (32, 64, 128, 128, 64, 32, 32)
"""Hidden widths of the paper's mapping model (arXiv 2410.09846, public code)."""

GENERATORS = get_args(GeneratorKind)
FEATURES = get_args(FeatureKind)
ALL = "all"
NONE = "none"

_HEADS = {"aligned": 8, "paper": 1}
_LAYERS = {"spectral": 1, "aligned": 8, "paper": 8}


@final
@dataclass(frozen=True, slots=True)
class PlanLayout:
    """Decide how a generator's outputs become the adapter.

    Args:    generator: "spectral", "aligned" or "paper"; None means what suits the adapter.
             features: "circuit", or a control in its place: "classical", "random" or "bits".
             chunk_size: numbers per chunk of the paper's flat layout; None means 2048.
             qubits: None means as many as the chunks need.
             layers: of every circuit; None means 1 for "spectral" and 8 for the others.
             heads: independent circuits; None means one a layer for "spectral", 8 for "aligned" or half as
             many as the fewest chunks of a group where that is less, 1 for "paper".
             vectors: module types of the spectral layout that have generated rows and columns; "all" or
             "none".
             max_params: "5000", or "25%" of LoRA r=4: the spectral layout's heads and vectors follow from it.
             spectrum, windows, share_inputs: parts of the spectral layout, to be left out in ablations.
    Source:  arXiv 2410.09846, section 3.2 ("paper"); ours (the others).
    """

    name: ClassVar[str] = "plan-layout"
    consumes: ClassVar[type] = AdapterSpec
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = WeightLayout

    generator: str | None = None
    features: str = "circuit"
    chunk_size: int | None = None
    qubits: int | None = None
    layers: int | None = None
    heads: int | None = None
    vectors: tuple[str, ...] = (ALL,)
    max_params: str | None = None
    spectrum: bool = True
    windows: bool = True
    share_inputs: bool = True

    def run(self, source: AdapterSpec, context: PassContext) -> WeightLayout:
        """Plan the layout and account for its parameters.

        Raises:  OptionError: an option is out of range or contradicts the generator.
        """
        plan = self._for(source)
        plan._check_options(source)
        if plan.max_params is not None:
            plan = choose_size(plan, source, parse_max_params(plan.max_params, source)).plan
        return plan.layout(source, context.provenance(self, source))

    def layout(self, source: AdapterSpec, provenance: Provenance) -> WeightLayout:
        """Return the layout of these options, checked already."""
        return self._for(source)._layout(source, provenance)

    def _for(self, source: AdapterSpec) -> PlanLayout:
        """Return the plan with the generator that suits the adapter, where none is asked for."""
        return replace(self, generator=self.generator or ("spectral" if source.pairs else "aligned"))

    def _layout(self, source: AdapterSpec, provenance: Provenance) -> WeightLayout:
        assert self.generator is not None
        n_circuits = self.heads or self._default_heads(source)
        n_layers = self.layers or _LAYERS[self.generator]
        windows, groups, n_qubits = self._groups(source, n_circuits)
        features = cast(FeatureKind, self.features)
        return WeightLayout(
            provenance=provenance,
            generator=cast(GeneratorKind, self.generator),
            features=features,
            n_circuits=n_circuits,
            n_layers=n_layers,
            n_qubits=n_qubits,
            windows=windows,
            index_bits=self.generator == "paper",
            groups=groups,
            account=ParameterAccount(
                n_angles=n_feature_parameters(features, n_circuits, n_layers, n_qubits, windows),
                n_decoder=sum(group.n_decoder_parameters for group in groups),
                n_adapter=source.n_numbers,
            ),
        )

    def _default_heads(self, source: AdapterSpec) -> int:
        """Return a circuit a layer for "spectral"; for "aligned" at most half the chunks of a decoder."""
        if self.generator != "aligned":
            return _HEADS.get(str(self.generator), source.n_layers)
        n_chunks = min(draft.n_chunks for draft in self._aligned_drafts(source))
        return min(_HEADS["aligned"], max(1, n_chunks // 2))

    def _groups(
        self, source: AdapterSpec, n_circuits: int
    ) -> tuple[Windows | None, tuple[ChunkGroup, ...], int]:
        """Return the windows, the groups, and the number of qubits."""
        if self.generator == "spectral":
            return self._spectral_groups(source, n_circuits)
        if self.generator == "paper":
            draft = flat_draft(source, self.chunk_size or 2048)
            n_qubits = self._qubits_for(draft.n_chunks)
            group = draft.group(range(draft.n_chunks), n_circuits + n_qubits, PAPER_WIDTHS)
            return None, (group,), n_qubits
        drafts = self._aligned_drafts(source)
        groups, first = [], 0
        for draft in drafts:
            groups.append(draft.group(range(first, first + draft.n_chunks), n_circuits))
            first += draft.n_chunks
        return None, tuple(groups), self._qubits_for(first)

    def _aligned_drafts(self, source: AdapterSpec) -> list[Draft]:
        n_vectors = sum(tensor.n_vectors for tensor in source.tensors)
        if n_vectors > 2**MAX_QUBITS:  # before a chunk is made of each
            expected = f"at most 2**{MAX_QUBITS} vectors, as many as there are basis states"
            raise OptionError("--rank", expected, f"{n_vectors:,}", "lower it")
        return aligned_drafts(source)

    def _spectral_groups(
        self, source: AdapterSpec, n_circuits: int
    ) -> tuple[Windows | None, tuple[ChunkGroup, ...], int]:
        drafts = self._spectral_drafts(source, n_circuits)
        windows = windows_of(drafts, n_circuits)
        n_window_qubits = windows.n_head_qubits + windows.n_layer_qubits
        n_qubits = self._qubits_for(len(drafts) * 2**n_window_qubits)
        n_group_qubits = n_qubits - n_window_qubits
        groups = tuple(
            draft.group(window_states(draft, n_circuits, windows, index, n_group_qubits), n_circuits)
            for index, draft in enumerate(drafts)
        )
        return (windows if self.windows else None), groups, n_qubits

    def _spectral_drafts(self, source: AdapterSpec, n_circuits: int) -> list[Draft]:
        n_rows = -(-n_circuits // source.n_layers)
        largest = source.rank - self.spectrum
        if not largest:
            advice = "or use --generator aligned"
            raise OptionError("--rank", "at least 2, for a vector and a spectrum", str(source.rank), advice)
        if n_rows > largest:
            expected = f"at most {largest * source.n_layers}, {largest} a layer with rank {source.rank}"
            raise OptionError("--heads", expected, str(n_circuits), "lower it or raise --rank")
        types = {tensor.module_type for tensor in source.tensors}
        chosen = types if ALL in self.vectors else set(self.vectors) - {NONE}
        if chosen - types:
            unknown = ", ".join(sorted(chosen - types))
            raise OptionError("--vectors", "all, none, or some of " + ", ".join(sorted(types)), unknown)
        n_left = source.rank - (n_rows if chosen else 0)
        size = n_left // n_rows * n_rows if self.spectrum else 0
        if chosen != types and not size:
            advice = "name all layers, lower --heads or raise --rank"
            raise OptionError("--vectors", "vectors or a spectrum on every layer", "neither on some", advice)
        return spectral_drafts(source, n_rows, size, tuple(chosen), share_inputs=self.share_inputs)

    def _check_options(self, source: AdapterSpec) -> None:
        for option, value, known in (
            ("--generator", self.generator, GENERATORS),
            ("--features", self.features, FEATURES),
        ):
            if value not in known:
                raise OptionError(option, one_of(known), str(value))
        if self.generator == "spectral" and not source.pairs:
            expected = f"aligned or paper with --method {source.method}, which is no product of factors"
            raise OptionError("--generator", expected, "spectral")
        named = {
            "chunk-size": self.chunk_size,
            "layers": self.layers,
            "heads": self.heads,
            "qubits": self.qubits,
        }
        for option, number in named.items():
            if number is not None and number < 1:
                raise OptionError(f"--{option}", "a whole number of at least 1", str(number))
        sized = self.heads is not None or self.vectors != (ALL,)
        if self.max_params is not None and (sized or self.generator != "spectral"):
            expected = "neither --heads, --vectors nor another generator, whose size it would choose"
            raise OptionError("--max-params", expected, self.max_params, "leave one out")
        if self.chunk_size is not None and self.generator != "paper":
            raise OptionError(
                "--chunk-size",
                f"no chunk size with --generator {self.generator}, whose chunks are rows and columns",
                str(self.chunk_size),
                "leave it out or use --generator paper",
            )

    def _qubits_for(self, n_states: int) -> int:
        needed = max(1, (n_states - 1).bit_length())
        if self.qubits is not None and self.qubits < needed:
            raise OptionError("--qubits", f"at least {needed} for {n_states} chunks", str(self.qubits))
        chosen = self.qubits or needed
        if chosen > MAX_QUBITS:
            advice = (
                "simulation needs memory for 2**qubits states" if self.qubits else "use a larger --chunk-size"
            )
            raise OptionError("--qubits", f"at most {MAX_QUBITS}", str(chosen), advice)
        return chosen
