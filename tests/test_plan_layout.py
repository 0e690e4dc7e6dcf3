import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GemmaConfig, GPT2Config, LlamaConfig

from qpa.adapters.attach import initial_adapter
from qpa.documents import AdapterSpec, WeightLayout
from qpa.errors import OptionError
from qpa.generators.chunks import basis_shapes, kept_rows
from qpa.generators.generator import make_generator
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pipeline import Pipeline
from tests.small_specs import NOWHERE, small_spec, spec_of

FEATURES = ("circuit", "classical", "random", "bits")


def plan(path, config, layout, **inspect):
    """Plan from a config file alone: there are no weights anywhere."""
    config.save_pretrained(path)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    pipeline = Pipeline(InspectModel(model=str(path), **inspect), layout)
    return pipeline.run(None, NOWHERE).document(WeightLayout)


def pycode_config():
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )


# The paper's table (arXiv 2410.09846)


def test_paper_layout_of_the_gpt2_head(tmp_path):
    layout = plan(
        tmp_path,
        GPT2Config(),
        PlanLayout(generator="paper", chunk_size=2048),
        rank=4,
        targets=("lm_head",),
    )
    assert layout.account.n_adapter == 204_100
    assert layout.account.n_angles == 56
    assert layout.account.n_decoder == 106_208
    assert layout.account.n_generator == 106_264
    assert round(layout.account.percent, 2) == 52.06
    assert (layout.n_chunks, layout.ansatz.n_qubits, layout.ansatz.n_layers, layout.n_circuits) == (
        100,
        7,
        8,
        1,
    )


def test_paper_layout_of_the_gemma_head(tmp_path):
    layout = plan(
        tmp_path,
        GemmaConfig(hidden_size=2048, num_hidden_layers=1),
        PlanLayout(generator="paper", chunk_size=4096),
        rank=4,
        targets=("lm_head",),
    )
    assert layout.account.n_adapter == 1_032_192
    assert layout.account.n_angles == 64
    assert layout.account.n_decoder == 173_824
    assert layout.account.n_generator == 173_888
    assert round(layout.account.percent, 3) == 16.846
    assert (layout.n_chunks, layout.ansatz.n_qubits, layout.ansatz.n_layers, layout.n_circuits) == (
        252,
        8,
        8,
        1,
    )


def test_the_default_chunk_size_is_the_papers_for_gpt2(tmp_path):
    layout = plan(tmp_path, GPT2Config(), PlanLayout(generator="paper"), rank=4, targets=("lm_head",))
    assert layout.groups[0].chunk_size == 2048
    assert layout.groups[0].decoder.widths == (8, 32, 64, 128, 128, 64, 32, 32, 2048)


# Aligned layouts of the small code model


@pytest.mark.parametrize(
    ("rank", "heads", "n_qubits", "n_generator"),
    [(8, None, 10, 41_600), (8, 8, 10, 41_600), (6, 6, 9, 31_152)],
)
def test_aligned_layout_of_the_small_code_model(tmp_path, rank, heads, n_qubits, n_generator):
    layout = plan(tmp_path, pycode_config(), PlanLayout(generator="aligned", circuits=heads), rank=rank)
    n_circuits = heads or 8
    # 6 layers of 7 linear maps, each with rank rows of A and rank columns of B.
    assert layout.n_chunks == 6 * 7 * 2 * rank
    assert layout.ansatz.n_qubits == n_qubits
    assert layout.account.n_angles == n_circuits * 8 * n_qubits
    # Decoders end in 256 numbers, but gate and up in 768 for B, and down in 768 for A.
    assert layout.account.n_decoder == n_circuits * (11 * 256 + 3 * 768)
    assert layout.account.n_generator == n_generator
    assert layout.account.n_adapter == 6 * rank * (4 * 512 + 3 * 1024)


def test_a_group_is_one_module_type_and_role(tmp_path):
    layout = plan(tmp_path, pycode_config(), PlanLayout(generator="aligned"))
    assert [group.name for group in layout.groups[:4]] == [
        "q_proj.lora_A",
        "q_proj.lora_B",
        "k_proj.lora_A",
        "k_proj.lora_B",
    ]
    assert all(len(group.tensors) == 6 for group in layout.groups)
    assert all(group.axis == ("row" if group.name.endswith("A") else "column") for group in layout.groups)


# Every adapter number exactly once


@st.composite
def specs(draw, min_rank=1):
    rank = draw(st.integers(min_rank, 5))
    side = st.integers(rank, 12)
    names = st.sampled_from(["0.q", "1.q", "2.q", "0.up", "1.up", "head"])
    modules = draw(st.lists(names, min_size=1, unique=True))
    return spec_of([(name, draw(side), draw(side)) for name in modules], rank)


class Numbered(torch.nn.Module):
    """A decoder that gives chunks of numbers, whatever it is asked."""

    def __init__(self, chunks):
        super().__init__()
        self.chunks = chunks

    def forward(self, _):
        return self.chunks


BASIS = -1.0


def numbered(layout):
    """Return each group's chunks filled with ids from 1, and the tensors they fill; bases are BASIS or 1."""
    chunks = numbered_chunks(layout)
    shapes = basis_shapes(layout).items()
    bases = {path: torch.full(shape, BASIS if "lora_A" in path else 1.0) for path, shape in shapes}
    generator = make_generator(layout, 0, bases)
    generator.decoders = torch.nn.ModuleList(Numbered(numbers) for numbers in chunks)
    values = generator.decode(torch.zeros(2**layout.ansatz.n_qubits, layout.n_features))
    return chunks, {tensor.path: v for tensor, v in zip(layout.tensors, values, strict=True)}


def numbered_chunks(layout):
    """Return each group's chunks filled with ids that no other group has."""
    first, chunks = 1, []
    for group in layout.groups:
        n_numbers = group.n_chunks * group.chunk_size
        ids = torch.arange(first, first + n_numbers, dtype=torch.float32)
        chunks.append(ids.view(group.n_chunks, group.chunk_size))
        first += n_numbers
    return chunks


PLANS = st.one_of(
    st.builds(PlanLayout, generator=st.just("aligned"), circuits=st.integers(1, 4), layers=st.integers(1, 4)),
    st.builds(PlanLayout, generator=st.just("paper"), chunk_size=st.integers(1, 80)),
)


@given(specs(), PLANS)
@settings(max_examples=60, deadline=None)
def test_every_adapter_number_is_covered_exactly_once(spec, layout_pass):
    layout = layout_pass.run(spec, NOWHERE)
    chunks, values = numbered(layout)
    assert {path: tuple(v.shape) for path, v in values.items()} == {t.path: t.shape for t in spec.tensors}
    ids = [number for tensor in values.values() for number in tensor.flatten().tolist()]
    assert len(ids) == len(set(ids)) == spec.n_numbers
    n_padding = sum(numbers.numel() for numbers in chunks) - len(ids)
    assert n_padding == 0 if layout.generator == "aligned" else n_padding < layout.groups[0].chunk_size


@given(specs(), PLANS)
@settings(max_examples=30, deadline=None)
def test_the_numbers_of_a_layout_follow_from_its_spec(spec, layout_pass):
    layout = layout_pass.run(spec, NOWHERE)
    assert layout.account.n_adapter == spec.n_numbers
    assert layout.provenance.parent == spec.digest
    assert layout.n_chunks <= 2**layout.ansatz.n_qubits
    assert layout.ansatz.n_qubits == 1 or layout.n_chunks > 2 ** (layout.ansatz.n_qubits - 1)


@given(specs())
@settings(max_examples=30, deadline=None)
def test_an_aligned_chunk_is_a_row_of_a_or_a_column_of_b(spec):
    layout = PlanLayout(generator="aligned").run(spec, NOWHERE)
    chunks, values = numbered(layout)
    for group, numbers in zip(layout.groups, chunks, strict=True):
        tensors = [values[tensor.path] for tensor in group.tensors]
        vectors = [v for t in tensors for v in (t if group.name.split(".")[1] == "lora_A" else t.T)]
        assert torch.equal(torch.stack(vectors), numbers)


@given(specs(), st.integers(1, 80))
@settings(max_examples=30, deadline=None)
def test_the_paper_lays_the_tensors_end_to_end_in_the_order_of_the_spec(spec, chunk_size):
    layout = PlanLayout(generator="paper", chunk_size=chunk_size).run(spec, NOWHERE)
    _, values = numbered(layout)
    assert [tensor.path for tensor in layout.tensors] == [tensor.path for tensor in spec.tensors]
    laid = torch.cat([tensor.flatten() for tensor in values.values()])
    assert laid.tolist() == list(range(1, spec.n_numbers + 1))


# The spectral layout


def test_the_default_has_a_circuit_a_layer_and_fills_the_rank(tmp_path):
    layout = plan(tmp_path, pycode_config(), PlanLayout())
    assert (layout.generator, layout.n_circuits, layout.ansatz.n_layers) == ("spectral", 6, 1)
    n_spectrum = 7 * 31  # a factor for each direction that the vector leaves of rank 32
    n_a, n_b = 256 + 256 + 256 + 768, 4 * 256 + 2 * 768 + 256  # q, k and v share rows, gate and up too
    assert layout.account.n_decoder == 6 * (n_a + n_b + n_spectrum)
    assert layout.account.n_adapter == 32 * 6 * (4 * 512 + 3 * 1024)
    assert layout.account.n_angles == 6 * layout.ansatz.n_qubits
    assert len(layout.groups) == 4 + 7 + 7
    assert layout.ansatz.n_qubits == 3 + 5  # 6 windows, 18 groups


def test_the_default_rank_is_32_or_the_smallest_side(tmp_path):
    wide = plan(tmp_path / "wide", pycode_config(), PlanLayout())
    assert {min(tensor.shape) for tensor in wide.tensors} == {32}
    narrow_config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
    )
    narrow = plan(tmp_path / "narrow", narrow_config, PlanLayout())
    assert {min(tensor.shape) for tensor in narrow.tensors} == {12}


def test_without_spectrum_and_sharing_the_numbers_are_those_of_lora_rank_1(tmp_path):
    options = PlanLayout(spectrum=False, share_inputs=False)
    layout = plan(tmp_path, pycode_config(), options, rank=4)
    assert layout.account.n_decoder == layout.account.n_adapter // 4


SPECTRAL = st.tuples(st.integers(1, 6), st.integers(2, 6)).flatmap(
    lambda shape: st.tuples(
        st.just(shape[0]), st.just(shape[1]), st.integers(1, shape[0] * (shape[1] - 1)), st.booleans()
    )
)


@given(SPECTRAL)
@settings(max_examples=50, deadline=None)
def test_every_chunk_has_a_state_of_its_own_in_the_window_of_its_layer(drawn):
    n_layers, rank, n_heads, share_inputs = drawn
    plan = PlanLayout(circuits=n_heads, share_inputs=share_inputs)
    layout = plan.run(small_spec(n_layers, rank), NOWHERE)
    n_rows = -(-n_heads // n_layers)
    states = [state for group in layout.groups for state in group.states]
    assert len(states) == len(set(states)) == layout.n_chunks == len(layout.groups) * n_layers * n_rows
    assert min(states) >= 0 and max(states) < 2**layout.ansatz.n_qubits
    n_below = layout.ansatz.n_qubits - layout.features.windows.n_window_qubits
    for group in layout.groups:
        windows = [state >> n_below for state in group.states]
        assert windows == sorted(windows)
        assert set(windows) == set(range(n_heads))
        sizes = [windows.count(window) for window in range(n_heads)]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= 2**layout.features.windows.n_chunk_qubits


@given(SPECTRAL)
@settings(max_examples=40, deadline=None)
def test_vectors_and_spectrum_fill_disjoint_rows_and_columns(drawn):
    n_layers, rank, n_heads, share_inputs = drawn
    spec = small_spec(n_layers, rank)
    layout = PlanLayout(circuits=n_heads, share_inputs=share_inputs).run(spec, NOWHERE)
    n_rows = -(-n_heads // n_layers)
    size = (rank - n_rows) // n_rows * n_rows
    _, values = numbered(layout)
    assert list(values) == sorted(values, key=[tensor.path for tensor in layout.tensors].index)
    assert values.keys() == {tensor.path for tensor in spec.tensors}
    seen = []
    for path, tensor in values.items():
        if "lora_A" in path:
            assert bool((tensor[:n_rows] > 0).all())
            assert bool((tensor[n_rows : n_rows + size] == BASIS).all())
            assert not bool(tensor[n_rows + size :].any())
        else:
            vectors, factors = tensor[:, :n_rows], tensor[:, n_rows : n_rows + size]
            assert torch.equal(factors, factors[:1].expand_as(factors))
            ids = [*vectors.flatten().tolist(), *factors[0].tolist()]
            assert len(ids) == len(set(ids)) and min(ids) > 0
            assert not bool(tensor[:, n_rows + size :].any())
            seen += ids
    assert len(seen) == len(set(seen))


def test_with_two_rows_a_layer_the_spectrum_fills_disjoint_columns():
    layout = PlanLayout(circuits=6).run(small_spec(3, 6), NOWHERE)
    group = next(group for group in layout.groups if group.name == "q_proj.spectrum")
    assert (group.n_chunks, group.chunk_size) == (6, 2)
    chunks, values = numbered(layout)
    numbers = chunks[layout.groups.index(group)]
    for layer in range(3):
        tensor = values[f"layers.{layer}.self_attn.q_proj.lora_B.weight"]
        assert torch.equal(tensor[0, 2:], numbers[2 * layer : 2 * layer + 2].flatten())


def test_modules_that_read_the_same_activations_share_the_rows_of_lora_a():
    shared, own = (PlanLayout(share_inputs=share).run(small_spec(2, 4), NOWHERE) for share in (True, False))
    _, values = numbered(shared)
    for layer in range(2):
        q, k, v = (values[f"layers.{layer}.self_attn.{name}_proj.lora_A.weight"][0] for name in "qkv")
        assert torch.equal(q, k) and torch.equal(q, v)
        up = values[f"layers.{layer}.mlp.up_proj.lora_A.weight"][0]
        assert not bool(torch.isin(q, up).any())
    first, second = (values[f"layers.{layer}.self_attn.q_proj.lora_A.weight"][0] for layer in range(2))
    assert not bool(torch.isin(first, second).any())
    _, values = numbered(own)
    q, k = (values[f"layers.0.self_attn.{name}_proj.lora_A.weight"][0] for name in "qk")
    assert not bool(torch.isin(q, k).any())


def test_shared_rows_start_from_rows_of_their_own_and_the_basis_from_zero():
    spec = small_spec(2, 4)
    layout = PlanLayout(circuits=4).run(spec, NOWHERE)
    initial, plain = initial_adapter(spec, kept_rows(layout)), initial_adapter(spec)
    rows = [initial[f"layers.0.self_attn.{name}_proj.lora_A.weight"] for name in "qkv"]
    assert all(not torch.equal(a[:2], b[:2]) for a, b in itertools.combinations(rows, 2))
    for path, tensor in initial.items():
        assert torch.equal(tensor[:2], plain[path][:2]) if "lora_A" in path else not bool(tensor.any())
        assert not bool(tensor[2:].any())
        assert bool(plain[path][2:].any()) == ("lora_A" in path)


def test_layers_without_vectors_have_a_larger_share_of_nothing_but_their_spectrum():
    spec = small_spec(2, 4)
    layout = PlanLayout(vectors=("q_proj",)).run(spec, NOWHERE)
    names = {group.name for group in layout.groups}
    assert {name for name in names if "lora" in name} == {"q_proj+k_proj+v_proj.lora_A", "q_proj.lora_B"}
    assert len(names) == 2 + 5
    _, values = numbered(layout)
    assert not bool((values["layers.0.self_attn.q_proj.lora_A.weight"][0] == BASIS).any())
    assert bool((values["layers.0.self_attn.k_proj.lora_A.weight"][:3] == BASIS).all())
    assert not bool(initial_adapter(spec, kept_rows(layout))["layers.0.self_attn.k_proj.lora_A.weight"].any())


def test_without_any_vectors_the_spectrum_has_the_whole_rank():
    layout = PlanLayout(vectors=("none",), circuits=1).run(small_spec(2, 4), NOWHERE)
    assert {group.axis for group in layout.groups} == {"spectrum"}
    assert {group.chunk_size for group in layout.groups} == {4}
    assert layout.account.n_decoder == 5 * 4


@given(specs(min_rank=2), st.sampled_from(FEATURES))
@settings(max_examples=40, deadline=None)
def test_a_spectral_layout_covers_models_whose_layers_differ(spec, features):
    layout = PlanLayout(features=features).run(spec, NOWHERE)
    _, values = numbered(layout)
    assert {path: tuple(v.shape) for path, v in values.items()} == {t.path: t.shape for t in spec.tensors}
    ids = [i for path, v in values.items() if "lora_B" in path for i in set(v[:, :1].flatten().tolist())]
    assert 0.0 not in ids
    assert len(ids) == len(set(ids))


# Options


@pytest.fixture
def spec():
    golden = Path(__file__).parent / "golden" / "adapter-spec-1" / "llama.json"
    return AdapterSpec.from_json(golden.read_bytes(), "llama.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "flat"}, r"generator: expected spectral, state, .*, found flat"),
        ({"features": "none"}, r"features: expected circuit, signed, classical, .* or own, found none"),
        ({"circuits": 2}, r"circuits: expected at most 1, 1 for each layer with rank 2, found 2; lower it"),
        (
            {"vectors": ("up_proj",)},
            r"vectors: expected all, none, or some of down_proj, q_proj, found up",
        ),
        ({"vectors": ("none",), "spectrum": False}, r"vectors: expected vectors or a spectrum on every"),
        ({"vectors": ("q_proj",), "spectrum": False}, r"vectors: .* on every layer, found neither on some"),
        ({"layers": 0}, r"layers: expected a whole number of at least 1, found 0"),
        ({"circuits": 0}, r"circuits: expected a whole number of at least 1, found 0"),
        ({"circuits": -2}, r"circuits: expected a whole number of at least 1, found -2"),
        ({"qubits": 0}, r"qubits: expected a whole number of at least 1, found 0"),
        ({"generator": "paper", "chunk_size": 0}, r"chunk_size: expected a whole number of at least 1"),
        ({"chunk_size": 64}, r"chunk_size: .* with `generator` spectral"),
        ({"chunk_size": 64, "generator": "aligned"}, r"chunk_size: .* with `generator` aligned"),
        ({"qubits": 2}, r"qubits: expected at least 3 for 6 chunks, found 2"),
        ({"qubits": 2, "generator": "aligned"}, r"qubits: expected at least 3 for 8 chunks, found 2"),
        ({"qubits": 25}, r"qubits: expected at most 24, found 25; simulation needs memory"),
    ],
)
def test_an_option_out_of_range_is_refused(spec, options, message):
    with pytest.raises(OptionError, match=message):
        PlanLayout(**options).run(spec, NOWHERE)


def test_chunks_beyond_24_qubits_ask_for_larger_chunks(tmp_path):
    config = GPT2Config(vocab_size=2**21, n_embd=8, n_layer=1, n_head=1)
    layout = PlanLayout(generator="paper", chunk_size=1)
    with pytest.raises(
        OptionError, match=r"qubits: expected at most 24, found 25; use a larger `chunk_size`"
    ):
        plan(tmp_path, config, layout, rank=8, targets=("lm_head",))


def test_more_qubits_than_needed_are_allowed(spec):
    layout = PlanLayout(generator="aligned", qubits=5, circuits=2, layers=3).run(spec, NOWHERE)
    assert layout.ansatz.n_qubits == 5
    assert layout.account.n_angles == 2 * 3 * 5
    layout = PlanLayout(qubits=7, layers=3).run(spec, NOWHERE)
    assert layout.ansatz.n_qubits == 7
    assert layout.account.n_angles == 1 * 3 * 7


def test_a_spectrum_needs_a_rank_of_two(spec):
    one = spec_of([("0.q", 4, 4)], 1)
    with pytest.raises(OptionError, match=r"rank: expected at least 2.*or use `generator` aligned"):
        PlanLayout().run(one, NOWHERE)
    assert PlanLayout(generator="aligned").run(one, NOWHERE).n_chunks == 2


def test_a_rank_too_small_for_a_second_spectrum_needs_vectors_everywhere():
    spec = small_spec(2, 3)
    layout = PlanLayout(circuits=4).run(spec, NOWHERE)  # two rows a layer leave one direction for two chunks
    assert {group.axis for group in layout.groups} == {"row", "column"}
    with pytest.raises(OptionError, match=r"vectors: .* on every layer, found neither on some"):
        PlanLayout(circuits=4, vectors=("q_proj",)).run(spec, NOWHERE)


def test_a_chunk_is_never_larger_than_the_adapter(spec):
    layout = PlanLayout(generator="paper").run(spec, NOWHERE)
    assert (layout.groups[0].chunk_size, layout.n_chunks, layout.ansatz.n_qubits) == (spec.n_numbers, 1, 1)
