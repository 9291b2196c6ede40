"""The states of a writable layer, and the transitions between them."""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class State(enum.Enum):
    """A state of a writable layer. It can be read in each but the last."""

    #: Opened for reading only.
    READ_ONLY = "read-only"
    #: Takes writes, discards, growth and collections.
    WRITABLE = "writable"
    #: Index and trailer are appended, or being appended. The seal can still be undone.
    SEALED = "sealed"
    #: Sealed for good: only the data file is open, and the sealed layer closes it.
    RETIRED = "retired"
    #: All files are closed.
    CLOSED = "closed"


#: The states that may follow a state.
TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.READ_ONLY: frozenset({State.CLOSED}),
        State.WRITABLE: frozenset({State.SEALED, State.CLOSED}),
        State.SEALED: frozenset({State.WRITABLE, State.RETIRED, State.CLOSED}),
        State.RETIRED: frozenset({State.CLOSED}),
        State.CLOSED: frozenset(),
    }
)
