"""The one progress bar: on standard error, only if that is a terminal, and gone when the work ends."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.convert.progress import Task
    from obdlab.layerfiles.writing import Progress


class Bar(Protocol):
    """A bar, as tqdm has it: ``n`` of ``total`` units are done."""

    n: Any
    total: Any

    def update(self, amount: float, /) -> object:
        """Add to the units that are done."""

    def refresh(self) -> object:
        """Show it as it is."""

    def set_description(self, text: str, refresh: bool = ...) -> object:
        """Change the title."""

    def set_postfix(self, **values: Any) -> object:
        """Show values behind it."""

    def write(self, text: str, file: Any = ...) -> object:
        """Print a line above it."""


class _Hidden:
    # A bar that no one sees. Importing tqdm takes longer than some commands do.
    def __init__(self, total: float | None) -> None:
        self.n: float = 0
        self.total = total

    def update(self, amount: float) -> None:
        self.n += amount

    def refresh(self) -> None:
        pass

    def set_description(self, text: str, refresh: bool = True) -> None:
        pass

    def set_postfix(self, **values: Any) -> None:
        pass

    def write(self, text: str, file: Any = None) -> None:
        print(text, file=file)


@contextmanager
def shown_bar(title: str, total: float | None, *, unit: str = "B", quiet: bool = False, **more: Any) -> Iterator[Bar]:
    """Show a bar for the block. ``total`` is in units, bytes unless ``unit`` names others; None if it is unknown."""
    if quiet or not sys.stderr.isatty():
        yield _Hidden(total)
        return
    from tqdm import tqdm

    scale: dict[str, Any] = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
    with tqdm(
        total=total,
        desc=title,
        unit=unit,
        leave=False,
        file=sys.stderr,
        **scale,
        **more,
    ) as bar:
        yield bar


@contextmanager
def progress_bar(title: str, total: int, *, quiet: bool) -> Iterator[Progress]:
    """Show bytes done, for the block; gives the function that adds some."""
    with shown_bar(title, total, quiet=quiet) as bar:
        yield bar.update


class Bars:
    """The observer of work that has several tasks: one bar for each that is under way."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        """Show a bar for one task, for the block."""
        with shown_bar(name, total, quiet=self._quiet) as bar:
            yield _Task(bar.update)


class _Task:
    def __init__(self, update: Callable[[int], object]) -> None:
        self._update = update

    def advance(self, amount: int) -> None:
        self._update(amount)
