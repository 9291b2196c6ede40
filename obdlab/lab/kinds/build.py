"""Building a layer over an image: write new files, change the mode of the image's files, commit the layer.

(The paper's figure 25: write and chmod, 7,944 files of 545 MB; the commit is a separate metric here.) overlayfs
copies a whole file up to change its mode; a block device's layer stores the blocks of the inode. Every phase ends
with ``sync`` of the file system.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, ClassVar

from obdlab.devices.usage import STARTS_END_S
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.lab.kinds.kind import Kind, Metric
from obdlab.lab.testbed.process import LabError, run
from obdlab.layerfiles.disks import open_any_layer
from obdlab.layerfiles.writing import Packing, write_layer
from obdlab.layers.append import AppendUpper
from obdlab.layers.stack import WritableStack
from obdlab.layers.upper import SparseUpper, open_upper
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.system import mount
from obdlab.volumes.ext4.mkfs import make_filesystem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from obdlab.lab.kinds.kind import Place, Point, Value

_FILES_PER_DIRECTORY = 100
_SEED = 7
_ARMS = ("overlayfs", "obdlab-append", "obdlab-sparse")


class Build(Kind):
    """The lower image holds as many files as the new layer."""

    name: ClassVar[str] = "build"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {"layer": _ARMS}
    options: ClassVar[Mapping[str, Value]] = {"files": 7944, "mean_kib": 67}
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("build_s", "s"),
        Metric("write_s", "s"),
        Metric("chmod_s", "s"),
        Metric("commit_s", "s"),
        Metric("stored_mb", "MB"),
    )
    programs: ClassVar[Mapping[str, str]] = {"tar": "tar"}

    def point_s(self, options: Mapping[str, Value]) -> float:
        """Return an estimate from the number of files."""
        return 1.0 + int(options["files"]) / 400

    def disk_bytes(self, options: Mapping[str, Value]) -> int:
        """Return the size of the lower image in both forms, the layer and its commit together."""
        return 4 * int(options["files"]) * (int(options["mean_kib"]) << 10)

    @contextmanager
    def bench(self, options: Mapping[str, Value], place: Place) -> Iterator[Callable[[Point], dict[str, float]]]:
        """Make the lower image in both forms: a directory, and a layer."""
        files, mean = int(options["files"]), int(options["mean_kib"]) << 10
        with ExitStack() as stack:
            bench = _Bench(place.work, files, mean)
            stack.callback(bench.service.shutdown, force=True)
            bench.prepare()
            yield bench.measure


class _Bench:
    def __init__(self, work: Path, files: int, mean: int) -> None:
        self.service = DeviceService(work / "run", Settings(cache_dir=work / "cache"))
        self._work = work
        self._files = files
        self._mean = mean
        # Twice the room that the files of the image and of the layer need.
        self._disk_size = max(1 << 30, -(-4 * files * (mean + 4096) // (1 << 20)) << 20)

    def prepare(self) -> None:
        self._tree(self._work / "lower" / "image")
        self._new_upper("obdlab-append", self._work / "made")
        with WritableStack(None, open_upper(self._work / "made", self._work / "made.index")) as disk:
            make_filesystem(disk)
            disk.flush()
        with self._device(self._work / "made", lowers=()) as root:
            self._tree(root / "image")
        self._commit(self._work / "made", self._work / "lower.obd")

    def measure(self, point: Point) -> dict[str, float]:
        arm = str(point["layer"])
        if arm not in _ARMS:
            raise LabError(f"build: no layer {arm!r} (wanted one of {', '.join(_ARMS)})")
        place = self._work / "layer"
        place.mkdir()
        try:
            return self._overlayfs(place) if arm == "overlayfs" else self._obdlab(arm, place)
        finally:
            shutil.rmtree(place)

    def _overlayfs(self, place: Path) -> dict[str, float]:
        for part in ("root", "upper", "work"):
            (place / part).mkdir()
        options = f"lowerdir={self._work}/lower,upperdir={place}/upper,workdir={place}/work"
        run(["mount", "-t", "overlay", "overlay", "-o", options, place / "root"])
        try:
            times = self._phases(place / "root")
        finally:
            mount.unmount(place / "root")
        began_s = time.perf_counter()
        run(["tar", "-C", place / "upper", "-cf", place / "layer.tar", "."], timeout_s=600.0)
        return self._told(times, time.perf_counter() - began_s, place / "layer.tar")

    def _obdlab(self, arm: str, place: Path) -> dict[str, float]:
        self._new_upper(arm, place / "upper")
        with self._device(place / "upper", (LowerConfig(file=str(self._work / "lower.obd")),)) as root:
            times = self._phases(root)
        began_s = time.perf_counter()
        self._commit(place / "upper", place / "layer.obd")
        return self._told(times, time.perf_counter() - began_s, place / "layer.obd")

    def _phases(self, root: Path) -> dict[str, float]:
        began_s = time.perf_counter()
        self._tree(root / "layer")
        _sync(root)
        written_s = time.perf_counter()
        for directory, _, names in os.walk(root / "image"):
            for name in names:
                os.chmod(os.path.join(directory, name), 0o600)
        _sync(root)
        return {"write_s": written_s - began_s, "chmod_s": time.perf_counter() - written_s}

    def _told(self, times: dict[str, float], commit_s: float, stored: Path) -> dict[str, float]:
        build_s = times["write_s"] + times["chmod_s"]
        return {"build_s": build_s, **times, "commit_s": commit_s, "stored_mb": stored.stat().st_size / 1e6}

    # Half of each file is noise, half zeros: it compresses to about half, like programs and libraries.
    def _tree(self, root: Path) -> None:
        rng = random.Random(_SEED)
        for number in range(self._files):
            directory = root / str(number // _FILES_PER_DIRECTORY)
            if number % _FILES_PER_DIRECTORY == 0:
                directory.mkdir(parents=True)
            size = rng.randrange(2 * self._mean)
            (directory / str(number)).write_bytes(rng.randbytes(size // 2) + bytes(size - size // 2))

    def _new_upper(self, arm: str, path: Path) -> None:
        index = path.with_suffix(".index")
        if arm == "obdlab-sparse":
            SparseUpper.create(path, self._disk_size, index_path=index).close()
        else:
            AppendUpper.create(path, index, self._disk_size).close()

    @contextmanager
    def _device(self, upper: Path, lowers: tuple[LowerConfig, ...]) -> Iterator[Path]:
        config, root = upper.with_suffix(".json"), upper.with_suffix(".mnt")
        about = UpperConfig(index=str(upper.with_suffix(".index")), data=str(upper))
        ImageConfig(lowers=lowers, upper=about).save(config)
        root.mkdir()
        device = self.service.attach(config, "build")
        try:
            self.service.mount(device, root, read_only=False)
            try:
                yield root
            finally:
                mount.unmount(root)
        finally:
            self.service.detach("build", patience_s=STARTS_END_S)
            root.rmdir()

    def _commit(self, upper: Path, target: Path) -> None:
        with closing(open_any_layer(upper, upper.with_suffix(".index"))) as layer:
            write_layer(layer, target, Packing(tar=True))


def _sync(root: Path) -> None:
    run(["sync", "--file-system", root], timeout_s=300.0)
