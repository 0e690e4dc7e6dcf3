"""The ONNX exporter: what onnxruntime computes from the file, with and without a past."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from qpa.documents import MANIFEST_PATH, read_manifest
from qpa.errors import ExportError, ModelError, OptionError
from qpa.exporters.directory import PROBE_FILE
from qpa.exporters.formats.onnx import ExportOnnx
from qpa.exporters.onnx import graph as onnx_graph
from qpa.exporters.onnx.adapted_model import put_adapter
from qpa.exporters.onnx.graph import trace_causal_lm, write_graph
from qpa.models.base_model import load_model
from qpa.models.probe import N_NEW, greedy_continuation
from qpa.passes.verify_adapter import VerifyAdapter
from tests.random_adapter import RandomAdapter, random_adapter
from tests.tiny_models import N_CONTEXT, tiny_gemma2, tiny_gpt2, tiny_gpt_neo, tiny_llama, tiny_qwen3

PROMPT = torch.arange(16) * 5 % 97 + 33
MODELS = {
    "llama": tiny_llama,
    "llama-tied": lambda path: tiny_llama(path, tied=True),
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "gpt2": tiny_gpt2,
}
TARGETS = {"llama-tied": ("q_proj", "v_proj", "down_proj", "lm_head")}
"""A merged head must not change the embedding it was tied to."""


@dataclass(frozen=True)
class Engine:
    """A graph in onnxruntime, fed as its inputs ask.

    Args:    adapter: made active in every run; None for none.
    """

    session: onnxruntime.InferenceSession
    adapter: Any = None

    @classmethod
    def open(cls, path: Path) -> Engine:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return cls(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))

    def empty_past(self, n_rows: int) -> list[np.ndarray]:
        inputs = [v for v in self.session.get_inputs() if v.name.startswith("past_key_values.")]
        return [np.zeros((n_rows, v.shape[1], 0, v.shape[3]), np.float32) for v in inputs]

    def step(self, tokens: np.ndarray, past: list[np.ndarray], mask: np.ndarray | None = None):
        """Return logits float32[rows, length, vocabulary] and the longer past."""
        n_past = past[0].shape[2]
        mask = np.ones((len(tokens), n_past + tokens.shape[1]), np.int64) if mask is None else mask
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, n_past:]
        feed = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        asked = [v.name for v in self.session.get_inputs()]
        feed = {name: feed[name] for name in feed if name in asked}
        names = [name for name in asked if name.startswith("past_key_values.")]
        run_options = onnxruntime.RunOptions()
        if self.adapter is not None:
            run_options.add_active_adapter(self.adapter)
        logits, *present = self.session.run(
            None, feed | dict(zip(names, past, strict=True)), run_options=run_options
        )
        return logits, present

    def logits(self, prompt: torch.Tensor) -> torch.Tensor:
        tokens = prompt.numpy()[None]
        return torch.from_numpy(self.step(tokens, self.empty_past(1))[0][0])

    def greedy(self, prompt: torch.Tensor) -> list[int]:
        """Return `N_NEW` tokens: the prompt at once, then one token at a time."""
        tokens, past, found = prompt.numpy()[None], self.empty_past(1), []
        for _ in range(N_NEW):
            logits, past = self.step(tokens, past)
            tokens = logits[:, -1:].argmax(axis=-1)
            found.append(int(tokens[0, 0]))
        return found


def live_logits(made: RandomAdapter, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        return made.live(input_ids=prompt[None]).logits[0]


def base_logits(made: RandomAdapter, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    with made.live.disable_adapter():
        return live_logits(made, prompt)


def live_greedy(made: RandomAdapter, prompt: torch.Tensor = PROMPT) -> list[int]:
    return greedy_continuation(made.live, prompt).tolist()


def base_greedy(made: RandomAdapter, prompt: torch.Tensor = PROMPT) -> list[int]:
    with made.live.disable_adapter():
        return live_greedy(made, prompt)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module", params=list(MODELS))
def exported(request, tmp_path_factory) -> tuple[RandomAdapter, Path]:
    """Return a rank-4 adapter with a scaling of 1.5, and its export."""
    path, model = tmp_path_factory.mktemp("exported"), MODELS[request.param]
    targets = TARGETS.get(request.param, ("all-linear",))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        made = random_adapter(model(path / "model"), path / "store", rank=4, alpha=6.0, targets=targets)
    ExportOnnx().emit(made.frozen, path / "out", made.context)
    return made, path / "out"


def test_onnxruntime_computes_what_the_live_model_does(exported):
    made, out = exported
    engine = Engine.open(out / "model.onnx")
    assert difference(engine.logits(PROMPT), live_logits(made)) <= 1e-4
    assert difference(engine.logits(PROMPT), base_logits(made)) > 1e-2
    assert engine.greedy(PROMPT) == live_greedy(made)
    assert base_greedy(made) != live_greedy(made)


def test_two_rows_of_other_lengths_are_each_what_they_are_alone(exported):
    made, out = exported
    engine = Engine.open(out / "model.onnx")
    rows = np.stack([PROMPT.numpy()[:11], np.pad(PROMPT.numpy()[5:13], (3, 0))])
    mask = np.ones((2, 11), np.int64)
    mask[1, :3] = 0
    logits, past = engine.step(rows, engine.empty_past(2), mask)
    for row, n_padding in ((0, 0), (1, 3)):
        expected = live_logits(made, torch.from_numpy(rows[row, n_padding:]))
        assert difference(torch.from_numpy(logits[row, n_padding:]), expected) <= 1e-4
    more = np.array([[7, 8, 9], [40, 41, 42]])
    logits, past = engine.step(more, past, np.pad(mask, ((0, 0), (0, 3)), constant_values=1))
    assert past[0].shape[2] == 14
    expected = live_logits(made, torch.from_numpy(np.concatenate([rows[1, 3:], more[1]])))[-3:]
    assert difference(torch.from_numpy(logits[1]), expected) <= 1e-4


def test_the_graph_names_its_inputs_as_optimum_does_and_says_nothing_of_this_machine(exported):
    made, out = exported
    model = onnx.load(out / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", onnx_graph.OPSET)]
    cache = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in cache)]
    assert [value.name for value in model.graph.input] == names
    assert [value.name for value in model.graph.output] == ["logits", *(f"present.{name}" for name in cache)]
    entries = [model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info]
    assert not any(entry.doc_string or len(entry.metadata_props) for entry in entries)
    here = [str(Path.cwd()), str(Path.home()), made.frozen.base.name_or_path, str(out.parent)]
    files = [path for path in out.iterdir() if path.suffix in (".json", ".onnx")]
    assert len(files) >= 4
    for path in files:
        content = path.read_bytes()
        assert not any(place.encode() in content for place in here if len(place) > 5), path


def test_the_files_are_those_of_the_manifest_and_load_in_transformers(exported):
    made, out = exported
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    listed = {entry.file for entry in read_manifest(out).files}
    assert files == listed | {MANIFEST_PATH}
    assert {"README.md", "config.json", "generation_config.json", "model.onnx", PROBE_FILE} < files
    assert AutoConfig.from_pretrained(out).model_type == made.frozen.base.model_type
    assert AutoTokenizer.from_pretrained(out).decode([72]) == AutoTokenizer.from_pretrained(
        made.frozen.base.name_or_path
    ).decode([72])


@pytest.fixture(scope="module")
def made(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    return random_adapter(gpt2, tmp_path_factory.mktemp("store"), rank=3)


@pytest.fixture(scope="module")
def once(made: RandomAdapter, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return the merged graph, traced once for the tests of what is around it, and its export."""
    traced, out = [], tmp_path_factory.mktemp("once") / "out"

    def trace(model: Any, **options: Any) -> Any:
        traced.append(trace_causal_lm(model, **options))
        return traced[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "trace_causal_lm", trace)
        ExportOnnx().emit(made.frozen, out, made.context)
    return traced[0], out


def test_the_same_adapter_gives_the_same_bytes_from_another_place(made, once, gpt2, tmp_path):
    moved, out = tmp_path / "moved", tmp_path / "deeper" / "other"
    shutil.copytree(gpt2, moved)
    ExportOnnx(model=str(moved)).emit(made.frozen, out, made.context)
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert Path(MANIFEST_PATH) in files
    for name in files:
        assert (once[1] / name).read_bytes() == (out / name).read_bytes(), name


def test_large_weights_go_to_a_file_of_their_own(made, once, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "EXTERNAL_DATA_BYTES", 1000)
    monkeypatch.setattr(onnx_graph, "trace_causal_lm", lambda model, **options: once[0])
    manifest = ExportOnnx().emit(made.frozen, tmp_path / "out", made.context)
    sizes = {entry.file: entry.n_bytes for entry in manifest.files}
    assert sizes["model.onnx"] < 100_000 < sizes["model.onnx.data"]
    (tmp_path / "out").rename(tmp_path / "moved")
    engine = Engine.open(tmp_path / "moved" / "model.onnx")
    assert difference(engine.logits(PROMPT), live_logits(made)) <= 1e-4


def test_the_cards_program_runs(made, once, capsys):
    card = (once[1] / "README.md").read_text()
    program = card.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(program.replace("path/to/this/directory", str(once[1])), names)
    prompt = torch.tensor(AutoTokenizer.from_pretrained(once[1])("Once upon a time")["input_ids"])
    assert names["tokens"][0, : len(prompt) + N_NEW].tolist() == [
        *prompt.tolist(),
        *live_greedy(made, prompt),
    ]
    assert capsys.readouterr().out.startswith("Once upon a time")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_another_type_is_refused(made, tmp_path, dtype):
    with pytest.raises(OptionError, match=r"^dtype: expected float32 with `format` onnx"):
        ExportOnnx(dtype=dtype).emit(made.frozen, tmp_path / "out", made.context)
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_refused(made, llama, tmp_path):
    with pytest.raises(ModelError, match="another config"):
        ExportOnnx(model=str(llama)).emit(made.frozen, tmp_path / "out", made.context)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_shape_are_refused(made):
    from qpa.adapters.frozen_arrays import FrozenArrays

    frozen = made.frozen
    model = load_model(frozen.base, keep_dtype=False)
    model.get_submodule(frozen.modules[0]).weight = torch.nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ModelError, match="expected a weight of shape"):
        put_adapter(model, FrozenArrays.open(frozen, made.context))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return an adapter for a GPT-Neo, whose masks are tables, with windows shorter than the prompt."""
    path = tmp_path_factory.mktemp("windowed")
    return random_adapter(tiny_gpt_neo(path / "model"), path / "store")


def test_a_mask_from_a_table_is_exported_with_its_window(windowed, tmp_path, monkeypatch):
    seen = []
    context = replace(windowed.context, progress=lambda *progress: seen.append(progress))
    ExportOnnx().emit(windowed.frozen, tmp_path / "out", context)
    assert seen == [("making the ONNX graph", 0, 1), ("making the ONNX graph", 1, 1)]
    engine = Engine.open(tmp_path / "out" / "model.onnx")
    expected = live_logits(windowed)
    assert difference(engine.logits(PROMPT), expected) <= 1e-4
    assert engine.greedy(PROMPT) == live_greedy(windowed)
    rows = np.stack([PROMPT.numpy(), PROMPT.numpy()[::-1]])
    logits, past = engine.step(rows[:, :9], engine.empty_past(2))
    assert difference(torch.from_numpy(logits[0]), expected[:9]) <= 1e-4
    logits, past = engine.step(rows[:, 9:], past)
    assert difference(torch.from_numpy(logits[0]), expected[9:]) <= 1e-4
    assert difference(torch.from_numpy(logits[1]), live_logits(windowed, PROMPT.flip(0))[9:]) <= 1e-4
    for module in windowed.live.modules():
        if getattr(module, "attention_type", None) == "local" and hasattr(module, "bias"):
            monkeypatch.setattr(module, "bias", torch.ones_like(module.bias).tril())
    assert difference(live_logits(windowed), expected) > 1e-2


def test_a_prefix_goes_before_a_mask_from_a_table(windowed, tmp_path):
    from transformers import DynamicCache

    model = load_model(windowed.frozen.base, keep_dtype=False)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 1, 2, 5, 32, generator=generator).unbind() for _ in range(4)]
    write_graph(trace_causal_lm(model, prefix=states), tmp_path / "model.onnx")
    engine = Engine.open(tmp_path / "model.onnx")
    with torch.no_grad():
        expected = model(input_ids=PROMPT[None], past_key_values=DynamicCache(states)).logits[0]
    logits, past = engine.step(PROMPT.numpy()[None, :9], engine.empty_past(1))
    assert difference(torch.from_numpy(logits[0]), expected[:9]) <= 1e-4
    logits, past = engine.step(PROMPT.numpy()[None, 9:], past)
    assert difference(torch.from_numpy(logits[0]), expected[9:]) <= 1e-4


def test_a_bias_from_a_table_is_exported(tmp_path):
    from transformers import MptConfig, MptForCausalLM

    shape = {"vocab_size": 160, "d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}
    model = MptForCausalLM(MptConfig(**shape, initializer_range=0.15)).eval()
    with torch.no_grad():
        expected = model(input_ids=PROMPT[None]).logits[0]
    write_graph(trace_causal_lm(model), tmp_path / "model.onnx")
    engine = Engine.open(tmp_path / "model.onnx")
    logits, past = engine.step(PROMPT.numpy()[None, :15], engine.empty_past(1))
    assert difference(torch.from_numpy(logits[0]), expected[:15]) <= 1e-4
    logits, past = engine.step(PROMPT.numpy()[None, 15:], past)
    assert difference(torch.from_numpy(logits[0]), expected[15:]) <= 1e-4


def test_a_table_that_no_layer_reads_bounds_nothing(windowed):
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    shape = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config = GPTBigCodeConfig(**shape, bos_token_id=0, eos_token_id=0)
    assert onnx_graph._context_of_tables(GPTBigCodeForCausalLM(config)) is None
    assert onnx_graph._context_of_tables(load_model(windowed.frozen.base, keep_dtype=False)) == N_CONTEXT


def test_lengths_that_grow_with_every_layer_are_refused(windowed, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_context_of_tables", lambda _: None)
    with pytest.raises(ExportError, match=r"^GPTNeoForCausalLM: .* found lengths that "):
        trace_causal_lm(load_model(windowed.frozen.base, keep_dtype=False))


def test_numbers_that_onnxruntime_does_not_multiply_are_refused():
    from transformers import FalconConfig, FalconForCausalLM

    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = FalconConfig(**shape, alibi=True)
    with pytest.raises(ExportError, match=r"^FalconForCausalLM: .* found bfloat16 "):
        trace_causal_lm(FalconForCausalLM(config).eval())


def test_a_model_without_keys_and_values_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ExportError, match=r"^MambaForCausalLM: expected a model "):
        trace_causal_lm(MambaForCausalLM(config).eval())


def test_what_the_tracer_says_is_one_line(made, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator\nTraceback: many lines")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"found RuntimeError: no such operator$") as caught:
        trace_causal_lm(load_model(made.frozen.base, keep_dtype=False))
    assert "\n" not in str(caught.value)


def test_the_config_is_the_merged_models(once):
    config = json.loads((once[1] / "config.json").read_text())
    assert config["dtype"] == "float32" and "_name_or_path" not in config


@pytest.mark.usefixtures("in_process")
def test_verify_asks_onnxruntime(once, made):
    (check,) = VerifyAdapter(directory=str(once[1])).run(read_manifest(once[1]), made.context).engines
    assert check.engine == "onnxruntime" and check.greedy_tokens_equal
    assert check.max_logit_difference < 1e-4 < 0.1 < check.max_base_difference


def test_the_tokenizer_says_nothing_of_how_it_was_loaded(once):
    config = json.loads((once[1] / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|endoftext|>"
    assert not {"is_local", "local_files_only", "name_or_path"} & config.keys()
