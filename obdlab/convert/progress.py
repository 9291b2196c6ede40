"""How long work tells how far it is, without knowing who watches."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager


class Task(Protocol):
    """One piece of work that is under way."""

    def advance(self, amount: int) -> None:
        """So many bytes more are done. May raise, to end the work."""


class Progress(Protocol):
    """Somebody who watches. Called from several threads."""

    def task(self, name: str, total: int) -> AbstractContextManager[Task]:
        """A piece of work of ``total`` bytes begins; it ends with the ``with`` block."""


class Silent:
    """Watches nothing."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Silent]:
        """Let the work go on."""
        yield self

    def advance(self, amount: int) -> None:
        """Let the work go on."""
