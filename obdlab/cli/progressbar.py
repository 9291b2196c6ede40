"""The one progress bar: on standard error, only if that is a terminal, and gone when the work ends."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tqdm import tqdm

    from obdlab.convert.progress import Task
    from obdlab.layerfiles.writing import Progress


@contextmanager
def shown_bar(
    title: str, total: float | None, *, unit: str = "B", quiet: bool = False, **more: Any
) -> Iterator[tqdm[Any]]:
    """Show a bar for the block. ``total`` is in units, bytes unless ``unit`` names others; None if it is unknown."""
    from tqdm import tqdm

    scale: dict[str, Any] = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
    # disable=None: no bar unless standard error is a terminal.
    with tqdm(
        total=total,
        desc=title,
        unit=unit,
        leave=False,
        disable=True if quiet else None,
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
