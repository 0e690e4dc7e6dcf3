"""An option is told once, on its field, and everything else follows from there."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer

from qpa.bench.setting import Extent, Setting
from qpa.cli.command import Command
from qpa.cli.flags import error_line, flag_of, with_flags
from qpa.cli.main import COMMANDS, main
from qpa.documents import PassOption
from qpa.documents.manifest import FORMATS
from qpa.errors import DirectoryError, ModelError, OptionError
from qpa.exporters.registry import FormatChoice
from qpa.passes.calibrate_basis import CalibrateBasis
from qpa.passes.explain_generator import ExplainGenerator
from qpa.passes.freeze_adapter import FreezeAdapter
from qpa.passes.inspect_model import InspectModel
from qpa.passes.measure_circuit import MeasureCircuit
from qpa.passes.plan_layout import PlanLayout
from qpa.passes.synthesize_circuit import SynthesizeCircuit
from qpa.passes.train_generator import TrainGenerator
from qpa.passes.transpile_circuit import TranspileCircuit
from qpa.passes.verify_adapter import VerifyAdapter
from qpa.pipeline.options import check_options, defaults_by_name, option, options_of
from qpa.pipeline.pass_protocol import PassContext
from qpa.registry import Registry
from qpa.store.run_directory import DirectoryStore
from qpa.training.continuation import ContinuePrompts
from qpa.training.data.data_options import DataOptions

EXPORTERS = tuple(FORMATS[name] for name in FORMATS)
TAKEN_BY: dict[str, tuple[type[Any], ...]] = {
    "basis": (InspectModel, CalibrateBasis),
    "plan": (InspectModel, PlanLayout, TranspileCircuit),
    "transpile": (TranspileCircuit,),
    "preview": (DataOptions,),
    "train": (TrainGenerator, MeasureCircuit, FreezeAdapter, TranspileCircuit),
    "freeze": (MeasureCircuit, FreezeAdapter, TranspileCircuit),
    "explain": (ExplainGenerator,),
    "export": (FormatChoice, *EXPORTERS),
    "verify": (VerifyAdapter,),
    "generate": (ContinuePrompts,),
    "report": (ContinuePrompts,),
    "bench": (Setting, Extent),
}
MAKERS = tuple(dict.fromkeys(maker for makers in TAKEN_BY.values() for maker in makers))
SHAPES = Registry("shape", {"round": "math:pi", "square": "math:e"})


@dataclass(frozen=True)
class Bake:
    """A pass that a program has made up."""

    name: ClassVar[str] = "bake"
    section: ClassVar[str] = "kitchen"
    requires: ClassVar[tuple[type[Any], ...]] = ()

    flour: str = option(help="Flour to take.")
    minutes: int = option(30, help="Minutes in the oven.", at_least=1)
    sugar: float | None = option(
        None, help="Sugar, in grams.", above=0, at_most=500, shown_default="as `flour`"
    )
    salt: float = option(0.5, help="Salt.", at_least=0, at_most=5)
    eggs: int = option(2, help="Eggs.", at_least=2, unit="eggs")
    heat: float = option(200.0, help="Heat of the oven.", above=0)
    shape: str = option(
        "round",
        help="One of {choices}.",
        choices=SHAPES,
        choice_words=lambda name: "with corners" if name == "square" else "",
        name="form",
        old_names=("shape",),
    )
    spices: tuple[str, ...] = option(("salt", "mace"), help="Spices, separated by commas.")
    tray: str | None = option(None, help="Where it goes.", is_path=True, provenance=False)
    cover: bool = option(True, help="Foil on top.")
    plain: int = 3


FIELDS = [field.name for field in fields(Bake)]


def facts(field: str) -> Any:
    return next(option for option in options_of(Bake) if option.field == field)


def test_facts_are_those_of_the_fields_in_their_order():
    assert [found.field for found in options_of(Bake)] == FIELDS
    assert [found.kind for found in options_of(Bake)] == [
        *(str, int, float, float, int, float, str, tuple, str, bool, int)
    ]
    assert (facts("flour").is_required, facts("minutes").is_required) == (True, False)
    assert (facts("minutes").default, facts("spices").default) == (30, ("salt", "mace"))
    assert (facts("shape").key, facts("minutes").key) == ("kitchen.form", "kitchen.minutes")
    assert facts("shape").full_help() == "One of round or square (with corners)."
    texts = {name: facts(name).default_text() for name in ("minutes", "sugar", "spices", "tray", "cover")}
    assert texts == {"minutes": "30", "sugar": "as `flour`", "spices": "salt,mace", "tray": "", "cover": ""}


def test_defaults_by_name_are_grouped_by_value():
    assert defaults_by_name({"a": 1, "b": 8, "c": 1, "d": 8, "e": 2}) == "1; b, d: 8; e: 2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"minutes": 0}, "minutes: expected a whole number of at least 1, found 0"),
        ({"minutes": 1.5}, "minutes: expected a whole number of at least 1, found 1.5"),
        ({"minutes": True}, "minutes: expected a whole number of at least 1, found True"),
        ({"minutes": "ten"}, "minutes: expected a whole number of at least 1, found ten"),
        ({"sugar": 0.0}, "sugar: expected a number above 0 and up to 500, found 0.0"),
        ({"sugar": 501}, "sugar: expected a number above 0 and up to 500, found 501"),
        ({"salt": -1.0}, "salt: expected a number from 0 to 5, found -1.0"),
        ({"salt": float("nan")}, "salt: expected a number from 0 to 5, found nan"),
        ({"eggs": 1}, "eggs: expected at least 2 eggs, found 1"),
        ({"heat": float("inf")}, "heat: expected a finite number above 0, found inf"),
        ({"shape": "flat"}, "shape: expected round or square, found flat"),
        ({"plain": "x"}, "plain: expected a whole number, found x"),
    ],
)
def test_what_is_out_of_range_is_named_by_its_field(given, message):
    with pytest.raises(OptionError) as caught:
        check_options(Bake("rye", **given))
    assert str(caught.value) == message


def test_what_is_in_range_passes_with_the_bounds_themselves():
    for given in ({}, {"sugar": 500.0}, {"salt": 0}, {"salt": 5.0}, {"minutes": 1}, {"shape": "square"}):
        check_options(Bake("rye", **given))


def test_a_heading_of_help_is_the_options_own_or_that_of_the_class_that_declares_it():
    found = {one.field: one.panel for one in options_of(TrainGenerator)}
    assert (found["data"], found["shots"], found["source"]) == (
        "Data",
        "Circuits and devices",
        "Circuits and devices",
    )
    assert (found["lr"], found["objective"], facts("minutes").panel) == ("Steps and rates", "", "")


def test_choices_may_be_added_from_outside():
    SHAPES.add("oval", 1.0)
    try:
        check_options(Bake("rye", shape="oval"))
        assert facts("shape").full_help() == "One of round, square (with corners) or oval."
    finally:
        SHAPES.remove("oval")


def test_provenance_has_every_option_but_those_that_change_nothing(tmp_path):
    recorded = PassContext(0, DirectoryStore(tmp_path)).provenance(Bake("rye", tray="x"), None).options
    assert [entry.name for entry in recorded] == [name for name in FIELDS if name != "tray"]
    assert recorded[:2] == (PassOption(name="flour", value="rye"), PassOption(name="minutes", value=30))


@pytest.mark.parametrize("maker", [*MAKERS, SynthesizeCircuit], ids=lambda m: m.__name__)
def test_every_option_of_qpa_says_what_it_is(maker):
    for found in options_of(maker):
        assert found.help.endswith("."), found.field
        assert found.section in TAKEN_BY
        assert not re.search(r"--\w", found.full_help() + found.default_text())


def test_every_pass_that_has_options_is_on_a_command():
    for path in (Path(__file__).parents[1] / "passes").glob("[a-z]*.py"):
        module = import_module(f"qpa.passes.{path.stem}")
        for thing in vars(module).values():
            if isinstance(thing, type) and thing.__module__ == module.__name__ and hasattr(thing, "produces"):
                assert is_dataclass(thing) and (thing in MAKERS or not options_of(thing))


@pytest.mark.parametrize("command", TAKEN_BY)
def test_every_option_of_every_pass_is_on_the_command_and_nothing_is_twice(command):
    flags = {
        flag
        for parameter in typer.main.get_command(COMMANDS[command].for_typer()).params
        if parameter.param_type_name == "option"
        for flag in parameter.opts
    }
    expected = {
        flag_of(f"no_{found.name}" if found.default is True else found.name)
        for maker in TAKEN_BY[command]
        for found in options_of(maker)
        if not found.positional
    }
    own = {flag_of(name) for name in ("out", "seed", "force", "select", "json", "static", "report", "beside")}
    own |= {flag_of(name) for name in ("prompt", "prompts", "export")}
    own |= {"--rows", "--set", "--objective"} if command == "preview" else set()
    own |= {"--basis"} if command == "verify" else set()
    own -= {"--seed"} if TAKEN_BY[command] == (ContinuePrompts,) else set()  # there it is a field
    assert expected <= flags
    assert flags - expected <= own
    assert not expected & own


@pytest.mark.parametrize("command", TAKEN_BY)
def test_help_shows_what_defaults_mean(command, monkeypatch, capsys):
    out = words(run_main(monkeypatch, capsys, command, "--help")[1])
    flags = COMMANDS[command].flags()
    by_name: dict[str, Any] = {}  # of two passes with an option of one name the first one's help is shown
    for maker in TAKEN_BY[command]:
        by_name = {found.name: found for found in options_of(maker)} | by_name
        for found in by_name.values():
            assert words(with_flags(found.full_help(), flags))[1:] in out
            if found.default is not False:
                assert words(with_flags(found.default_text(), flags)) in out


def words(text: str) -> str:
    """Return a text without white space and frames, which depend on the terminal's width."""
    return re.sub(r"[\s│]+", "", text)


def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["qpa", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_options_are_looked_up_without_heavy_packages():
    script = "import sys\nfrom qpa.cli.main import COMMANDS\n"
    script += "for command in COMMANDS.values(): command.for_typer(), command.flags()\n"
    script += "sys.exit(', '.join({'torch', 'transformers', 'qiskit', 'peft', 'onnx_ir'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


class Oven:
    """A command that keeps what it is given."""

    def __init__(self) -> None:
        self.baked: list[tuple[Bake, dict[str, Any], int]] = []
        self.command = Command(self.bake, "", lambda: {"recipe": Bake, "others": (Bake,)})

    def bake(self, recipe: Bake, others: dict[str, Any], times: int = 1) -> None:
        """Bake."""
        self.baked.append((recipe, others, times))

    def __call__(self, *arguments: str) -> tuple[Bake, dict[str, Any], int]:
        typer.main.get_command(self.command.for_typer())(list(arguments), standalone_mode=False)
        return self.baked.pop()


def test_of_two_fields_of_one_name_the_first_pass_has_the_flag():
    assert COMMANDS["train"].flags()["source"] == "--source"


def test_a_pass_from_outside_gets_its_options_from_the_command_line():
    oven = Oven()
    assert oven("--flour", "rye")[::2] == (Bake("rye"), 1)
    given = ["--flour", "rye", "--minutes", "5", "--sugar", "2.5", "--form", "square", "--spices", "a, b"]
    assert oven(*given, "--tray", "x", "--no-cover", "--times", "2")[::2] == (
        Bake("rye", 5, 2.5, shape="square", spices=("a", "b"), tray="x", cover=False),
        2,
    )
    assert oven("--flour", "rye", "--shape=square")[0] == Bake("rye", shape="square")


def test_of_several_classes_only_what_was_given_arrives():
    oven = Oven()
    oven.command = replace(oven.command, makers=lambda: {"recipe": (), "others": (Bake,)})
    assert oven()[1] == {}
    assert oven("--minutes", "5", "--spices", "a", "--no-cover")[1] == {
        "minutes": 5,
        "spices": ("a",),
        "cover": False,
    }


FLAGS = {"rank": "--rank", "angle_lr": "--angle-lr", "engines": "--engine", "out": "--out"}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OptionError("angle_lr", "1", "2"), "--angle-lr: expected 1, found 2"),
        (OptionError("engines", "`rank` 1", "2"), "--engine: expected --rank 1, found 2"),
        (
            ModelError("x", "a", "b", "lower `angle_lr` or `mood`"),
            "x: expected a, found b; lower --angle-lr or `mood`",
        ),
        (ModelError("rank", "a", "b"), "rank: expected a, found b"),
        (DirectoryError("out", "a new directory", "a file"), "out: expected a new directory, found a file"),
    ],
)
def test_the_command_line_makes_flags_of_fields(error, line):
    assert error_line(error, FLAGS) == line


def test_a_directory_is_not_taken_for_the_option_of_its_name(monkeypatch, capsys, tmp_path, llama):
    monkeypatch.chdir(tmp_path)
    Path("rank").write_text("a file")
    code, _, err = run_main(monkeypatch, capsys, "plan", "--model", str(llama), "--out", "rank")
    assert (code, err) == (1, "error: rank: expected a new directory, found a file\n")


def test_an_error_of_a_pass_names_the_field_in_python_and_the_flag_on_the_command_line(
    monkeypatch, capsys, tmp_path, llama
):
    context = PassContext(0, DirectoryStore(tmp_path))
    with pytest.raises(OptionError, match=r"^alpha: expected no such option with `method` ia3, found 2"):
        InspectModel(str(llama), method="ia3", alpha=2.0).run(None, context)
    given = ("--model", str(llama), "--method", "ia3", "--alpha", "2", "--out", str(tmp_path / "run"))
    assert run_main(monkeypatch, capsys, "plan", *given)[2] == (
        "error: --alpha: expected no such option with --method ia3, found 2.0; leave it out\n"
    )


def test_advice_may_name_the_options_of_another_command(monkeypatch, capsys, tmp_path):
    _, _, err = run_main(monkeypatch, capsys, "train", str(tmp_path / "none"), "--data", "x")
    assert err.endswith(f"make one: qpa plan --out {tmp_path / 'none'}\n")
