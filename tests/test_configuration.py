"""A configuration file gives the passes their options, and says in which line it is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qpa.documents.manifest import FORMATS
from qpa.errors import ConfigurationError, OptionError
from qpa.passes.freeze_adapter import FreezeAdapter
from qpa.passes.inspect_model import InspectModel
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.train_generator import TrainGenerator
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.pipeline.configuration import MAKERS, Schema, read_configuration
from qpa.pipeline.configuration_template import template
from qpa.pipeline.options import options_of

WHOLE = """\
# A comment.
model: ./models/tiny
data: shakespeare.txt
out: runs/bard
seed: 3
plan:
  rank: 8
  targets: [q_proj, v_proj]
  target: fake_torino
  max_params: 5000
  spectrum: off
train:
  lr: 1e-3
  max_steps: 200
freeze:
export:
  lora:
  merged:
    dtype: bfloat16
    out: models/bard
verify:
  engine: peft,transformers
"""


DEFAULTS = TrainGenerator(("d",))


@pytest.fixture
def bard(tmp_path, monkeypatch):
    """Return a function that writes bard.yaml in the working directory and reads it."""
    monkeypatch.chdir(tmp_path)

    def read(text, *sets):
        Path("bard.yaml").write_text(text) if isinstance(text, str) else Path("bard.yaml").write_bytes(text)
        return read_configuration(Path("bard.yaml"), sets)

    return read


# What is read


def test_every_pass_gets_the_options_of_its_section(bard):
    whole = bard(WHOLE)
    assert whole.make(InspectModel) == InspectModel("./models/tiny", rank=8, targets=("q_proj", "v_proj"))
    assert whole.make(PlanLayout) == PlanLayout(max_params="5000", spectrum=False)
    assert whole.make(TranspileCircuit) == TranspileCircuit("fake_torino")
    assert whole.make(TrainGenerator) == TrainGenerator(data=("shakespeare.txt",), lr=1e-3, max_steps=200)
    assert whole.make(MeasureCircuit) == MeasureCircuit()
    assert whole.make(FreezeAdapter) == FreezeAdapter(data=("shakespeare.txt",))
    verify = VerifyAdapter("exported", engines=("peft", "transformers"))
    assert whole.make(VerifyAdapter, directory="exported") == verify
    assert (whole.out, whole.seed, whole.given_formats) == (Path("runs/bard"), 3, ("lora", "merged"))
    assert whole.make(FORMATS["merged"]) == FORMATS["merged"](dtype="bfloat16")
    assert whole.make(FORMATS["lora"]) == FORMATS["lora"]()
    assert whole.export_path("merged") == Path("models/bard")
    assert whole.export_path("lora") == Path("runs/bard/exports/lora")
    assert whole.export_path("compact") == Path("runs/bard/exports/compact/bard")


def test_what_must_be_given_may_stand_in_its_section_and_the_run_is_named_by_the_file(bard):
    found = bard("plan: {model: m}\ntrain: {data: d}\n")
    assert (found.make(InspectModel), found.make(TrainGenerator)) == (InspectModel("m"), DEFAULTS)
    assert (found.out, found.seed, found.given_formats) == (Path("runs/bard"), 0, None)


def test_set_counts_more_than_the_file(bard):
    sets = ("train.max_steps=7", "model=other", "plan.targets=[o_proj, up_proj]", "plan.rank=null")
    found = bard(WHOLE, *sets, "export.gguf.dtype=float16", "plan.share_inputs=false")
    assert found.make(TrainGenerator).max_steps == 7
    assert found.make(InspectModel) == InspectModel("other", targets=("o_proj", "up_proj"))
    assert found.make(PlanLayout).share_inputs is False
    assert found.given_formats == ("lora", "merged", "gguf")
    assert bard(WHOLE, "export=mlx, lora").given_formats == ("mlx", "lora")


@pytest.mark.parametrize(
    "text", ["export: lora,gguf", "export: [lora, gguf]", "export:\n  lora:\n  gguf: {}"]
)
def test_formats_are_names_or_have_options(bard, text):
    assert bard(text).given_formats == ("lora", "gguf")


def test_no_format_is_not_the_default_format(bard):
    assert (bard("export:").given_formats, bard("export: []").given_formats) == (None, ())


def test_trust_in_the_models_code_is_given_once(bard):
    found = bard("model: m\ndata: d\nplan: {trust_remote_code: true}\nverify: {trust_remote_code: false}")
    assert found.make(TrainGenerator).trust_remote_code and found.make(FORMATS["merged"]).trust_remote_code
    assert not found.make(VerifyAdapter, directory="x").trust_remote_code
    assert found.resolved(())["train.trust_remote_code"] is True


def test_a_byte_order_mark_and_other_line_ends_are_read(bard):
    assert bard(b"\xef\xbb\xbfmodel: m\r\nseed: 4\r\n").seed == 4


def test_every_option_is_resolved_with_its_default(bard):
    found = bard("model: m\ndata: d\nplan: {rank: 4}").resolved(("gguf",))
    assert found.keys() == {
        key for key in Schema().options if not key.startswith("export.") or key.startswith("export.gguf.")
    }
    assert (found["plan.rank"], found["plan.alpha"], found["train.batch_size"]) == (4, None, 8)
    assert (found["export.gguf.dtype"], found["out"], found["seed"]) == ("float32", "runs/bard", 0)


def test_every_option_of_every_pass_has_a_place_in_the_file():
    keys = Schema().options.keys()
    for name in MAKERS:
        left_out = {one.field for one in options_of(MAKERS[name]) if one.key not in keys}
        assert left_out <= {"directory", "resume", "basis"}  # where the basis of the plan is now


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\ntrain:\n  max_step: 3", "line 3: expected an option of train, found max_step; did you "
         "mean max_steps?"),
        ("plan:\n  max_steps: 3", "line 2: expected an option of plan, found max_steps; did you mean "
         "train.max_steps?"),
        ("max_steps: 3", "line 1: expected an option or a section, found max_steps; did you mean "
         "train.max_steps?"),
        ("trian:\n  max_steps: 3", "line 1: expected an option or a section, found trian; did you "
         "mean train?"),
        ("trian:", "line 1: expected an option or a section, found trian; did you mean train?"),
        ("seed: 1\nquux: 1", "line 2: expected an option or a section, found quux; qpa init prints all that "
         "there are"),
        ("line 0: a text\nline 1: of lines", "bard.yaml: expected a configuration file, found no option and "
         "no section in it; qpa init prints one"),
        ("train:\n  resume: true", "line 2: expected an option of train, found resume; qpa init prints all "
         "that there are"),
        ("train:\n  max_steps: many", "line 2, train.max_steps: expected a whole number of at least 1, found "
         "many"),
        ("train:\n  max_steps: 1.5", "line 2, train.max_steps: expected a whole number of at least "
         "1, found 1.5"),
        ("train:\n  max_steps: 0", "line 2, train.max_steps: expected a whole number of at least 1, found 0"),
        ("train:\n  lr: .nan", "line 2, train.lr: expected a number above 0 and up to 1e+06, found .nan"),
        ("train:\n  bf16: 1", "line 2, train.bf16: expected true or false, found 1"),
        ("train:\n  lr: [1, 2]", "line 2, train.lr: expected one value, found a list"),
        ("plan:\n  targets: [[a]]", "line 2, plan.targets: expected a list of names, found a list of other "
         "things"),
        ("plan:\n  method: lroa", "line 2, plan.method: expected lora, dora, ia3, prefix, ffa, "
         "cayley, cayley-shared or qtha, found lroa; did you mean lora?"),
        ("verify:\n  engine: [peft, vlm]", "line 2, verify.engine: expected peft, transformers, vllm, "
         "onnxruntime, onnxruntime-genai, llama.cpp or mlx, found vlm; did you mean vllm?"),
        ("train: 3", "line 1: expected options below train, found 3"),
        ("export: lroa", "line 1, export: expected lora, peft, merged, onnx, onnx-adapter, genai, "
         "gguf, mlx or compact, "
         "found lroa; did you mean lora?"),
        ("export:\n  - {lora: 1}", "line 1: expected a list of names, found a list of other things"),
        ("export:\n  lroa:", "line 2, export: expected lora, peft, merged, onnx, onnx-adapter, "
         "genai, gguf, mlx or "
         "compact, found lroa; did you mean lora?"),
        ("export:\n  lora: bfloat16", "line 2: expected options below lora, found bfloat16"),
        ("export:\n  gguf:\n    rank_pad: 8", "line 3: expected an option of export.gguf, found "
         "rank_pad; did "
         "you mean export.lora.rank_pad?"),
        ("seed: 1\nmodel: m\nseed: 2", "line 3: expected seed once, found it again; it is in line 1 already"),
        ("model: m\nplan:\n  model: n", "line 3: expected plan.model once, found it a second time, after "
         "bard.yaml, line 1"),
        ("model: m\ntrain:\n\tlr: 1", "line 3: expected spaces before a name, found a tab"),
        ("model: m\n  lr: 1", "line 2: expected YAML, found a syntax error (mapping values are not "
         "allowed here)"),
        ("model: [m", "line 1: expected YAML, found a syntax error (expected ',' or ']', but got "
         "'<stream end>')"),
        ("a: 1\n---\nb: 2", "line 2: expected YAML, found a syntax error (but found another document)"),
        ("just words", "line 1: expected names with values, such as model: .., found just words"),
        ("[a]: 1", "line 1: expected a name, found a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(bard, text, message):
    with pytest.raises(ConfigurationError) as caught:
        bard(text)
    assert str(caught.value).removeprefix("bard.yaml, ") == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("train.max_steps", "`set`: expected an option and a value, train.max_steps=200, found "
         "train.max_steps"),
        ("train.max_step=3", "`set`: expected an option of train, found max_step; did you mean max_steps?"),
        ("train.max_steps=x", "`set`, train.max_steps: expected a whole number of at least 1, found x"),
        ("plan.targets=[a", "`set` plan.targets, line 1: expected YAML, found a syntax error "
         "(expected ',' or "
         "']', but got '<stream end>')"),
    ],
)  # fmt: skip
def test_what_is_wrong_on_the_command_line_is_named_as_such(bard, given, message):
    with pytest.raises(ConfigurationError) as caught:
        bard("model: m", given)
    assert str(caught.value) == message


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"model: \xe9", b"model: \x00"])
def test_what_is_no_text_is_refused(bard, content):
    with pytest.raises(ConfigurationError, match=r"^bard.yaml.*: expected .*YAML"):
        bard(content)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="expected a configuration file, found no such file"):
        read_configuration(tmp_path / "none.yaml")
    with pytest.raises(ConfigurationError, match="expected a configuration file, found Is a directory"):
        read_configuration(tmp_path)


@pytest.mark.parametrize("text", ["", "train:\n  max_steps: 3\n", "data: d\nmodel:\n"])
def test_what_must_be_given_and_is_not_is_named(bard, text):
    found = bard(text)
    line = ", line 2" if "model" in text else ""
    with pytest.raises(ConfigurationError) as caught:
        found.make(InspectModel)
    assert str(caught.value) == f"bard.yaml{line}, model: expected a value, found none; give one: model: .."
    with pytest.raises(ConfigurationError, match="model: expected a value, found none"):
        found.resolved(())


def test_what_a_pass_refuses_is_named_with_its_line(bard):
    found = bard("model: m\nplan:\n  alpha: 2\n  method: ia3\n")
    error = OptionError("alpha", "no such option with `method` ia3", "2.0", "leave `alpha` out")
    with pytest.raises(ConfigurationError) as caught, found.locating_errors():
        raise error
    assert str(caught.value) == (
        "bard.yaml, line 3, plan.alpha: expected no such option with plan.method ia3, found 2.0; leave "
        "plan.alpha out"
    )
    with pytest.raises(OptionError, match=r"^/tmp/rank: "), found.locating_errors():
        raise OptionError("/tmp/rank", "a", "b")


# What qpa init prints


def test_the_template_has_every_option_and_is_read_back_as_the_defaults(bard):
    text = template({})
    assert [line for line in text.splitlines() if line and not line.lstrip().startswith("#")] == [
        *("model:", "data:", "plan:", "train:", "freeze:", "export:", "verify:", "report:", "generate:")
    ]
    found = bard(text.replace("model:\n", "model: m\n", 1).replace("data:\n", "data: d\n", 1))
    assert (found.make(InspectModel), found.make(TrainGenerator)) == (InspectModel("m"), DEFAULTS)
    assert found.given_formats is None
    with pytest.raises(ConfigurationError, match=r"bard.yaml, line \d, model: expected a value, found none"):
        bard(text).make(InspectModel)


def test_every_line_of_the_template_that_is_taken_up_is_valid_and_is_the_default(bard):
    schema = Schema()
    lines = template({}).splitlines()
    names = {one.name for one in schema.options.values()} | {*FORMATS}
    taken_up = [
        line.replace("# ", "", 1) if line.strip().removeprefix("# ").partition(":")[0] in names else line
        for line in lines
    ]
    found = bard("\n".join(taken_up).replace("\nmodel:", "\nmodel: m").replace("\ndata:", "\ndata: d"))
    assert found.given_formats == tuple(FORMATS)
    expected = {key: one.default for key, one in schema.options.items() if one.default is not None}
    assert found.values == expected | {"plan.model": "m", "train.data": ("d",)}


def test_the_template_shows_what_is_given(bard):
    given = {
        "plan.model": "a: b", "train.data": ("é.txt",), "train.lr": 1e-5, "plan.targets": ("q_proj", "no"),
        "train.bf16": True, "export.gguf.dtype": "float16", "plan.max_params": "5000", "out": "runs/x",
    }  # fmt: skip
    found = bard(template(given))
    assert found.values == given
    assert found.given_formats == ("gguf",)
    assert yaml.safe_load(template(given))["train"] == {"lr": 1e-5, "bf16": True}


def test_help_and_defaults_are_those_of_the_fields(bard):
    text = " ".join(template({}).replace("#", " ").split())
    for one in Schema().options.values():
        plain = replace(one, help=one.full_help().replace("`", "")).help
        assert " ".join(plain.replace("`", "").split()) in text.replace("`", "")
