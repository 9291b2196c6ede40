"""Records the kernel's tracepoints of a block device, in a tracefs instance of its own.

Source: Documentation/trace/ftrace.rst, Documentation/trace/events.rst. Other users of tracefs are not disturbed.
"""

from __future__ import annotations

import itertools
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import DeviceError
from obdlab.system import abi

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

TRACEFS = Path("/sys/kernel/tracing")
_EVENTS = ("block_bio_queue", "block_rq_issue", "block_rq_complete")
#: Per processor: a hundred thousand events, tens of thousands of reads.
_BUFFER_KIB = 8192
_PREFIX = "obdlab-"
# Device numbers in trace filters are the kernel's dev_t: 12 bits major, 20 bits minor.
_MINOR_BITS = 20
_numbers = itertools.count()


class BlockTrace:
    """Records block events of the device ``node`` from ``with`` on, until :meth:`save` or the end.

    Raises DeviceError if ``node`` is not a block device. Entering raises it if the kernel has no such events, or this
    process is not root.
    """

    def __init__(self, node: Path) -> None:
        status = os.stat(node)
        if not stat.S_ISBLK(status.st_mode):
            raise DeviceError(f"{node}: not a block device, whose reads the kernel would tell")
        self._device = os.major(status.st_rdev) << _MINOR_BITS | os.minor(status.st_rdev)
        self._instance: Path | None = None
        # Descriptor of a private, unmounted tracefs, used where the host mounts none; the kernel drops it with this
        # process.
        self._tracefs = -1

    def __enter__(self) -> Self:
        root = self._open_tracefs()
        _remove_dead(root / "instances")
        self._instance = root / "instances" / f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        try:
            self._instance.mkdir()
            self._write("buffer_size_kb", str(_BUFFER_KIB))
            for event in _EVENTS:
                self._write(f"events/block/{event}/filter", f"dev == {self._device}")
                self._write(f"events/block/{event}/enable", "1")
        except OSError as error:
            self.__exit__(None, None, None)
            raise DeviceError(f"cannot listen to block events ({error.filename}: {error.strerror})") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._instance is not None:
            _remove(self._instance)
            self._instance = None
        if self._tracefs >= 0:
            os.close(self._tracefs)
            self._tracefs = -1

    def save(self, path: Path) -> int:
        """Stop recording and write the events to a file as text. Return the number of events lost to a full buffer.

        Raises DeviceError if the file cannot be written.
        """
        assert self._instance is not None
        try:
            self._write("tracing_on", "0")
            with open(self._instance / "trace", "rb") as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
            return sum(_lost(stats) for stats in self._instance.glob("per_cpu/cpu*/stats"))
        except OSError as error:
            raise DeviceError(f"{path}: cannot write block events ({error.strerror})") from error

    def _write(self, name: str, value: str) -> None:
        assert self._instance is not None
        (self._instance / name).write_text(value)

    def _open_tracefs(self) -> Path:
        if (TRACEFS / "instances").is_dir():
            return TRACEFS
        try:
            self._tracefs = abi.mount_detached("tracefs", {}, 0)
        except OSError as error:
            raise DeviceError(f"block events need the kernel's tracefs: {error.strerror}") from error
        return Path(f"/proc/self/fd/{self._tracefs}")


# Removes instances of processes that were killed.
def _remove_dead(instances: Path) -> None:
    for instance in instances.glob(f"{_PREFIX}*"):
        pid = instance.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            _remove(instance)


def _remove(instance: Path) -> None:
    with suppress(OSError):
        (instance / "events/enable").write_text("0")
    with suppress(OSError):
        instance.rmdir()


def _lost(stats: Path) -> int:
    fields = dict(line.split(": ", 1) for line in stats.read_text().splitlines() if ": " in line)
    return sum(int(fields.get(name, "0")) for name in ("overrun", "dropped events"))
