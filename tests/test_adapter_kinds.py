"""All kinds of adapters but LoRA: planned, attached, trained and frozen."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, GPT2Config, Lfm2Config, MambaConfig

from qpa.adapters.attach import adapter_parameters, attach_adapter, set_adapter
from qpa.adapters.matrix_product import MatrixProduct
from qpa.adapters.parameter_view import ParameterView
from qpa.documents import AdapterSpec, Measurement, TrainedGenerator, WeightLayout
from qpa.errors import DocumentError, ModelError, OptionError
from qpa.generators.generator import make_generator
from qpa.models.base_model import load_model
from qpa.models.linear_layers import head_path, linear_layers
from qpa.models.probe import record_probe
from qpa.passes.freeze_adapter import FreezeAdapter, decode_adapter
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import DirectoryStore, RunDirectory
from qpa.training.optimizer import GeneratedAdapterOptimizer
from tests.test_train_generator import arrays, interrupt_after, plan, same_bits, tensors, train
from tests.tiny_models import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")

METHODS = ("dora", "ia3", "prefix", "ffa", "cayley", "qtha")
RANK = 5
RANKS: dict[str, int | None] = {"ia3": None, "cayley": 4}
"""Where a rank is no number that suits every model: IA3 has none, and blocks must divide the inputs."""
IDS = torch.arange(24)[None] * 7 % 200 + 33
NOWHERE = DirectoryStore(Path("nowhere"))
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
MAMBA = MambaConfig(**SMALL, state_size=4)
LFM2 = Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], num_attention_heads=8)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_inner=32, n_head=4, bos_token_id=None, eos_token_id=0)

IA3 = {
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "gpt2": (["attn.c_attn"], ["mlp.c_proj"]),
    "opt": (["k_proj", "v_proj"], ["fc2"]),
    "gpt-neox": (["query_key_value"], ["dense_4h_to_h"]),
    "phi3": (["qkv_proj"], ["down_proj"]),
    "gemma3": (["k_proj", "v_proj"], ["down_proj"]),
    "qwen3-moe": (["k_proj", "v_proj"], []),
}
"""Default targets of IA3 by model: those whose output is scaled, and those whose input is."""


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the function from a name to the directory of its tiny model, which is written once."""
    return cache(lambda name: ARCHITECTURES[name](tmp_path_factory.mktemp("models") / name))


def inspect(path: Path, method: str, *, seed: int = 0, **options: Any) -> AdapterSpec:
    """Return a spec, of rank 5 where the method takes it."""
    options = {"rank": RANKS.get(method, RANK)} | options
    return InspectModel(model=str(path), method=method, **options).run(None, PassContext(seed, NOWHERE))


def layout_of(spec: AdapterSpec, **options: Any) -> WeightLayout:
    return PlanLayout(**options).run(spec, PassContext(0, NOWHERE))


def base_of(spec: AdapterSpec) -> Any:
    return load_model(spec.base, keep_dtype=False)


def attached(spec: AdapterSpec) -> tuple[Any, dict[str, Any]]:
    """Return a base model with its adapter in eval mode, and the adapter's parameters."""
    model = attach_adapter(base_of(spec), spec).eval()
    return model, adapter_parameters(model, spec)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits


def qtha_by_hand(model: Any) -> dict[str, Any]:
    """Return the shapes of QTHA of five qubits on all linear layers but the head, with bonds of 4."""
    found: dict[str, Any] = {}
    for path, layer in linear_layers(model).items():
        if path == head_path(model):
            continue
        down, up = MatrixProduct.of(RANK, layer.n_in, 4), MatrixProduct.of(layer.n_out, RANK, 4)
        found |= {f"{path}.qtha_down_{site}": shape for site, shape in enumerate(down.shapes)}
        found[f"{path}.qtha_angles"] = (2, RANK)
        found |= {f"{path}.qtha_up_{site}": shape for site, shape in enumerate(up.shapes)}
    return found


def by_hand(model: Any, name: str, method: str, targets: tuple[str, ...] | None) -> dict[str, Any]:
    """Return the shapes of what PEFT would train, by the names and in the form of a spec."""
    if method == "ffa":
        block, shapes = "fc2" if name == "opt" else "mlp", {"ffa_down": (RANK, 64), "ffa_up": (64, RANK)}
        paths = [path for path, _ in model.named_modules() if path.endswith(f".{block}")]
        return {f"{path}.{role}.weight": shape for path in paths for role, shape in shapes.items()}
    if method == "cayley" and name == "gpt2":  # PEFT has no OFT on Conv1D
        blocks = {path: (1, m.weight.shape[0] // 4 * 6) for path, m in model.named_modules() if "c_" in path}
        return {f"{path}.oft_R.weight": shape for path, shape in blocks.items()}
    if method == "qtha":
        return qtha_by_hand(model)
    outputs, inputs = IA3[name]
    config = {
        "dora": LoraConfig(r=RANK, use_dora=True, target_modules=targets or "all-linear"),
        "ia3": IA3Config(target_modules=outputs + inputs, feedforward_modules=inputs),
        "prefix": PrefixTuningConfig(num_virtual_tokens=RANK, task_type="CAUSAL_LM"),
        "cayley": OFTConfig(oft_block_size=4, target_modules=targets or "all-linear"),
    }[method]
    config.fan_in_fan_out = name == "gpt2"
    trained = {key: p for key, p in get_peft_model(model, config).named_parameters() if p.requires_grad}
    if method == "prefix":
        parts = [f"{n}.prefix_{part}" for n in range(config.num_layers) for part in ("key", "value")]
        return {f"layers.{part}": (RANK, config.token_dim) for part in parts}
    for part in ("base_model.model.", ".default"):
        trained = {key.replace(part, ""): parameter for key, parameter in trained.items()}
    if method == "cayley":
        return {key: (1, parameter.numel()) for key, parameter in trained.items()}
    return {key.replace("vector.weight", "vector"): (*p.shape, 1)[:2] for key, p in trained.items()}


# Planning and attaching


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", IA3)
def test_the_plan_is_what_peft_trains_and_the_model_stays_what_it_was(model_of, name, method):
    is_beside_experts = name == "qwen3-moe" and method in ("dora", "cayley")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj") if is_beside_experts else None
    spec = inspect(model_of(name), method, targets=targets)
    found = {tensor.path: tensor.shape for tensor in spec.tensors}
    assert found == by_hand(base_of(spec), name, method, targets)
    model, parameters = attached(spec)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == spec.n_numbers
    assert [tuple(p.shape) for p in parameters.values()] == [tensor.shape for tensor in spec.tensors]
    base = logits(base_of(spec))
    changed = float((logits(model) - base).abs().max())
    assert changed > 0.1 if method == "prefix" else changed <= 1e-6
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (
            "tarot",
            {},
            "method: expected lora, dora, ia3, prefix, ffa, cayley, cayley-shared or qtha, found tarot",
        ),
        ("ia3", {"alpha": 8.0}, "alpha: expected no such option with `method` ia3, found 8.0"),
        ("ffa", {"alpha": 8.0}, "alpha: expected no such option with `method` ffa"),
        ("qtha", {"alpha": 8.0}, "alpha: expected no such option with `method` qtha"),
        ("qtha", {"rank": 9}, "rank: expected at most 8 qubits with `method` qtha, found 9"),
        ("qtha", {"fusion": "sum"}, "fusion: expected product or linear, found sum"),
        ("lora", {"fusion": "linear"}, "fusion: expected no such option with `method` lora, found linear"),
        ("ffa", {"circuit_layers": 2}, "circuit_layers: expected no such option with `method` ffa, found 2"),
        ("ia3", {"rank": 4}, "rank: expected no such option with `method` ia3, found 4"),
        ("prefix", {"rank": 0}, "rank: expected a whole number of at least 1, found 0"),
        ("prefix", {"targets": ("q_proj",)}, "targets: expected no such option .* found q_proj"),
        ("dora", {"rank": 33}, "rank: expected at most 32, the smaller side of .*k_proj, found 33"),
        (
            "cayley",
            {"rank": 1},
            "rank: expected a size of blocks, from 2 on, .* found 1; 2 divides those of ev",
        ),
        (
            "cayley",
            {"rank": 6},
            "rank: expected a size .* that divides the 64 inputs of .*, found 6; 4 divid",
        ),
        ("cayley", {"alpha": 8.0}, "alpha: expected no such option with `method` cayley"),
        ("ia3", {"targets": ("v_porj",)}, "targets: .* which matches no layer; the nearest .* v_proj"),
        ("ffa", {"targets": ("mpl",)}, "targets: .* found mpl, which matches no layer; .* mlp"),
        ("ffa", {"targets": ("all-linear",)}, "targets: expected names of blocks with `method` ffa"),
        ("ffa", {"targets": ("act_fn",)}, "targets: .* found act_fn"),  # not as wide as the model
    ],
)
def test_an_option_that_the_method_does_not_have_is_refused(llama, method, options, words):
    with pytest.raises(OptionError, match=f"^{words}") as caught:
        inspect(llama, method, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "config"), [("ia3", MAMBA), ("ffa", MAMBA), ("prefix", MAMBA), ("prefix", LFM2)]
)
def test_a_model_that_the_method_does_not_fit_is_refused(tmp_path, method, config):
    """It has no modules of the usual names, or layers without keys and values."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError if method == "prefix" else OptionError) as caught:
        attached(inspect(tmp_path, method))
    assert "\n" not in str(caught.value)


# Initial values, and parts of a parameter


@torch.no_grad()
def tokens_of(base: Any, values: torch.Tensor) -> torch.Tensor:
    """Return int64[1, n]: the tokens whose values the first layer has computed, found one by one."""
    every, found = torch.arange(base.config.vocab_size)[:, None], torch.zeros(1, 0, dtype=torch.int64)
    for position, value in enumerate(values):
        tried = torch.cat((found.expand(len(every), -1), every), dim=1)
        layer = base(input_ids=tried, use_cache=True).past_key_values.layers[0]
        distances = (layer.values[:, :, position].flatten(1) - value).abs().amax(dim=1)
        found = tried[distances.argmin()][None]
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
@torch.no_grad()
def test_a_prefix_starts_as_tokens_that_stand_before_the_text(model_of, name):
    spec = inspect(model_of(name), "prefix")
    (model, parameters), base = attached(spec), base_of(spec)
    tokens = tokens_of(base, parameters["layers.0.prefix_value"].detach())
    layers = base(input_ids=tokens, use_cache=True).past_key_values.layers
    states = [state[0].transpose(0, 1).flatten(1) for layer in layers for state in (layer.keys, layer.values)]
    for parameter, state in zip(parameters.values(), states, strict=True):
        torch.testing.assert_close(parameter.detach(), state, atol=1e-5, rtol=0)
    expected = logits(base, torch.cat((tokens, IDS), dim=1))[:, RANK:]
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


def test_a_prefix_is_a_function_of_the_seed_alone(gpt2):
    def prefix(seed: int, *, training: bool) -> torch.Tensor:
        spec = inspect(gpt2, "prefix", seed=seed)
        model = attach_adapter(base_of(spec).train(training), spec)
        assert model.get_base_model().training is training
        return model.prompt_encoder["default"].embedding.weight.detach()

    first = prefix(0, training=False)
    torch.manual_seed(17)
    assert torch.equal(prefix(0, training=True), first)
    assert not torch.isclose(prefix(1, training=False), first).all(dim=1).any()


@pytest.mark.parametrize("block", ["mlp", "self_attn"])
def test_a_feed_forward_adapter_adds_its_bottleneck_to_what_a_block_returns(llama, block):
    model, parameters = attached(inspect(llama, "ffa", targets=(block,)))
    assert [bool(parameter.any()) for parameter in parameters.values()] == [True, False, True, False]
    torch.manual_seed(0)
    set_adapter(parameters, {path: 0.2 * torch.randn(p.shape) for path, p in parameters.items()})
    module, seen = model.get_base_model().get_submodule(f"model.layers.1.{block}"), []
    for is_first in (True, False):
        module.register_forward_hook(lambda _, __, output: seen.append(output), prepend=is_first)
    logits(model)
    before, after = (output[0] if isinstance(output, tuple) else output for output in seen)
    down, up = (parameters[f"model.layers.1.{block}.ffa_{role}.weight"].detach() for role in ("down", "up"))
    expected = before + torch.nn.functional.gelu(before @ down.T) @ up.T
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert float((after - before).abs().max()) > 0.1


def test_a_part_is_read_written_and_forgotten_with_its_parameter(llama):
    model, parameters = attached(inspect(llama, "prefix"))
    leaf = model.prompt_encoder["default"].embedding.weight
    part, columns = parameters["layers.1.prefix_key"], slice(2 * 32, 3 * 32)
    assert isinstance(part, ParameterView) and (part.dtype, part.device) == (leaf.dtype, leaf.device)
    expected = leaf.detach().clone()
    expected[:, columns] = 7.0
    part.detach().fill_(7.0)
    assert torch.equal(leaf.detach(), expected) and part.grad is None
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert bool(part.grad.any()) and torch.equal(part.grad, leaf.grad[:, columns])
    part.grad.zero_()
    assert not leaf.grad[:, columns].any() and bool(leaf.grad.any())
    leaf.grad = None
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize(
    ("method", "n_leaves"),
    [("prefix", 1), ("dora", 42), ("ia3", 6), ("ffa", 4), ("cayley", 14), ("qtha", 98)],
)
def test_the_optimizer_holds_leaves_once_and_sets_them_to_initial_plus_generated(llama, method, n_leaves):
    spec = inspect(llama, method)
    layout, (model, parameters) = layout_of(spec, generator="aligned"), attached(spec)
    initial = {path: parameter.detach().clone() for path, parameter in parameters.items()}
    adapter, generator = [parameters[tensor.path] for tensor in layout.tensors], make_generator(layout, 3)
    optimizer = GeneratedAdapterOptimizer(adapter, generator, lr=0.02, angle_lr=0.02)
    leaves = optimizer.param_groups[0]["params"]
    assert {*leaves} == {p for p in model.parameters() if p.requires_grad} and len(leaves) == n_leaves
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(parameter.grad is not None for parameter in adapter)
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in adapter)
    for tensor, generated in zip(layout.tensors, generator(), strict=True):
        assert bool(generated.any()), tensor.path
        assert torch.equal(parameters[tensor.path].detach(), initial[tensor.path] + generated), tensor.path


# Layouts


def check_account(spec: AdapterSpec, layout: WeightLayout) -> None:
    assert layout.account.n_adapter == spec.n_numbers
    assert layout.account.n_generator == sum(p.numel() for p in make_generator(layout, 0).parameters())
    assert {t.path: t.shape for t in layout.tensors} == {t.path: t.shape for t in spec.tensors}


@pytest.mark.parametrize("options", [{}, {"circuits": 9}, {"vectors": ("none",)}, {"max_params": "smallest"}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_plan_of_dora_generates_one_magnitude_vector_a_module(model_of, name, options):
    spec = inspect(model_of(name), "dora", rank=16)
    if "max_params" in options:
        n_smallest = layout_of(spec, circuits=1, vectors=("none",)).account.n_generator
        options = {"max_params": str(n_smallest), "generator": "spectral"}
        with pytest.raises(OptionError, match=f"^max_params: expected at least {n_smallest:,}"):
            layout_of(spec, max_params=str(n_smallest - 1), generator="spectral")
    layout = layout_of(spec, **options)
    check_account(spec, layout)
    expected = {t.path: t.shape for t in spec.tensors if t.role == "lora_magnitude_vector"}
    groups = [group for group in layout.groups if any(t.path in expected for t in group.tensors)]
    assert {t.path: t.shape for group in groups for t in group.tensors} == expected
    assert {len(t.chunks) for group in groups for t in group.tensors} == {1}
    assert all(group.n_chunks == len(group.tensors) for group in groups)


@pytest.mark.parametrize(("method", "n_heads"), [("ia3", 3), ("prefix", 8), ("ffa", 8)])
def test_what_is_no_product_is_aligned_and_smaller_than_the_adapter(model_of, method, n_heads):
    spec = inspect(model_of("gemma3"), method)
    layout = layout_of(spec)
    assert (layout.generator, layout.n_circuits) == ("aligned", n_heads)
    check_account(spec, layout)
    assert layout.account.percent < 100
    with pytest.raises(OptionError, match=f"^generator: expected aligned, paper.*`method` {method}, "):
        layout_of(spec, generator="spectral")
    with pytest.raises(OptionError, match=r"^max_params: "):
        layout_of(spec, max_params="5000")


def test_scales_of_inputs_and_outputs_of_one_length_are_planned(tmp_path):
    """This GPT-2's c_proj has 32 outputs to scale in attention, and 32 inputs in the other block."""
    AutoModelForCausalLM.from_config(GPT2).save_pretrained(tmp_path)
    spec = inspect(tmp_path, "ia3", targets=("c_proj",))
    attached(spec)
    assert {tensor.shape for tensor in spec.tensors} == {(32, 1), (1, 32)}
    check_account(spec, layout_of(spec))


@pytest.mark.parametrize("method", METHODS)
def test_the_papers_generator_makes_every_kind(llama, method):
    spec = inspect(llama, method)
    layout = layout_of(spec, generator="paper", chunk_size=64)
    check_account(spec, layout)
    generator = make_generator(layout, 0)
    assert not any(bool(tensor.any()) for tensor in generator())
    torch.nn.init.normal_(generator.decoders[0].weights[-1])
    assert [tuple(tensor.shape) for tensor in generator()] == [tensor.shape for tensor in spec.tensors]
    assert all(bool(tensor.any()) for tensor in generator())


# Training and freezing


def planned(model: Path, out: Path, method: str) -> RunDirectory:
    without = {"circuits": None, "layers": None} if method in ("cayley", "qtha") else {"circuits": None}
    return plan(model, out, inspect={"method": method, "rank": RANKS.get(method, 3)}, **without)


@pytest.fixture(scope="module", params=METHODS)
def trained(request, llama, text_file, tmp_path_factory) -> RunDirectory:
    """Return a run of three steps with each kind of adapter."""
    run = planned(llama, tmp_path_factory.mktemp("trained") / "run", request.param)
    train(run, text_file, max_steps=3, lr=2e-2)
    return run


def test_three_steps_lower_the_loss_of_the_initial_adapter(trained, llama, text_file, tmp_path):
    method, result = trained.read(AdapterSpec).method, trained.read(TrainedGenerator).result
    start = train(planned(llama, tmp_path / "run", method), text_file, max_steps=1, lr=1e-12).result
    assert result.base_loss == start.base_loss
    assert result.eval_loss < start.eval_loss - 1e-3
    assert (abs(start.eval_loss - start.base_loss) < 1e-6) is (method != "prefix")


def test_frozen_tensors_are_the_live_models_and_the_generators(trained):
    spec, found = trained.read(AdapterSpec), tensors(trained)
    model, parameters = attached(spec)
    from_base = [tensor.path for tensor in spec.tensors if tensor.initial == "base"]
    kept = {name: array for name, array in arrays(trained).items() if name.startswith("initial.")}
    assert same_bits(kept, {f"initial.{path}": parameters[path].detach() for path in from_base})
    measured = trained.read(Measurement).probabilities  # none where there are no circuits
    probabilities = None if measured is None else load_file(trained.files.get(measured))["probabilities"]
    generated = decode_adapter(spec, trained.read(WeightLayout), arrays(trained), probabilities)
    for path, parameter in parameters.items():
        torch.testing.assert_close(found[path], generated[path], atol=1e-6, rtol=1e-6)
        assert not torch.equal(found[path], parameter.detach()), path
    set_adapter(parameters, found)
    probe = load_file(trained.files.get(trained.read(TrainedGenerator).probe))
    assert same_bits(record_probe(model, probe["input_ids"]), probe)


def freeze_with(run: RunDirectory, path: str, initial: torch.Tensor | None) -> None:
    """Freeze a run whose generator has another initial value of a tensor, or none."""
    changed = {name: array for name, array in arrays(run).items() if name != f"initial.{path}"}
    changed |= {} if initial is None else {f"initial.{path}": initial.contiguous()}
    arrays_file = run.files.put("{sha256}.safetensors", save(changed))
    forged = run.read(TrainedGenerator).model_copy(update={"arrays": arrays_file})
    context = PassContext(0, run.files, (run.read(AdapterSpec), run.read(WeightLayout), forged))
    FreezeAdapter().run(run.read(Measurement), context)


@pytest.mark.parametrize("trained", ["dora", "prefix"], indirect=True)
def test_freezing_refuses_other_initial_values(trained):
    path = trained.read(AdapterSpec).tensors[-1].path
    initial = arrays(trained)[f"initial.{path}"]
    freeze_with(trained, path, initial)
    for other in (initial + 1e-3, initial * float("nan")):
        with pytest.raises(DocumentError, match=f"^{path}: expected what the generator gives, found a diff"):
            freeze_with(trained, path, other)
    for place, other in ((path, initial[:-1]), (path, None), ("layers.9.prefix_key", initial)):
        with pytest.raises(DocumentError, match=f"^{place}: expected initial values of shape "):
            freeze_with(trained, place, other)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_training_ends_in_the_same_bits(gpt2, text_file, tmp_path, method, monkeypatch):
    options = {"max_steps": 4, "save_steps": 2}  # GPT-2 has dropout, which must be resumed too
    whole, halved = (planned(gpt2, tmp_path / name, method) for name in ("whole", "halved"))
    train(whole, text_file, **options)
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(halved, text_file, **options)
    monkeypatch.undo()
    train(halved, text_file, **options, resume=True)
    assert same_bits(tensors(whole), tensors(halved)) and same_bits(arrays(whole), arrays(halved))


def test_a_prefix_and_the_text_must_fit_the_context(gpt2, text_file, tmp_path):
    with pytest.raises(OptionError, match=r"^max_length: expected at most 509"):
        train(planned(gpt2, tmp_path / "run", "prefix"), text_file, max_steps=1, max_length=512)


@torch.no_grad()
def test_dora_on_rounded_weights_starts_as_the_base(llama):
    base = load_model(inspect(llama, "dora").base, keep_dtype=False).to(torch.bfloat16)
    expected = base.float()(input_ids=IDS).logits
    model = attach_adapter(base.to(torch.bfloat16), inspect(llama, "dora")).float()
    assert torch.allclose(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
