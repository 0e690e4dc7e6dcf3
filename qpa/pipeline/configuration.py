"""A configuration: the options of all passes of a run, as one YAML file gives them.

    model: ./models/stories260K
    data: shakespeare.txt
    out: runs/bard
    train:
      max_steps: 200
    export: [lora, merged]

Rules:
1. The sections and names are those of the fields that declare the options (`qpa.pipeline.options`): nothing
   is repeated here, and an option that a pass gains is known at once.
2. Options that must be given stand at the top of the file, by their names alone; within their sections they
   are understood too.
3. `export` is a name, a list of names, or formats by name with their options.
4. Every value is checked when it is read; the error names file, line, and the nearest name that is known.
5. What the user allows for the plan, such as the model's own Python code, is allowed in all sections, unless
   one says otherwise.
6. Paths are relative to the working directory, as on the command line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from qpa.documents.base import OptionValue
from qpa.documents.manifest import FORMATS
from qpa.errors import ConfigurationError, OptionError
from qpa.pipeline.configuration_file import Given, read_tree, set_values
from qpa.pipeline.options import Option, option, options_of
from qpa.registry import Registry

M = TypeVar("M")

EXPORT = "export"
_PERMISSION = "trust_remote_code"
_AFTER_EXPORT = "verify-adapter"
MAKERS: Registry[type[Any]] = Registry(
    "pass",
    {
        "run": "qpa.pipeline.configuration:RunOptions",
        "inspect-model": "qpa.passes.inspect_model:InspectModel",
        "plan-layout": "qpa.passes.plan_layout:PlanLayout",
        "transpile-circuit": "qpa.passes.transpile_circuit:TranspileCircuit",
        "train-generator": "qpa.passes.train_generator:TrainGenerator",
        "measure-circuit": "qpa.passes.measure_circuit:MeasureCircuit",
        "freeze-adapter": "qpa.passes.freeze_adapter:FreezeAdapter",
        "verify-adapter": "qpa.passes.verify_adapter:VerifyAdapter",
        "report": "qpa.workflow.reporting:ReportOptions",
        "continue-prompts": "qpa.training.continuation:ContinuePrompts",
    },
)
"""What a configuration has options for, in the order of the file; exporters come before verify-adapter."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of the whole run, which have no section.

    Args:    out: the run directory; None is runs/ and the name of the configuration file.
             seed: of all passes.
    """

    section: ClassVar[str] = ""

    out: str | None = option(
        None,
        help="Run directory to make, or to go on with.",
        is_path=True,
        provenance=False,
        shown_default="runs/ and the name of this file",
    )
    seed: int = option(
        0, help="Draws lora_A, the angles, the order of the data, and all else that is random."
    )


def _known_options() -> dict[str, Option]:
    """Return all options that a file may give, by key, in the order of the file."""
    found: dict[str, Option] = {}
    for name in MAKERS:
        if name == _AFTER_EXPORT:
            found |= _options_of_formats()
        for one in options_of(MAKERS[name]):
            if one.in_file and not one.positional:
                found.setdefault(one.key, one)
    return found


def _options_of_formats() -> dict[str, Option]:
    found: dict[str, Option] = {}
    for format_ in FORMATS:
        is_file = FORMATS[format_].is_file
        found[f"{EXPORT}.{format_}.out"] = Option(
            field="out",
            name="out",
            section=EXPORT,
            help=f"{'File' if is_file else 'Directory'} to make.",
            is_path=True,
            shown_default=f"exports/{format_}{'/ and the name of the run,' if is_file else ''} in the run",
            provenance=False,
        )
        for one in options_of(cast(type[Any], FORMATS[format_])):
            found[f"{EXPORT}.{format_}.{one.name}"] = one
    return found


class Schema:
    """The options that a file may give, and the names by which it may call them.

    Args:    options: by key, such as "train.max_steps".
             keys: the key of every spelling: of the key itself, of older names, and of the name alone of an
             option that must be given.
    """

    def __init__(self) -> None:
        self.options = _known_options()
        self.keys = {key: key for key in self.options}
        for key, one in self.options.items():
            section = key.rpartition(".")[0]
            self.keys |= {f"{section}.{old}": key for old in one.old_names}
            if one.is_required:
                self.keys.setdefault(one.name, key)
        self.sections = tuple(dict.fromkeys(key.partition(".")[0] for key in self.options if "." in key))

    def top(self) -> tuple[str, ...]:
        """Return the keys of what stands at the top: options that must be given, and those of the run."""
        of_run = [key for key in self.options if "." not in key]
        return (*(key for key, one in self.options.items() if one.is_required), *of_run)

    def unknown(self, given: Given) -> ConfigurationError:
        """Return the error for a name that nothing has, with the nearest one that is known."""
        *above, name = given.path
        expected = f"an option of {'.'.join(above)}" if above else "an option or a section"
        near = self._nearest(given)
        advice = f"did you mean {near}?" if near else "qpa init prints all that there are"
        return ConfigurationError(given.place, expected, name, advice)

    def is_foreign(self, given: Sequence[Given]) -> bool:
        """Return whether a file is no configuration: no name at its top is known, or the first nearly so."""
        top = [one for one in given if len(one.path) == 1]
        known = {EXPORT, *self.sections, *self.keys}
        return bool(top) and not any(one.path[0] in known for one in top) and not self._nearest(top[0])

    def _nearest(self, given: Given) -> str:
        """Return the known name that is nearest to an unknown one; "" for none."""
        *above, name = given.path
        section = ".".join(above)
        inside = (
            [key[len(section) + 1 :] for key in self.keys if key.startswith(f"{section}.")] if above else []
        )
        if not above:
            inside = [key for key in self.keys if "." not in key] + [*self.sections]
        elsewhere = {key.rpartition(".")[2]: key for key in reversed(self.keys)}
        near = [elsewhere[name]] if name in elsewhere else []
        near = near or difflib.get_close_matches(name, [one for one in inside if "." not in one], n=1)
        near = near or [elsewhere[word] for word in difflib.get_close_matches(name, elsewhere, n=1)]
        return near[0] if near else ""


@dataclass(frozen=True)
class Configuration:
    """The options of a run.

    Args:    path: the file they are from.
             values: those that were given, by key, checked.
             places: where each of them stands, for errors, by key.
             given_formats: the formats to export; None where the file does not say.
    """

    path: Path
    values: Mapping[str, OptionValue]
    places: Mapping[str, str]
    given_formats: tuple[str, ...] | None

    @property
    def out(self) -> Path:
        """Return the run directory."""
        out = self.values.get("out")
        return Path("runs", self.path.stem) if out is None else Path(str(out))

    @property
    def seed(self) -> int:
        """Return the seed of the run."""
        return self.make(RunOptions).seed

    def make(self, maker: type[M], **others: object) -> M:
        """Return an instance of a pass or an exporter, with the options of its section.

        Args:    others: fields that no file gives.
        Raises:  ConfigurationError: an option that must be given is missing.
        """
        for one in options_of(maker):
            key = self._key(maker, one)
            if one.field in others or not self._has(key):
                continue
            others[one.field] = self.values[key] if key in self.values else self._permission(one)
        missing = [one for one in options_of(maker) if one.is_required and one.field not in others]
        if missing:
            self._refuse_without(missing[0])
        return maker(**others)

    def place_of(self, key: str) -> str:
        """Return where an option stands, for an error: "bard.yaml, line 7, train.max_steps"."""
        return self.places.get(key, f"{self.path}, {key}")

    def export_path(self, format_: str) -> Path:
        """Return the directory of the export in a format, or its file, which is called as the run is."""
        given = self.values.get(f"{EXPORT}.{format_}.out")
        if given is not None:
            return Path(str(given))
        place = self.out / "exports" / format_
        return place / self.out.absolute().name if FORMATS[format_].is_file else place

    def resolved(self, formats: Sequence[str]) -> dict[str, OptionValue]:
        """Return the value of every option, by key, those with a default included.

        Args:    formats: of which the options are wanted.
        Raises:  ConfigurationError: an option that must be given is missing.
        """
        found: dict[str, OptionValue] = {}
        for key, one in _schema().options.items():
            section, _, rest = key.partition(".")
            if section == EXPORT and rest.rpartition(".")[0] not in formats:
                continue
            if one.is_required and key not in self.values:
                self._refuse_without(one)
            default = self._permission(one) if one.name == _PERMISSION else one.default
            found[key] = self.values.get(key, default)
        return found | {"out": str(self.out)}

    @contextmanager
    def locating_errors(self) -> Iterator[None]:
        """Name in errors about options the lines where these stand, where the file has them.

        Raises:  ConfigurationError: in place of an error about an option, with the options called as in the
                 file.
        """
        try:
            yield
        except OptionError as error:
            key = self._keys_by_field.get(error.subject)
            if type(error) is not OptionError or key is None:
                raise
            parts = (self._with_keys(text) for text in (error.expected, error.found, error.advice))
            raise ConfigurationError(self.place_of(key), *parts) from error

    @cached_property
    def _keys_by_field(self) -> dict[str, str]:
        """Return the key of an option's field; of several the one that was given, or else the first."""
        schema = _schema().options
        ordered = sorted(schema, key=lambda key: key not in self.values)
        return {schema[key].field: key for key in reversed(ordered)}

    def _with_keys(self, text: str) -> str:
        return re.sub(r"`(\w+)`", lambda name: self._keys_by_field.get(name[1], name[1]), text)

    def _key(self, maker: type[Any], one: Option) -> str:
        return f"{EXPORT}.{maker.name}.{one.name}" if one.section == EXPORT else one.key.lstrip(".")

    def _has(self, key: str) -> bool:
        return key in self.values or (key.rpartition(".")[2] == _PERMISSION)

    def _permission(self, one: Option) -> OptionValue:
        return self.values.get(f"plan.{_PERMISSION}", cast(OptionValue, one.default))

    def _refuse_without(self, one: Option) -> None:
        place = self.places.get(one.key, f"{self.path}, {one.name}")
        raise ConfigurationError(place, "a value", "none", f"give one: {one.name}: ..")


def read_configuration(path: Path, sets: Sequence[str] = ()) -> Configuration:
    """Read a configuration file, or the resolved one that a run keeps.

    Args:    sets: further options, which count more than those of the file, such as "train.max_steps=200".
    Raises:  ConfigurationError: the file cannot be read, or is no YAML; a name is unknown or there twice; a
             value is of another type, out of range, or none of the choices.
             DocumentError: the resolved configuration of a run is damaged.
    """
    reader = _Reader(path, _schema())
    given = read_tree(path)
    if reader.schema.is_foreign(given):
        found, advice = "no option and no section in it", "qpa init prints one"
        raise ConfigurationError(str(path), "a configuration file", found, advice)
    reader.take(given, unique=True)
    reader.take(set_values(sets), unique=False)
    return reader.configuration()


def given_values(sets: Sequence[str]) -> Mapping[str, OptionValue]:
    """Return the values, by key, of texts such as "train.max_steps=200", checked.

    Raises:  ConfigurationError: see `read_configuration`.
    """
    reader = _Reader(Path(), _schema())
    reader.take(set_values(sets), unique=False)
    return reader.values


class _Reader:
    """Collects what a file and `set` give."""

    def __init__(self, path: Path, schema: Schema) -> None:
        self.path, self.schema = path, schema
        self.values: dict[str, OptionValue] = {}
        self.places: dict[str, str] = {}
        self.formats: tuple[str, ...] | None = None

    def configuration(self) -> Configuration:
        return Configuration(self.path, self.values, self.places, self.formats)

    def take(self, given: Sequence[Given], *, unique: bool) -> None:
        """Add values; with `unique` no two of them may be of one option."""
        seen: dict[str, Given] = {}
        for one in given:
            if one.path[0] == EXPORT and len(one.path) < 3:
                self._take_formats(one)
                continue
            if len(one.path) == 1 and one.path[0] in self.schema.sections:
                if not (one.has_parts or one.is_null):
                    raise ConfigurationError(one.place, f"options below {one.path[0]}", one.words())
                continue
            key = self.schema.keys.get(".".join(one.path))
            if key is None:
                raise self.schema.unknown(one)
            if unique and key in seen:
                expected, found = f"{key} once", f"it a second time, after {seen[key].place}"
                raise ConfigurationError(one.place, expected, found)
            seen[key] = one
            if one.path[0] == EXPORT:
                self._add_format(one.path[1])
            self._take(key, one)

    def _take(self, key: str, given: Given) -> None:
        facts = self.schema.options[key]
        place = f"{given.place}, {key if len(given.path) > 1 else given.path[0]}"
        self.places[key] = place
        value = given.value_for(facts, place)
        if value is None:  # as if it were not there
            self.values.pop(key, None)
            return
        try:
            for name in value if isinstance(value, tuple) and facts.known() else (value,):
                facts.check(name)
        except OptionError as error:
            raise ConfigurationError(place, error.expected, error.found, error.advice) from error
        self.values[key] = value

    def _take_formats(self, given: Given) -> None:
        """Take what stands directly behind or below `export`: formats, with or without options."""
        if len(given.path) == 2:
            self._check_format(given.path[1], given.place)
            if not (given.has_parts or given.is_null):
                raise ConfigurationError(given.place, f"options below {given.path[1]}", given.words())
            self._add_format(given.path[1])
        elif given.has_parts:
            self.formats = ()
        elif not given.is_null:
            names = given.value_for(Option(field=EXPORT, kind=tuple), given.place)
            assert isinstance(names, tuple)
            for name in names:
                self._check_format(name, given.place)
            self.formats = tuple(dict.fromkeys(names))

    def _add_format(self, name: str) -> None:
        self.formats = tuple(dict.fromkeys((*(self.formats or ()), name)))

    def _check_format(self, name: str, place: str) -> None:
        try:
            FORMATS[name]
        except OptionError as error:
            raise ConfigurationError(
                f"{place}, {EXPORT}", error.expected, error.found, error.advice
            ) from error


def _schema() -> Schema:
    return Schema()
