"""A named state that changes only as a table says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import enum
    from collections.abc import Mapping

S = TypeVar("S", bound="enum.Enum")


class IllegalTransitionError(RuntimeError):
    """A bug: the table has no way from the present state to the wanted one."""


class StateOf(Generic[S]):
    """The state of the object ``name``. Not thread-safe: its owner changes it under a lock of its own."""

    __slots__ = ("_name", "_table", "now")

    def __init__(self, name: str, start: S, table: Mapping[S, frozenset[S]]) -> None:
        self.now = start
        self._name = name
        self._table = table

    def become(self, state: S) -> None:
        """Change to ``state``; nothing happens if it is the present one. Raises IllegalTransitionError."""
        if state is not self.now:  # without a call: it is on the way of each miss of the cache
            if state not in self._table[self.now]:
                self.check(state)
            self.now = state

    def check(self, state: S) -> None:
        """Raise IllegalTransitionError unless the present state may become ``state``, or is it."""
        if state is not self.now and state not in self._table[self.now]:
            raise IllegalTransitionError(f"{self._name}: no way from {self.now} to {state}")
