"""plan-layout: from the tensors of an adapter to chunks, circuits and decoders.

Rules:
1. LoRA and DoRA get the generator for products of two factors unless another is asked for, all other adapters
   the one for single vectors; what each lays out is in its own file in `qpa.generators`.
2. n_qubits is the smallest number whose basis states are enough, unless more are asked for.
3. With `max_params` the size follows from it (`qpa.generators.size_search`), and the layout keeps the chosen
   size and its neighbours. Not with `contexts`, whose sizes were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from qpa.documents import AdapterSpec, Document, WeightLayout
from qpa.errors import OptionError
from qpa.generators.generator import kind_for, layout_of, refuse_own_options
from qpa.generators.layout_options import LayoutOptions
from qpa.generators.size_search import choose_size, parse_max_params, size_table, sizes_around
from qpa.pipeline.options import check_options
from qpa.pipeline.pass_protocol import PassContext


@final
@dataclass(frozen=True, slots=True)
class PlanLayout(LayoutOptions):
    """Decide how a generator's outputs become the adapter; the options are those of `LayoutOptions`.

    Source:  arXiv 2410.09846, section 3.2, and ours.
    """

    name: ClassVar[str] = "plan-layout"
    consumes: ClassVar[type] = AdapterSpec
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = WeightLayout
    section: ClassVar[str] = "plan"

    def run(self, source: AdapterSpec, context: PassContext) -> WeightLayout:
        """Plan the layout and account for its parameters.

        Raises:  OptionError: an option is out of range or contradicts the generator.
        """
        check_options(self)
        provenance = context.provenance(self, source)
        kind = kind_for(self, source)
        refuse_own_options(self, kind, source)
        kind.check(self, source)
        if self.max_params is None:
            return layout_of(self, source, provenance)
        if self.contexts is not None:
            found, advice = str(self.max_params), "choose `layers` or `circuits`"
            raise OptionError("max_params", "no budget with `contexts`", found, advice)
        kind.sizes(self, source)  # refuses a budget of a kind that has none, before it is read
        budget = parse_max_params(self.max_params, source)
        sizes = sizes_around(self, source, budget)
        chosen = choose_size(sizes, budget)
        layout = layout_of(chosen.options, source, provenance)
        return layout.model_copy(update={"budget": budget, "sizes": size_table(sizes, chosen, source)})
