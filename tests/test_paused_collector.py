"""A paused garbage collector: off inside, as before afterwards, and it passes over what was there."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from qpa.cli.paused_collector import paused_collector


@pytest.fixture(autouse=True)
def _collector_as_before() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if was_on else gc.disable)()


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_off_inside_and_as_before_afterwards(was_on: bool) -> None:
    (gc.enable if was_on else gc.disable)()
    with paused_collector():
        assert not gc.isenabled()
    assert gc.isenabled() == was_on


def test_the_collector_is_as_before_after_an_error() -> None:
    gc.enable()
    with pytest.raises(ValueError, match="inside"), paused_collector():
        raise ValueError("inside")
    assert gc.isenabled()


def test_the_collector_passes_over_what_was_there() -> None:
    gc.unfreeze()
    with paused_collector():
        made: list[list[int]] = [[]]
    assert gc.get_freeze_count() > 0
    assert not any(each is made for each in gc.get_objects())
