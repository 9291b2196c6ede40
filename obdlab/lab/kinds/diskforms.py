"""The forms in which an image's files can lie on a host's disk: ext4 on a loop device, EROFS as a file, compressed.

No server, no container: one tree, the same for all forms, mounted read-only. Each point mounts its form with an empty
page cache, does its work twice (nothing cached, then all that fits), and unmounts it. The work runs in a control
group with the disk's limits. ``cached_mib`` is the growth of the machine's page cache by the first of both: a form
that is cached twice, as file and as device, shows here.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from obdlab.devices import loop
from obdlab.lab.baselines.file import PlainLoop
from obdlab.lab.images.ocilayout import OciLayout
from obdlab.lab.images.rootfs import unpack_image
from obdlab.lab.kinds.kind import Kind, Metric
from obdlab.lab.testbed.cgroups import DISKS, ControlGroups
from obdlab.lab.testbed.coldness import drop_page_cache
from obdlab.lab.testbed.process import LabError, run
from obdlab.system import abi, mount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from obdlab.lab.kinds.kind import Place, Point, Value

_MAKE_TIMEOUT_S = 1800.0
_WORK_TIMEOUT_S = 900.0
# Files large enough that reads at random places are reads of the form, not of its tables.
_LARGE = 1 << 20
_MOST_FILES = 40
_READ = 4096


@dataclass(frozen=True, slots=True)
class Form:
    """One form: the file that is made of the tree, and how that is mounted.

    ``make`` are options of mkfs.erofs; None stands for ext4. Without ``loop`` the kernel reads the file itself.
    """

    make: tuple[str, ...] | None = None
    loop: bool = True
    direct_io: bool = True
    sector_size: int = abi.SECTOR

    @property
    def file(self) -> str:
        """The name of the file, which forms that differ in their mount share."""
        return "ext4" if self.make is None else "erofs" + "".join(self.make)


#: By name in declarations. "ext4-direct" is the form that devices graduate to.
FORMS = {
    "ext4-direct": Form(),
    "ext4-direct-4k": Form(sector_size=4096),
    "ext4-buffered": Form(direct_io=False),
    "erofs-loop": Form(make=()),
    "erofs-file": Form(make=(), loop=False),
    "erofs-lz4": Form(make=("-zlz4",), loop=False),
    "erofs-lz4-64k": Form(make=("-zlz4", "-C65536"), loop=False),
    "erofs-lz4hc": Form(make=("-zlz4hc",), loop=False),
    "erofs-zstd": Form(make=("-zzstd", "-C65536"), loop=False),
}
_WORKS = ("du", "tar", "read")


class Forms(Kind):
    """The tree is that of an image's layers over each other."""

    name: ClassVar[str] = "forms"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {
        "form": tuple(FORMS),
        #: All metadata, all data, or 4 KiB at random places of the largest files, one after the other.
        "work": _WORKS,
        #: Names of disks (``obdlab.lab.testbed.cgroups.DISKS``).
        "disk": ("native", "cloud"),
    }
    options: ClassVar[Mapping[str, Value]] = {"image": "pydata", "reads": 2000}
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("dropped_s", "s"),
        Metric("warm_s", "s"),
        Metric("cached_mib", "MiB"),
        Metric("file_mib", "MiB"),
        Metric("make_s", "s"),
    )
    programs: ClassVar[Mapping[str, str]] = {"fio": "fio", "mkfs.erofs": "erofs-utils", "mkfs.ext4": "e2fsprogs"}

    def point_s(self, options: Mapping[str, Value]) -> float:
        """Return the time of both works, mount and drop included."""
        return 4.0 + 2 * int(options["reads"]) / 2000

    @contextmanager
    def bench(self, options: Mapping[str, Value], place: Place) -> Iterator[Callable[[Point], dict[str, float]]]:
        """Unpack the tree. A form's file is made at the first point that needs it."""
        tree = place.work / "tree"
        unpack_image(OciLayout(place.images[str(options["image"])]), tree)
        groups = ControlGroups(f"obdlab-forms-{os.getpid()}")
        bench = _Bench(place.work, tree, groups, int(options["reads"]))
        with ExitStack() as stack:
            stack.callback(groups.remove)
            groups.create()
            yield bench.measure


class _Bench:
    def __init__(self, work: Path, tree: Path, groups: ControlGroups, reads: int) -> None:
        self._directory = work
        self._tree = tree
        self._groups = groups
        self._reads = reads
        self._made: dict[str, float] = {}
        self._target = work / "mounted"
        self._target.mkdir()
        sizes = {path: path.lstat().st_size for path in tree.rglob("*") if path.is_file() and not path.is_symlink()}
        least = min(_LARGE, max(sizes.values()))
        large = [path for path, size in sizes.items() if size >= least and ":" not in str(path)]
        self._large = [path.relative_to(tree) for path in sorted(large, key=lambda path: -sizes[path])[:_MOST_FILES]]

    def measure(self, point: Point) -> dict[str, float]:
        try:
            form, disk = FORMS[str(point["form"])], DISKS[str(point["disk"])]
        except KeyError as error:
            known = ", ".join([*FORMS, *DISKS])
            raise LabError(f"forms: no form or disk {error} (wanted one of {known})") from None
        file = self._file(form)
        self._groups.set_disk(disk, self._directory)
        command = self._command(str(point["work"]))
        drop_page_cache()
        with _mounted(form, file, self._target):
            drop_page_cache()
            before = _page_cache()
            dropped_s = self._work(command)
            cached = _page_cache() - before
            warm_s = self._work(command)
        return {
            "dropped_s": dropped_s,
            "warm_s": warm_s,
            "cached_mib": max(cached, os.sysconf("SC_PAGE_SIZE")) / 2**20,
            "file_mib": 512 * file.stat().st_blocks / 2**20,
            "make_s": self._made[form.file],
        }

    def _file(self, form: Form) -> Path:
        file = self._directory / form.file
        if form.file not in self._made:
            began_s = time.perf_counter()
            if form.make is None:
                PlainLoop().make(self._tree, file)
            else:
                words = ["mkfs.erofs", "--quiet", *form.make, "-T0", str(file), str(self._tree)]
                run(words, timeout_s=_MAKE_TIMEOUT_S)
            os.sync()
            self._made[form.file] = time.perf_counter() - began_s
        return file

    def _command(self, work: str) -> list[str]:
        if work == "du":
            return ["du", "-s", str(self._target)]
        if work == "tar":  # which does not read files if its output is /dev/null
            return ["sh", "-c", f"tar -cf - -C '{self._target}' . | cat >/dev/null"]
        if work != "read":
            raise LabError(f"forms: no work {work!r} (wanted one of {', '.join(_WORKS)})")
        names = ":".join(str(self._target / path) for path in self._large)
        options = ["--readonly", "--rw=randread", "--norandommap", f"--bs={_READ}"]
        options += [
            f"--io_size={self._reads * _READ}",
            "--ioengine=psync",
            "--invalidate=0",
            "--fadvise_hint=random",
            "--file_service_type=random",
        ]
        return ["fio", "--name=job", f"--filename={names}", "--randseed=7", "--output-format=json", *options]

    # Of fio the time of the reads; of the others all of it.
    def _work(self, command: Sequence[str]) -> float:
        waiting = ["sh", "-c", 'read go; exec "$@"', "sh", *command]
        child = subprocess.Popen(
            waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            self._groups.add(child.pid)
            began_s = time.perf_counter()
            output, error = child.communicate("go\n", timeout=_WORK_TIMEOUT_S)
            took_s = time.perf_counter() - began_s
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if child.returncode:
            raise LabError(f"{command[0]}: status {child.returncode}: {error.strip()[-300:]}")
        if command[0] == "fio":
            took_s = json.loads(output[output.index("{") :])["jobs"][0]["read"]["runtime"] / 1000
        return max(took_s, 1e-4)


@contextmanager
def _mounted(form: Form, file: Path, target: Path) -> Iterator[None]:
    fs_type = "ext4" if form.make is None else "erofs"
    label = f"obdlab-lab-{os.getpid()}"
    with ExitStack() as stack:
        source = file
        if form.loop:
            with file.open("rb") as opened:
                source = loop.attach(
                    opened.fileno(),
                    label=label,
                    read_only=True,
                    direct_io=form.direct_io,
                    sector_size=form.sector_size,
                )
            stack.callback(loop.detach, source, label=label)
        # obdlab.system.mount refuses EROFS of other compression than LZ4. The bench has made these files itself.
        run(["mount", "-t", fs_type, "-o", "ro", str(source), str(target)])
        stack.callback(mount.unmount, target)
        yield


# With the cache of block devices.
def _page_cache() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) == 3}
    return sizes["Cached"] + sizes["Buffers"]
