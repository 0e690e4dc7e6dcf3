from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import ClassVar

import pytest

from qpa import __version__
from qpa.documents import (
    AdapterSpec,
    LogicalCircuit,
    Measurement,
    NativeCircuit,
    TrainedGenerator,
    WeightLayout,
)
from qpa.documents.base import PassOption
from qpa.errors import DocumentError, PipelineError
from qpa.passes.freeze_adapter import FreezeAdapter
from qpa.passes.inspect_model import InspectModel
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.synthesize_circuit import SynthesizeCircuit
from qpa.passes.train_generator import TrainGenerator
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.pipeline.options import option
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.pipeline import Pipeline, verify
from qpa.seeds import split_seed
from qpa.store.run_directory import DirectoryStore

GOLDEN = Path(__file__).parent / "golden"
SPEC = AdapterSpec.from_json((GOLDEN / "adapter-spec-1/llama.json").read_bytes(), "llama.json")
ALL = (
    InspectModel(model="models/tiny"),
    PlanLayout(),
    SynthesizeCircuit(),
    TranspileCircuit(),
    TrainGenerator(data="text.txt"),
    MeasureCircuit(),
    FreezeAdapter(),
)


@pytest.fixture
def context(tmp_path):
    return PassContext(seed=7, files=DirectoryStore(tmp_path))


@dataclass(frozen=True)
class ReadSpec:
    """A first pass that returns the golden spec, or whatever it is told to."""

    name: ClassVar[str] = "read-spec"
    consumes: ClassVar[type] = NoneType
    requires: ClassVar[tuple] = ()
    produces: ClassVar[type] = AdapterSpec

    result: object = SPEC

    def run(self, source, context):
        return self.result


@dataclass(frozen=True)
class Everything:
    """A pass with an option of every kind."""

    name: ClassVar[str] = "everything"
    requires: ClassVar[tuple] = ()

    whole: int = 3
    number: float = 0.5
    text: str = "words"
    switch: bool = False
    nothing: None = None
    names: tuple[str, ...] = ("q_proj", "k_proj")
    path: Path = Path("runs/bard")
    workers: int = option(2, help="Worker processes.", provenance=False)


# Composition


def test_all_passes_compose_in_their_order():
    assert Pipeline(*ALL).passes == ALL


def test_a_run_may_be_transpiled_before_or_after_it_is_trained():
    swapped = (*ALL[:3], ALL[4], ALL[3], *ALL[5:])
    assert [step.name for step in swapped[3:5]] == ["train-generator", "transpile-circuit"]
    assert Pipeline(*swapped).passes == swapped


@pytest.mark.parametrize("index", [1, 2, 3, 5, 6])
def test_a_pass_too_early_is_refused_when_composed(index):
    swapped = [*ALL]
    swapped[index - 1 : index + 1] = [ALL[index], ALL[index - 1]]
    before = ", ".join(step.name for step in swapped[: index - 1]) or "nothing"
    with pytest.raises(PipelineError, match=rf"^{ALL[index].name}: expected a .* \(after {before}\)"):
        Pipeline(*swapped)


@pytest.mark.parametrize("index", range(1, len(ALL)))
def test_a_pipeline_does_not_start_in_the_middle(index):
    with pytest.raises(PipelineError, match=r"made earlier, found none \(after nothing\)"):
        Pipeline(*ALL[index:])


def test_given_documents_are_what_a_later_half_starts_from():
    given = (AdapterSpec, WeightLayout, LogicalCircuit)
    assert Pipeline(*ALL[4:], given=given).passes == ALL[4:]


def test_a_required_document_must_be_made_earlier():
    with pytest.raises(PipelineError, match=r"^train-generator: expected a AdapterSpec made earlier"):
        Pipeline(*ALL[4:], given=(WeightLayout, LogicalCircuit))
    with pytest.raises(PipelineError, match=r"^freeze-adapter: expected a WeightLayout made earlier"):
        Pipeline(FreezeAdapter(), given=(AdapterSpec, TrainedGenerator, Measurement))


# Running


def test_documents_are_kept_in_order_and_handed_on(context):
    kept = []
    passes = (ReadSpec(), PlanLayout(layers=3, circuits=1), SynthesizeCircuit(), TranspileCircuit())
    after = Pipeline(*passes).run(None, context, kept.append)
    assert [type(document) for document in kept] == [AdapterSpec, WeightLayout, LogicalCircuit, NativeCircuit]
    assert after.documents == tuple(kept)
    assert [document.provenance.parent for document in kept[1:]] == [d.digest for d in kept[:-1]]
    assert context.documents == ()


@pytest.mark.parametrize("result", [None, 3, SPEC.provenance])
def test_a_pass_that_returns_another_type_is_refused(context, result):
    kept = []
    with pytest.raises(
        PipelineError, match=f"^read-spec: expected a AdapterSpec, found {type(result).__name__}"
    ):
        Pipeline(ReadSpec(result)).run(None, context, kept.append)
    assert kept == []


def test_a_pass_that_breaks_an_invariant_is_refused(context):
    broken = SPEC.model_copy(update={"rank": 3})
    with pytest.raises(DocumentError, match=r"adapter-spec made by read-spec: .* does not have rank 3"):
        Pipeline(ReadSpec(broken)).run(None, context)


def test_a_document_that_changes_when_it_is_written_is_refused():
    broken = SPEC.model_copy(update={"target_modules": ["q_proj", "down_proj"]})
    with (
        pytest.warns(UserWarning, match="serialized value may not be as expected"),
        pytest.raises(DocumentError, match="the same document after a round trip"),
    ):
        verify(broken, "a-pass")


def test_a_document_nobody_made_is_refused(context):
    with pytest.raises(PipelineError, match=r"^adapter-spec: expected a document made by an earlier pass"):
        context.document(AdapterSpec)


def test_the_newest_document_of_a_type_is_found(context):
    newer = SPEC.model_copy(update={"alpha": 32.0})
    layout = PlanLayout().run(SPEC, context)
    both = PassContext(seed=7, files=context.files, documents=(SPEC, newer, layout))
    assert both.document(AdapterSpec) == newer


# Provenance and seeds


def test_provenance_says_pass_options_seed_version_and_parent(context):
    provenance = context.provenance(Everything(), SPEC)
    assert provenance.options == (
        PassOption(name="whole", value=3),
        PassOption(name="number", value=0.5),
        PassOption(name="text", value="words"),
        PassOption(name="switch", value=False),
        PassOption(name="nothing", value=None),
        PassOption(name="names", value=("q_proj", "k_proj")),
        PassOption(name="path", value="runs/bard"),
    )
    assert (provenance.pass_name, provenance.seed) == ("everything", 7)
    assert (provenance.qpa_version, provenance.parent) == (__version__, SPEC.digest)
    assert context.provenance(Everything(), None).parent is None


def read(kind, name):
    return kind.from_json((GOLDEN / f"{kind.kind}-1/{name}.json").read_bytes(), name)


def test_provenance_names_all_documents_that_a_pass_reads(context):
    layout, source = read(WeightLayout, "aligned"), read(LogicalCircuit, "three-qubits")
    context = replace(context, documents=(SPEC, layout, source))
    found = context.provenance(TrainGenerator(data="text.txt"), source)
    assert found.parents == (source.digest, SPEC.digest, layout.digest)
    assert found.parent == source.digest


def test_options_that_cannot_change_the_result_are_not_in_provenance(context):
    source = read(LogicalCircuit, "three-qubits")
    context = replace(context, documents=(SPEC, read(WeightLayout, "aligned"), source))
    first = TrainGenerator(data="text.txt", save_steps=10)
    resumed = TrainGenerator(data="text.txt", save_steps=20, resume=True)
    assert context.provenance(first, source) == context.provenance(resumed, source)
    other = TrainGenerator(data="text.txt", lr=1e-4)
    assert context.provenance(first, source) != context.provenance(other, source)


def test_the_seed_of_a_name_never_changes():
    # SHA-256("0:angles") starts with these eight bytes; results of old runs depend on them.
    assert split_seed(0, "angles") == 0xF2219718D3F18CEB >> 1
    assert split_seed(-1, "angles") != split_seed(1, "angles")


def test_seeds_differ_by_seed_and_by_name(context):
    seeds = {split_seed(seed, name) for seed in range(20) for name in ("a", "b", "1", "11", "")}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert context.seed_for("a") == split_seed(7, "a")
