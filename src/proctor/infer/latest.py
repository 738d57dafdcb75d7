"""What is made of a value once, while the same value comes again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


class Latest(Generic[_Given, _Made]):
    """Calls `make` unless it is given the very object that it was given last: a task's requests have one `Sampling`.

    A look-up by value would cost more than most of what is made here.
    """

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[_Given], _Made]) -> None:
        """`make` depends on nothing but its argument, which is immutable."""
        self._make = make
        self._made: tuple[_Given, _Made] | None = None

    def __call__(self, given: _Given) -> _Made:
        """What is made of `given`."""
        made = self._made
        if made is None or made[0] is not given:
            # Returned from here, not from `self`: another thread may be given something else meanwhile.
            made = self._made = given, self._make(given)
        return made[1]
