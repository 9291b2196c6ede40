"""Reporting the progress of long work to any observer."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager


class Task(Protocol):
    """One piece of work in progress."""

    def advance(self, amount: int) -> None:
        """Report that so many more bytes are done. May raise, to end the work."""


class Progress(Protocol):
    """Observer of work. Called from several threads."""

    def task(self, name: str, total: int) -> AbstractContextManager[Task]:
        """Report the start of ``total`` bytes of work; it ends with the ``with`` block."""


class Silent:
    """Ignores all reports."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Silent]:
        """Ignore the report."""
        yield self

    def advance(self, amount: int) -> None:
        """Ignore the report."""
