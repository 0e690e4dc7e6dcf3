"""What the words and names of `--targets` mean, architecture by architecture, and what is left out."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from qpa.adapters.registry import KINDS
from qpa.adapters.targets import ALL_LINEAR, ATTENTION, EXPERTS, MLP, part_of, shortest_parameter_names
from qpa.documents import AdapterSpec
from qpa.errors import OptionError
from qpa.models.base_model import build_on_meta
from qpa.models.linear_layers import head_path, linear_layers
from qpa.passes.inspect_model import InspectModel
from tests.small_specs import NOWHERE
from tests.tiny_architectures import MORE_ARCHITECTURES, tiny_config

FORMLESS = "fused experts, for which there is no form of {} that PEFT and a serving engine both read"
KV_B = ("model.layers.*.self_attn.kv_b_proj", 2, "vLLM would leave a LoRA on it out without a word")
TAKEN = "PEFT takes this name for the experts, on which it has no DoRA"


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory):
    """Return the function that plans an adapter on a tiny architecture, of which only the config is there."""

    @cache
    def place(name: str) -> Path:
        path = tmp_path_factory.mktemp("configs") / name
        tiny_config(name).save_pretrained(path)
        return path

    def inspect(name: str, *targets: str, method: str = "lora", rank: int | None = 2) -> AdapterSpec:
        options = {"targets": targets or None, "method": method, "rank": rank}
        return InspectModel(model=str(place(name)), **options).run(None, NOWHERE)

    return inspect


def types(spec: AdapterSpec) -> set[str]:
    return {tensor.module_type for tensor in spec.tensors}


def modules(spec: AdapterSpec) -> set[str]:
    return {tensor.module for tensor in spec.tensors}


def left(spec: AdapterSpec) -> list[tuple[str, int, str]]:
    return [(entry.layers, entry.n_layers, entry.reason) for entry in spec.left_out]


# Words


@pytest.mark.parametrize("name", MORE_ARCHITECTURES)
def test_words_are_the_parts_of_all_linear(name, inspected):
    everything = modules(inspected(name))
    assert modules(inspected(name, ALL_LINEAR)) == everything
    for word in (ATTENTION, MLP, EXPERTS):
        if expected := {module for module in everything if part_of(module) == word}:
            assert modules(inspected(name, word)) == expected
        else:
            with pytest.raises(OptionError, match=rf"found {word}, of which"):
                inspected(name, word)


def test_words_and_names_add_up(inspected):
    both = modules(inspected("deepseek-v3", ATTENTION, MLP))
    assert both == modules(inspected("deepseek-v3", ATTENTION)) | modules(inspected("deepseek-v3", MLP))
    assert "lm_head" in modules(inspected("deepseek-v3", ATTENTION, "lm_head"))
    assert modules(inspected("bloom", MLP, "dense")) == modules(inspected("bloom")) - {
        f"transformer.h.{layer}.self_attention.query_key_value" for layer in range(2)
    }


def test_a_word_for_which_a_model_has_nothing_is_refused(inspected):
    message = (
        r"^targets: expected words that mean layers of the model, found experts, of which BloomForCausal"
    )
    with pytest.raises(OptionError, match=message):
        inspected("bloom", EXPERTS)
    with pytest.raises(
        OptionError, match=r"of which nothing is left: model\.layers.*experts.*no form of LoRA"
    ):
        inspected("llama4", EXPERTS)


def test_a_feed_forward_adapter_takes_words_for_names_of_blocks(inspected):
    assert types(inspected("bloom", "mlp", method="ffa")) == {"mlp"}
    with pytest.raises(OptionError, match="found attention, which matches no layer"):
        inspected("bloom", ATTENTION, method="ffa")


# What is left out


@pytest.mark.parametrize("name", MORE_ARCHITECTURES)
def test_all_linear_is_every_linear_layer_but_the_head_and_what_is_left_out(name, inspected):
    spec, config = inspected(name), tiny_config(name)
    model = build_on_meta(config, name)
    linear = {*linear_layers(model)} - {head_path(model)}
    unmeant = {path for path in linear if path.endswith(("shared_expert_gate", ".kv_b_proj"))}
    assert {module for module in modules(spec) if part_of(module) != EXPERTS} == linear - unmeant
    assert not any(path.endswith((".router", ".mlp.gate")) for path in linear)


@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [
        ("mixtral", "lora", []),
        ("gpt-oss", "lora", []),
        ("deepseek-v3", "lora", [KV_B]),
        (
            "qwen3-next",
            "lora",
            [("model.layers.*.mlp.shared_expert_gate", 2, "a gate: it has a single output")],
        ),
        ("llama4", "lora", [("model.layers.*.feed_forward.experts", 2, FORMLESS.format("LoRA"))]),
        ("mixtral", "dora", [("model.layers.*.mlp.experts", 2, FORMLESS.format("DoRA"))]),
        (
            "deepseek-v3",
            "dora",
            [
                ("model.layers.*.mlp.experts", 1, FORMLESS.format("DoRA")),
                KV_B,
                *(
                    (f"model.layers.*.mlp.{layer}", 1, TAKEN)
                    for layer in ("gate_proj", "up_proj", "down_proj")
                ),
                *(
                    (f"model.layers.*.mlp.shared_experts.{layer}", 1, TAKEN)
                    for layer in ("gate_proj", "up_proj", "down_proj")
                ),
            ],
        ),
    ],
)
def test_the_plan_says_what_is_left_out_and_why(name, method, expected, inspected):
    assert left(inspected(name, method=method)) == expected


def test_what_no_word_means_is_not_left_out(inspected):
    assert left(inspected("llama4", ATTENTION)) == []
    assert left(inspected("llama4", "q_proj")) == []
    assert left(inspected("qwen3-next", MLP)) == left(inspected("qwen3-next"))


def test_a_gate_with_one_output_does_not_make_the_rank_one(inspected):
    assert inspected("qwen3-next", rank=None).rank == 8
    assert inspected("qwen3-next", "shared_expert_gate", rank=None).rank == 1


def test_the_absorbed_layer_of_latent_attention_can_be_named(inspected):
    assert "kv_b_proj" in types(inspected("deepseek-v3", ATTENTION, "kv_b_proj"))


def test_a_router_that_is_a_linear_layer_is_no_target(inspected):
    with pytest.raises(OptionError, match="found router, which is a router"):
        inspected("llama4", "router")


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_all_kinds_of_adapters_plan_on_every_mixture(method, inspected):
    for name in ("mixtral", "deepseek-v3", "gpt-oss", "qwen3-next", "llama4"):
        targets = () if KINDS[method].name == "dora" else (ATTENTION,)
        spec = inspected(name, *targets, method=method, rank=None)
        assert {part_of(module) for module in modules(spec)} <= {ATTENTION, MLP}


# Names in PEFT


@pytest.mark.parametrize(
    ("targets", "names", "parameters"),
    [
        ((), True, ("gate_proj.weight", "up_proj.weight", "down_proj.weight")),
        ((EXPERTS,), True, ()),
        ((MLP,), False, ("gate_proj.weight", "up_proj.weight", "down_proj.weight")),
        (("shared_experts.up_proj",), False, ("shared_experts.up_proj.weight",)),
        (("0.mlp.up_proj",), False, ("mlp.up_proj.weight",)),
    ],
)
def test_layers_with_names_of_experts_are_selected_by_their_weights(targets, names, parameters, inspected):
    spec = inspected("deepseek-v3", *targets)
    assert (spec.target_modules[-3:] == ("gate_proj", "up_proj", "down_proj")) is names
    assert spec.target_parameters == parameters


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("deepseek-v3", ("shared_experts.up_proj", "1.up_proj", "experts.0.up_proj")),
        ("mixtral", ("w1",)),
        ("mixtral", ("w1", "w3")),
        ("mixtral", ("experts.0.w2",)),
        ("gpt-oss", ("down_proj",)),
        ("gpt-oss", ("experts.1.gate_up_proj", "experts.1.down_proj")),
    ],
)
def test_some_layers_of_experts_are_refused(name, targets, inspected):
    with pytest.raises(OptionError, match=r"expected all layers of all experts, or none of them, found .*"):
        inspected(name, *targets)


def test_parameters_are_named_by_as_few_components_as_are_needed():
    paths = [f"layers.{layer}.{name}.weight" for layer in range(3) for name in ("a.up", "b.up", "b.down")]
    assert shortest_parameter_names(paths, paths) == ("up.weight", "down.weight")
    assert shortest_parameter_names([p for p in paths if ".a." in p], paths) == ("a.up.weight",)
    assert shortest_parameter_names(["layers.1.b.up.weight"], paths) == ("1.b.up.weight",)
    assert shortest_parameter_names([], paths) == ()
