"""The control groups of an experiment: accounting of its processes, and limits of their disk.

``<name>/daemons`` holds containerd, snapshotters and device servers with all their children; ``ctr run`` puts
containers into ``<name>/<container>``. Version 1 and version 2 hierarchies differ only in the disk limits: version 1
limits each group separately and no buffered writes, version 2 limits all groups together and all writes.
(Kernel: Documentation/admin-guide/cgroup-v1/blkio-controller.rst, cgroup-v1/cpuacct.rst, cgroup-v2.rst.)
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.lab.testbed.process import LabError, run

if TYPE_CHECKING:
    from collections.abc import Iterable

_ROOT = Path("/sys/fs/cgroup")
_DAEMONS = "daemons"
# Duration of the test reads. A group may use the unused rest of its last slice at once: about 100 ms of reads.
_PROBE_S = 0.5
_PROBE_LEAST = 0.6
_PROBE_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Disk:
    """Limits of a disk, for reads and for writes separately; 0 is no limit."""

    iops: int = 0
    bytes_per_s: int = 0


#: By name in declarations. "cloud" is the DADI paper's cloud disk (section 5.1): 2,000 IOPS, 100 MB/s.
DISKS = {"native": Disk(), "cloud": Disk(2000, 100_000_000)}


class ControlGroups:
    """The control groups of one experiment."""

    def __init__(self, name: str, root: Path = _ROOT) -> None:
        self.name = name
        self.version = 2 if (root / "cgroup.controllers").exists() else 1
        self._hierarchies = [root] if self.version == 2 else [root / "cpuacct", root / "blkio"]
        self._limits: dict[str, str] = {}

    def create(self) -> None:
        """Make the groups. Raises LabError if this host does not allow it."""
        for hierarchy in self._hierarchies:
            if self.version == 2:
                # If the parent does not delegate a controller, the code that needs the controller raises the error.
                for directory in (hierarchy, hierarchy / self.name):
                    directory.mkdir(exist_ok=True)
                    for controller in ("cpu", "io"):
                        with suppress(OSError):
                            (directory / "cgroup.subtree_control").write_text(f"+{controller}")
            _make(hierarchy / self.name / _DAEMONS)

    def remove(self) -> None:
        """Remove the groups that hold no process."""
        for hierarchy in self._hierarchies:
            directory = hierarchy / self.name
            for path in (*directory.glob("*/"), directory):
                with suppress(OSError):
                    path.rmdir()

    def add(self, pid: int) -> None:
        """Move a process into the daemons' group; its later children follow. Raises LabError."""
        for hierarchy in self._hierarchies:
            _write(hierarchy / self.name / _DAEMONS / "cgroup.procs", str(pid))

    def cpu_s(self) -> float:
        """Return the processor time of all present and former processes of the groups, in seconds."""
        directory = self._hierarchies[0] / self.name
        if self.version == 1:
            return int((directory / "cpuacct.usage").read_text()) / 1e9
        fields = dict(line.split() for line in (directory / "cpu.stat").read_text().splitlines())
        return int(fields["usage_usec"]) / 1e6

    def pss_bytes(self) -> tuple[int, int]:
        """Return the proportional set sizes (proc(5), smaps_rollup) of daemons and of containers, in bytes."""
        directory = self._hierarchies[0] / self.name
        groups = [path for path in directory.glob("*/") if path.name != _DAEMONS]
        return _pss_below([directory / _DAEMONS]), _pss_below(groups)

    def mapped_files(self) -> set[Path]:
        """Return the programs and libraries that the daemons have mapped."""
        found: set[Path] = set()
        procs = self._hierarchies[0] / self.name / _DAEMONS / "cgroup.procs"
        for pid in procs.read_text().split():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
                # address perms offset dev inode path; only executable mappings: a database may be mapped too
                found |= {Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line and " r-xp " in line}
        return found

    def set_disk(self, disk: Disk, directory: Path) -> None:
        """Limit the disk that ``directory`` is on, for the daemons and for containers prepared from now on.

        Raises LabError if the kernel does not accept or does not enforce the limits.
        """
        if disk == Disk() and not self._limits:
            return  # works also without a block device below the directory
        self._limits = _limits(disk, whole_disk(directory), self.version)
        self._apply(_DAEMONS if self.version == 1 else "")
        if disk.iops:
            self._check(disk, directory)

    def prepare_container(self, name: str) -> None:
        """Make a container's group with the disk's limits, before the runtime looks for the group."""
        if self.version == 1 and self._limits:
            _make(self._hierarchies[1] / self.name / name)
            self._apply(name)

    def _apply(self, group: str) -> None:
        directory = self._hierarchies[-1] / self.name / group
        for file, value in self._limits.items():
            _write(directory / file, value)

    # The kernel may accept a limit and not enforce it (another I/O path, no throttling): test it with reads.
    def _check(self, disk: Disk, directory: Path) -> None:
        procs = self._hierarchies[-1] / self.name / _DAEMONS / "cgroup.procs"
        reads = max(50, int(disk.iops * _PROBE_S))
        with tempfile.NamedTemporaryFile(dir=directory, prefix="disk-check-") as file:
            file.write(os.urandom(reads * _PROBE_BLOCK))
            file.flush()
            os.fsync(file.fileno())
            script = f'echo $$ > "{procs}"; exec dd if="{file.name}" of=/dev/null bs={_PROBE_BLOCK} iflag=direct'
            began = time.monotonic()
            run(["sh", "-euc", script])
            took_s = time.monotonic() - began
        least_s = _PROBE_LEAST * reads / disk.iops
        if took_s < least_s:
            raise LabError(
                f"disk of {directory}: the kernel does not heed the limit of {disk.iops} IOPS "
                f"({reads} reads took {took_s:.3f} s, wanted at least {least_s:.3f} s)"
            )


def whole_disk(directory: Path) -> str:
    """Return "major:minor" of the whole disk that a directory is on (throttling knows no partitions).

    Raises LabError for a file system without one (tmpfs, overlay).
    """
    device = directory.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not block.exists():
        raise LabError(f"{directory}: on no disk (wanted to limit its speed)")
    block = block.resolve()
    whole = block if (block / "queue").is_dir() else block.parent
    return (whole / "dev").read_text().strip()


def _limits(disk: Disk, device: str, version: int) -> dict[str, str]:
    if version == 2:
        rate, count = disk.bytes_per_s or "max", disk.iops or "max"
        return {"io.max": f"{device} rbps={rate} wbps={rate} riops={count} wiops={count}"}
    values = {"bps": disk.bytes_per_s, "iops": disk.iops}  # 0 lifts a limit
    return {
        f"blkio.throttle.{way}_{kind}_device": f"{device} {value}"
        for way in ("read", "write")
        for kind, value in values.items()
    }


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"{directory}: no control group can be made: {error} (wanted root and cgroups)") from error


def _write(path: Path, value: str) -> None:
    try:
        path.write_text(value)
    except OSError as error:
        raise LabError(f"{path}: {error.strerror} (got {value!r}; is the controller there?)") from error


def _pss_below(groups: Iterable[Path]) -> int:
    total = 0
    for group in groups:
        with suppress(OSError):  # the container has just ended
            for pid in (group / "cgroup.procs").read_text().split():
                total += _pss(int(pid))
    return total


def _pss(pid: int) -> int:
    with suppress(OSError):  # the process has ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
