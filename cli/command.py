"""A command: a function with a few options of its own, and the passes whose options it takes besides.

Nothing about a pass's option is repeated here: its name, old names, type, default and help are those of its
field (`qpa.pipeline.options`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from qpa.cli.flags import flag_of, with_flags
from qpa.cli.output import split_names

if TYPE_CHECKING:
    from qpa.pipeline.options import Option

Makers = Mapping[str, type[Any] | tuple[type[Any], ...]]
"""By parameter of a command's function, the class of which it gets an instance with the given options, or
several classes, of whose options it gets the given ones, as a dictionary by field."""


@dataclass(frozen=True)
class Command:
    """A command of qpa.

    Args:    function: its other parameters are options and arguments of its own, annotated for Typer; its
             name is the command's, and its docstring the help.
             examples: what help shows below the options.
             makers: imports the classes whose options the command takes, so that other commands do not.
    """

    function: Callable[..., None]
    examples: str
    makers: Callable[[], Makers] = dict

    @property
    def name(self) -> str:
        """Return the command's name."""
        return self.function.__name__

    def flags(self) -> dict[str, str]:
        """Return the flags of all options, by the field of a maker or the parameter of the function.

        Where several makers have a field of the same name, the flag of the first maker counts.
        """
        own = {
            name.strip("_"): flag_of(name)
            for name, hint in self._own_hints().items()
            if not _is_argument(hint)
        }
        options = [option for option in self.options() if not option.positional]
        return own | {option.field: _flag(option) for option in reversed(options)}

    def for_typer(self) -> typer.Typer:
        """Return a Typer application of this command alone, with the options derived from the fields."""

        def run(**given: Any) -> None:
            self._run(given)

        parameters = list(self._parameters())
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        vars(run)["__signature__"] = inspect.Signature(parameters)
        old_names = {old: option.name for option in self.options() for old in option.old_names}
        renamed = {flag_of(old)[2:]: flag_of(new)[2:] for old, new in old_names.items()}
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
        settings = {"token_normalize_func": lambda name: renamed.get(name, name)}
        help_ = inspect.getdoc(self.function)
        app.command(self.name, help=help_, epilog=self.examples, context_settings=settings)(run)
        return app

    def options(self) -> list[Option]:
        """Return the options of all makers, the first of each name, in the order of the fields."""
        found: dict[str, Option] = {}
        for maker in self.makers().values():
            for option in _options_of(maker):
                found.setdefault(option.name, option)
        return list(found.values())

    def _own_hints(self) -> dict[str, Any]:
        """Return the annotations of the function's own parameters, as Typer reads them."""
        makers = self.makers()
        classes = {maker.__name__: maker for maker in makers.values() if isinstance(maker, type)}
        hints = get_type_hints(self.function, localns=classes, include_extras=True)
        return {
            name: hints[name] for name in inspect.signature(self.function).parameters if name not in makers
        }

    def _parameters(self) -> Iterator[inspect.Parameter]:
        makers, hints, flags = self.makers(), self._own_hints(), self.flags()
        shown: set[str] = set()
        for name, parameter in inspect.signature(self.function).parameters.items():
            if name not in makers:
                yield parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
                continue
            for option in sorted(_options_of(makers[name]), key=lambda option: not option.is_required):
                if option.name not in shown:
                    yield _parameter(option, flags, is_needed=isinstance(makers[name], type))
                shown.add(option.name)

    def _run(self, given: Mapping[str, Any]) -> None:
        arguments = {name: given[name] for name in self._own_hints()}
        for name, maker in self.makers().items():
            values = {option.field: _value(option, given[option.name]) for option in _options_of(maker)}
            if isinstance(maker, type):
                arguments[name] = maker(**values)
            else:
                arguments[name] = {field: value for field, value in values.items() if value is not None}
        self.function(**arguments)


def _is_argument(hint: Any) -> bool:
    return any(isinstance(facts, typer.models.ArgumentInfo) for facts in get_args(hint)[1:])


def _options_of(maker: type[Any] | tuple[type[Any], ...]) -> Iterator[Option]:
    from qpa.pipeline.options import options_of

    for one in maker if isinstance(maker, tuple) else (maker,):
        yield from options_of(one)


def _parameter(option: Option, flags: Mapping[str, str], *, is_needed: bool) -> inspect.Parameter:
    """Return an option as a parameter for Typer.

    Args:    is_needed: whether the default stands for a value that is not given; otherwise None does.
    """
    kind: Any = str if option.kind is tuple else Path if option.is_path else option.kind
    default: Any = inspect.Parameter.empty if option.is_required else option.default
    if isinstance(default, tuple):
        default = ",".join(default)
    if default is True:
        default = False
    if not is_needed:
        default = None
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind | None if default is None else kind, _facts(option, flags, is_needed)],
    )


def _facts(option: Option, flags: Mapping[str, str], is_needed: bool) -> Any:
    """Return what Typer is to know of an option besides its type and default."""
    text = with_flags(option.default_text(), flags)
    shows: bool | str = text if text and (option.shown_default or not is_needed) else True
    help_ = with_flags(option.full_help(), flags)
    if option.positional:
        return typer.Argument(help=help_, show_default=shows)
    if option.default is True:
        help_ = f"Leave out: {help_[0].lower()}{help_[1:]}"
    panel = option.panel or None
    return typer.Option(_flag(option), help=help_, show_default=shows, rich_help_panel=panel)


def _flag(option: Option) -> str:
    """Return an option's flag; the flag of an option that is on by default switches it off."""
    return flag_of(f"no_{option.name}" if option.default is True else option.name)


def _value(option: Option, given: Any) -> Any:
    """Return the value of an option from what Typer read."""
    if given is None:
        return None
    if option.default is True:
        return not given
    if option.kind is tuple:
        return split_names(given)
    return str(given) if option.is_path else given
