"""Directories of recorded or watched starts, and of builds: below the run directory, while their maker runs."""

from __future__ import annotations

import os
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.system.pauses import wait_until
from obdlab.system.processes import Process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.server.rundir import RunDir

_KINDS = ("record", "watch", "build")
_MAKER = "maker"
# A maker ends its container, and waits for the trace.
_END_S = 40.0
# After the maker's death a guard ends the container, with the help of the directory's content.
_GUARD_S = 5.0
_LOOK_S = 0.05


@contextmanager
def place_for_start(run: RunDir, kind: str) -> Iterator[Path]:
    """Make a directory for a start, a "record" or a "watch", or for a "build", within ``with``.

    Its device has the directory's name; those of a build have it before a dot.
    """
    run.create()
    with tempfile.TemporaryDirectory(prefix=f"{kind}-", dir=run.path) as directory:
        place = Path(directory).resolve()
        me = Process.of(os.getpid())
        assert me is not None
        (place / _MAKER).write_text(f"{me.pid} {me.start_time}\n")
        yield place


def places_of_starts(run_path: Path) -> list[Path]:
    """Return the directories of starts, including those of killed makers."""
    found = [path for kind in _KINDS for path in sorted(run_path.glob(f"{kind}-*"))]
    return [path for path in found if (path / _MAKER).is_file()]


def maker_of(place: Path) -> Process | None:
    """Return the process that runs the start, or None if it is gone."""
    try:
        pid, start_time = (place / _MAKER).read_text().split()
        maker = Process(int(pid), int(start_time))
    except (OSError, ValueError):
        return None
    return maker if maker.alive else None


def end_start(place: Path, maker: Process) -> None:
    """Have the maker end the start cleanly, or kill it. Raises DeviceError if it survives that."""
    maker.signal(signal.SIGTERM)
    maker.end(_END_S)
    wait_until(
        lambda: not [*place.glob("container/state/*"), *place.glob("run/bundle/state/*")], _GUARD_S, look_s=_LOOK_S
    )
