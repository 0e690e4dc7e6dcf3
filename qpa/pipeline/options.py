"""The options of passes, exporters and the bench; each is declared once, on the field that holds it.

    rank: int | None = option(None, help="Rank of the adapter.", at_least=1, shown_default="32")

From these facts follow the check of a value, a document's provenance, and the command line
(`qpa.cli.command`). Here and in all messages below `qpa.cli` an option is called by its field, in backticks
where it stands within a sentence: a Python caller typed no flag. The command line makes flags of these names.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cache
from numbers import Integral, Real
from typing import Any

from qpa.errors import OptionError, one_of, unknown_name

_FACTS = "option"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What is known of an option.

    Args:    field: name of the dataclass field, which error messages use.
             name: what users call it, as a flag and in a file, in words joined by underscores.
             section: the part of a configuration file that it belongs to.
             kind: the type of a value: bool, int, float, str, Path, or tuple for a list of names.
             default: the default of the field; None also where a value must be given.
             is_required: whether a value must be given.
             help: whole sentences for the user; `{choices}` stands for the list of choices.
             shown_default: what a default of None means, or a function that returns it.
             at_least, above, at_most: the bounds of a number, which must be finite even without `at_most`.
             unit: what a number counts, such as "tokens".
             choices: the values that are known, such as a registry, or a function that gives them; they are
             asked for only when they are needed.
             choice_words: a function that says in words what a choice is, for help.
             old_names: older names that are still understood.
             is_path: whether the value is a text with the path of a file or directory.
             panel: the heading below which help lists the option; "" for that of the class that declares
             it, its attribute `panel`, or else the common one.
             positional: whether the command line takes it by its place and not by its name.
             provenance: whether it can change the result, so that documents record it.
             in_file: whether a configuration file may give it.
    """

    field: str = ""
    name: str = ""
    section: str = ""
    kind: type = str
    default: Any = None
    is_required: bool = False
    help: str = ""
    shown_default: str | Callable[[], str] = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    unit: str = ""
    choices: Iterable[str] | Callable[[], Iterable[str]] = ()
    choice_words: Callable[[str], str] | None = None
    old_names: tuple[str, ...] = ()
    is_path: bool = False
    panel: str = ""
    positional: bool = False
    provenance: bool = True
    in_file: bool = True

    @property
    def key(self) -> str:
        """Return the option's place in a configuration file, such as "train.max_steps"."""
        return f"{self.section}.{self.name}" if self.section else self.name

    def known(self) -> tuple[str, ...]:
        """Return the choices; () where there are none to choose from."""
        return tuple(self.choices() if callable(self.choices) else self.choices)

    def full_help(self) -> str:
        """Return the help with its choices."""
        if "{choices}" not in self.help:
            return self.help
        return self.help.replace("{choices}", one_of([self._in_words(name) for name in self.known()]))

    def _in_words(self, choice: str) -> str:
        words = self.choice_words(choice) if self.choice_words else ""
        return f"{choice} ({words})" if words else choice

    def default_text(self) -> str:
        """Return the default as a user would write it, or what the absence of a value means; else ""."""
        if self.shown_default:
            return self.shown_default() if callable(self.shown_default) else self.shown_default
        if self.default is None or self.kind is bool:
            return ""
        return ",".join(self.default) if isinstance(self.default, tuple) else str(self.default)

    def check(self, value: object) -> None:
        """Check a value against the range or the choices; None means that no value was given.

        Raises:  OptionError: it is none of the choices, no number of this kind, or out of range.
        """
        if value is None:
            return
        if isinstance(value, str) and (known := self.known()) and value not in known:
            raise unknown_name(self.field, known, value)
        if self.kind in (int, float) and not self._holds(value):
            raise OptionError(self.field, self.range_words(), str(value))

    def _holds(self, value: object) -> bool:
        is_number = isinstance(value, Integral if self.kind is int else Real) and not isinstance(value, bool)
        if not is_number or not math.isfinite(number := typing.cast(float, value)):
            return False
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
        )

    def range_words(self) -> str:
        """Return in words what a number must be: "a whole number of at least 1"."""
        if self.unit:
            return f"{self._bounds().removeprefix('of ')} {self.unit}"
        if self.kind is int:
            return f"a whole number {self._bounds()}".rstrip()
        return f"{'a finite number' if self.at_most is None else 'a number'} {self._bounds()}".rstrip()

    def _bounds(self) -> str:
        if self.at_most is None:
            above = f"above {self.above:g}" if self.above is not None else ""
            return f"of at least {self.at_least:g}" if self.at_least is not None else above
        if self.above is not None:
            return f"above {self.above:g} and up to {self.at_most:g}"
        if self.at_least is not None:
            return f"from {self.at_least:g} to {self.at_most:g}"
        return f"of at most {self.at_most:g}"


def option(default: Any = dataclasses.MISSING, *, help: str, **facts: Any) -> Any:
    """Declare a field of a frozen dataclass as an option.

    Args:    default: the default of the field; it is left out where a value must be given.
             help: one or more whole sentences for the user.
             facts: other fields of `Option`; `field`, `kind` and `section` follow from the class.
    """
    return dataclasses.field(default=default, metadata={_FACTS: Option(help=help, **facts)})


def options_of(maker: type[Any]) -> tuple[Option, ...]:
    """Return the options of a dataclass, in the order of its fields.

    A field that is declared without `option` is an option too; only its type and its default are known. The
    section of all of them is the class attribute `section`, or else `name`.
    """
    return _options_of(typing.cast(Hashable, maker))


@cache
def _options_of(maker: Any) -> tuple[Option, ...]:
    section = getattr(maker, "section", getattr(maker, "name", maker.__name__))
    annotations = typing.get_type_hints(maker)
    return tuple(
        _completed(field, section, _panel(maker, field.name), annotations[field.name])
        for field in dataclasses.fields(maker)
    )


def _panel(maker: type[Any], name: str) -> str:
    """Return the attribute `panel` of the class that declares a field."""
    declaring = next(base for base in maker.__mro__ if name in vars(base).get("__annotations__", {}))
    return str(vars(declaring).get("panel", ""))


def check_options(maker: object) -> None:
    """Check the ranges and choices of all options of a pass or exporter.

    Raises:  OptionError: a value is out of range or no choice; the error names the field.
    """
    for option in options_of(type(maker)):
        option.check(getattr(maker, option.field))


def defaults_by_name(values: Mapping[str, object]) -> str:
    """Return in words the defaults that depend on a choice, the first without its name: "1; paper: 8"."""
    names: dict[object, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    first, *others = names
    return "; ".join([str(first), *(f"{', '.join(names[value])}: {value}" for value in others)])


def _completed(field: dataclasses.Field[Any], section: str, panel: str, annotation: Any) -> Option:
    facts: Option = field.metadata.get(_FACTS, Option())
    is_required = field.default is dataclasses.MISSING
    return dataclasses.replace(
        facts,
        field=field.name,
        name=facts.name or field.name,
        section=section,
        panel=facts.panel or panel,
        kind=_kind(annotation),
        default=None if is_required else field.default,
        is_required=is_required,
    )


def _kind(annotation: Any) -> type:
    """Return the type of a given value: int for `int | None`, and tuple for `tuple[str, ...]`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        annotation = parts[0] if len(parts) == 1 else object
    kind: type = typing.get_origin(annotation) or annotation
    return kind
