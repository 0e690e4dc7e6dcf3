"""A registry finds things of one sort by their names: adapter kinds, generators, sources, formats and others.

The things that qpa brings are listed as "module:attribute". Their module is loaded when a thing is asked for,
so that listing a sort costs nothing. A thing that a program adds from outside stays until it is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar, cast

from qpa.errors import OptionError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Find things of one sort by name.

    Args:    option: the option by which a user names a thing, for error messages; it also names the sort.
             built_in: the "module:attribute" of every thing, by its name, in the order of listings.
    Source:  ours.
    """

    def __init__(self, option: str, built_in: Mapping[str, str]) -> None:
        self.option = option
        self._places = dict(built_in)
        self._things: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, those of qpa first."""
        return iter(dict.fromkeys((*self._places, *self._things)))

    def __contains__(self, name: object) -> bool:
        """Return whether there is a thing of this name."""
        return name in self._places or name in self._things

    def __getitem__(self, name: str) -> T:
        """Return the thing of a name.

        Raises:  OptionError: there is none.
        """
        if name not in self:
            raise unknown_name(self.option, tuple(self), name)
        if name not in self._things:
            module, _, attribute = self._places[name].partition(":")
            self._things[name] = cast(T, getattr(import_module(module), attribute))
        return self._things[name]

    def added(self) -> tuple[str, ...]:
        """Return the names of the things that were added from outside."""
        return tuple(name for name in self._things if name not in self._places)

    def add(self, name: str, thing: T) -> None:
        """Add a thing from outside.

        Raises:  OptionError: the name is taken.
        """
        if name in self:
            raise OptionError(self.option, "a name that is free", name, "choose another name")
        self._things[name] = thing

    def remove(self, name: str) -> None:
        """Remove a thing that `add` added."""
        if name in self._places:
            raise OptionError(self.option, "a name that was added from outside", name)
        del self._things[name]
