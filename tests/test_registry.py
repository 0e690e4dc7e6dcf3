"""Finding things by name, those that qpa brings and those that come from outside."""

from __future__ import annotations

import sys

import pytest

from qpa.errors import OptionError
from qpa.registry import Registry


@pytest.fixture
def registry() -> Registry[object]:
    return Registry("tool", {"join": "shlex:join", "late": "cmd:Cmd"})


def test_a_built_in_is_loaded_when_it_is_asked_for(registry, monkeypatch):
    monkeypatch.delitem(sys.modules, "cmd", raising=False)
    assert list(registry) == ["join", "late"] and "late" in registry
    assert "cmd" not in sys.modules
    assert registry["late"].__name__ == "Cmd"
    assert "cmd" in sys.modules


def test_what_is_added_from_outside_is_found_until_it_is_removed(registry):
    thing = object()
    registry.add("mine", thing)
    assert registry["mine"] is thing and list(registry) == ["join", "late", "mine"]
    registry.remove("mine")
    assert "mine" not in registry


@pytest.mark.parametrize("name", ["join", "mine"])
def test_a_name_that_is_taken_is_refused(registry, name):
    registry.add("mine", object())
    with pytest.raises(OptionError, match=f"tool: expected a name that is free, found {name}"):
        registry.add(name, object())


def test_a_built_in_cannot_be_removed(registry):
    with pytest.raises(OptionError, match="added from outside"):
        registry.remove("join")


def test_an_unknown_name_tells_the_known_ones_and_the_nearest(registry):
    with pytest.raises(OptionError, match=r"tool: expected join or late, found joni; did you mean join\?"):
        registry["joni"]
