from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GemmaConfig, GPT2Config, LlamaConfig

from qpa.documents import AdapterSpec, AdapterTensor, BaseModelReference, Provenance, WeightLayout
from qpa.errors import OptionError
from qpa.generator import assemble
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline import PassContext, Pipeline
from qpa.run_directory import DirectoryStore

NOWHERE = PassContext(seed=0, files=DirectoryStore(Path("nowhere")))


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
    assert (layout.n_chunks, layout.n_qubits, layout.n_layers, layout.n_circuits) == (100, 7, 8, 1)


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
    assert (layout.n_chunks, layout.n_qubits, layout.n_layers, layout.n_circuits) == (252, 8, 8, 1)


def test_the_default_chunk_size_is_the_papers_for_gpt2(tmp_path):
    layout = plan(tmp_path, GPT2Config(), PlanLayout(generator="paper"), rank=4, targets=("lm_head",))
    assert layout.groups[0].chunk_size == 2048
    assert layout.groups[0].decoder_widths == (8, 32, 64, 128, 128, 64, 32, 32, 2048)


# Aligned layouts of the small code model


@pytest.mark.parametrize(
    ("rank", "heads", "n_qubits", "n_generator"),
    [(8, None, 10, 41_600), (8, 8, 10, 41_600), (6, 6, 9, 31_152)],
)
def test_aligned_layout_of_the_small_code_model(tmp_path, rank, heads, n_qubits, n_generator):
    layout = plan(tmp_path, pycode_config(), PlanLayout(heads=heads), rank=rank)
    n_circuits = heads or 8
    # 6 layers of 7 linear maps, each with rank rows of A and rank columns of B.
    assert layout.n_chunks == 6 * 7 * 2 * rank
    assert layout.n_qubits == n_qubits
    assert layout.account.n_angles == n_circuits * 8 * n_qubits
    # Decoders end in 256 numbers, but gate and up in 768 for B, and down in 768 for A.
    assert layout.account.n_decoder == n_circuits * (11 * 256 + 3 * 768)
    assert layout.account.n_generator == n_generator
    assert layout.account.n_adapter == 6 * rank * (4 * 512 + 3 * 1024)


def test_a_group_is_one_module_type_and_role(tmp_path):
    layout = plan(tmp_path, pycode_config(), PlanLayout())
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
def specs(draw):
    rank = draw(st.integers(1, 5))
    side = st.integers(rank, 12)
    modules = draw(
        st.lists(st.sampled_from(["0.q", "1.q", "2.q", "0.up", "1.up", "head"]), min_size=1, unique=True)
    )
    return AdapterSpec(
        provenance=Provenance(pass_name="test", options=(), seed=0, qpa_version="0", parent=None),
        base=BaseModelReference(
            name_or_path="model",
            revision=None,
            config_digest="",
            model_type="",
            architecture="",
            ties_lm_head=False,
            trust_remote_code=False,
        ),
        method="lora",
        rank=rank,
        alpha=2.0 * rank,
        target_modules=tuple(modules),
        fan_in_fan_out=False,
        tensors=tuple(t for name in modules for t in tensor_pair(name, rank, draw(side), draw(side))),
    )


def tensor_pair(module, rank, n_in, n_out):
    common = {"module": module, "module_type": module.rpartition(".")[2]}
    return (
        AdapterTensor(**common, role="lora_A", shape=(rank, n_in), initial="kaiming_uniform"),
        AdapterTensor(**common, role="lora_B", shape=(n_out, rank), initial="zeros"),
    )


def numbered_chunks(layout):
    """Return each group's chunks filled with ids that no other group has."""
    first, chunks = 0, []
    for group in layout.groups:
        n_numbers = group.n_chunks * group.chunk_size
        chunks.append(torch.arange(first, first + n_numbers).view(group.n_chunks, group.chunk_size))
        first += n_numbers
    return chunks


PLANS = st.one_of(
    st.builds(PlanLayout, heads=st.integers(1, 4), layers=st.integers(1, 4)),
    st.builds(PlanLayout, generator=st.just("paper"), chunk_size=st.integers(1, 80)),
)


@given(specs(), PLANS)
@settings(max_examples=60, deadline=None)
def test_every_adapter_number_is_covered_exactly_once(spec, layout_pass):
    layout = layout_pass.run(spec, NOWHERE)
    shapes = {tensor.path: tensor.shape for tensor in spec.tensors}
    chunks = numbered_chunks(layout)
    ids = []
    for group, numbers in zip(layout.groups, chunks, strict=True):
        for tensor, values in zip(group.tensors, assemble(group, numbers), strict=True):
            assert tuple(values.shape) == shapes.pop(tensor.path)
            ids.extend(values.flatten().tolist())
    assert shapes == {}
    assert len(ids) == len(set(ids)) == spec.n_numbers
    n_padding = sum(numbers.numel() for numbers in chunks) - len(ids)
    assert n_padding == 0 if layout.generator == "aligned" else n_padding < layout.groups[0].chunk_size


@given(specs(), PLANS)
@settings(max_examples=30, deadline=None)
def test_the_numbers_of_a_layout_follow_from_its_spec(spec, layout_pass):
    layout = layout_pass.run(spec, NOWHERE)
    assert layout.account.n_adapter == spec.n_numbers
    assert layout.provenance.parent == spec.digest
    assert layout.n_chunks <= 2**layout.n_qubits
    assert layout.n_qubits == 1 or layout.n_chunks > 2 ** (layout.n_qubits - 1)


@given(specs())
@settings(max_examples=30, deadline=None)
def test_an_aligned_chunk_is_a_row_of_a_or_a_column_of_b(spec):
    layout = PlanLayout().run(spec, NOWHERE)
    for group, numbers in zip(layout.groups, numbered_chunks(layout), strict=True):
        values = assemble(group, numbers)
        vectors = [v for t in values for v in (t if group.name.split(".")[1] == "lora_A" else t.T)]
        assert torch.equal(torch.stack(vectors), numbers)


@given(specs(), st.integers(1, 80))
@settings(max_examples=30, deadline=None)
def test_the_paper_lays_the_tensors_end_to_end_in_the_order_of_the_spec(spec, chunk_size):
    layout = PlanLayout(generator="paper", chunk_size=chunk_size).run(spec, NOWHERE)
    (group,), (numbers,) = layout.groups, numbered_chunks(layout)
    assert [tensor.path for tensor in layout.tensors] == [tensor.path for tensor in spec.tensors]
    laid = torch.cat([values.flatten() for values in assemble(group, numbers)])
    assert laid.tolist() == list(range(spec.n_numbers))


# Options


@pytest.fixture
def spec():
    golden = Path(__file__).parent / "golden" / "adapter-spec-1" / "llama.json"
    return AdapterSpec.from_json(golden.read_bytes(), "llama.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "flat"}, r"--generator: expected aligned or paper, found flat"),
        ({"layers": 0}, r"--layers: expected a whole number of at least 1, found 0"),
        ({"heads": 0}, r"--heads: expected a whole number of at least 1, found 0"),
        ({"heads": -2}, r"--heads: expected a whole number of at least 1, found -2"),
        ({"qubits": 0}, r"--qubits: expected a whole number of at least 1, found 0"),
        ({"generator": "paper", "chunk_size": 0}, r"--chunk-size: expected a whole number of at least 1"),
        ({"chunk_size": 64}, r"--chunk-size: .* with --generator aligned"),
        ({"qubits": 2}, r"--qubits: expected at least 3 for 8 chunks, found 2"),
        ({"qubits": 25}, r"--qubits: expected at most 24, found 25; simulation needs memory"),
    ],
)
def test_an_option_out_of_range_is_refused(spec, options, message):
    with pytest.raises(OptionError, match=message):
        PlanLayout(**options).run(spec, NOWHERE)


def test_chunks_beyond_24_qubits_ask_for_larger_chunks(tmp_path):
    config = GPT2Config(vocab_size=2**21, n_embd=8, n_layer=1, n_head=1)
    layout = PlanLayout(generator="paper", chunk_size=1)
    with pytest.raises(
        OptionError, match=r"--qubits: expected at most 24, found 25; use a larger --chunk-size"
    ):
        plan(tmp_path, config, layout, rank=8, targets=("lm_head",))


def test_more_qubits_than_needed_are_allowed(spec):
    layout = PlanLayout(qubits=5, heads=2, layers=3).run(spec, NOWHERE)
    assert layout.n_qubits == 5
    assert layout.account.n_angles == 2 * 3 * 5


def test_a_chunk_is_never_larger_than_the_adapter(spec):
    layout = PlanLayout(generator="paper").run(spec, NOWHERE)
    assert (layout.groups[0].chunk_size, layout.n_chunks, layout.n_qubits) == (spec.n_numbers, 1, 1)
