"""A whole conversion, from a registry on this machine to the image pushed there, beside gunzip and LZ4 of its bytes.

Run: python -m tests.benchmarks.convert [LAYOUT [REPEATS]]: an OCI layout directory with one image; without one, an
image made of this Python's packages. gzip and lz4 run one after the other, single-threaded, each over all layers. The
least times of the repeats count. Memory is the sum over all processes of the conversion (PSS), looked at every 50 ms.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from tests.convert.layouts import Layout
from tests.registry.server import running_registry

if TYPE_CHECKING:
    from collections.abc import Callable

_LAYERS = 3
_LOOK_S = 0.05


def made_layout(root: Path) -> Path:
    """An image of what is installed beside this Python, in layers of about the same number of packages."""
    packages = sorted(path.name for path in Path(sysconfig.get_path("purelib")).iterdir())
    tars = []
    for number in range(_LAYERS):
        names = packages[number::_LAYERS]
        done = subprocess.run(
            ["tar", "-c", "-C", sysconfig.get_path("purelib"), *names], stdout=subprocess.PIPE, check=True
        )
        tars.append(done.stdout)
    layout = Layout(root)
    layout.write_index([layout.add_image(tars)])
    return root


def layers_of(root: Path) -> tuple[oci.Descriptor, bytes, oci.Manifest]:
    layout = ImageLayout(root)
    (entry,) = layout.select(None)
    data = layout.read_blob(entry, 1 << 20)
    return entry, data, oci.Manifest.parse(data)


def push(root: Path, name: str) -> None:
    entry, data, manifest = layers_of(root)
    layout, reference = ImageLayout(root), Reference.parse(name)
    with closing(RegistryClient()) as client:
        repository = client.repository(reference)
        for blob in {one.digest: one for one in (manifest.config, *manifest.layers)}.values():
            client.push_blob(repository, blob.digest, blob.size, opener(layout.blob_path(blob.digest)))
        client.put_manifest(reference, entry.media_type, data)


def opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


def converted(source: str, destination: str, work: Path) -> tuple[float, float]:
    """Seconds of a conversion, and the peak of its memory in MiB."""
    command = [sys.executable, "-m", "obdlab", "image", "convert", "-q", source, destination, "--work-dir", str(work)]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        peak = Peak(process.pid)
        assert process.wait() == 0
        seconds = time.monotonic() - begin
    return seconds, peak.stop()


class Peak:
    """The most memory that a process and those below it had together."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._most = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> float:
        self._stopped.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            self._most = max(self._most, sum(map(pss_mib, descendants(self._pid))))


def descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        with suppress(OSError):
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
    return found


def pss_mib(pid: int) -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def plain_tools(root: Path, work: Path) -> float:
    """Seconds that gzip -d and lz4 take for all layers."""
    _, _, manifest = layers_of(root)
    paths = [str(ImageLayout(root).blob_path(layer.digest)) for layer in manifest.layers]
    tars = work / "tars"
    begin = time.monotonic()
    with tars.open("wb") as file:
        subprocess.run(["gzip", "-d", "-c", *paths], stdin=subprocess.DEVNULL, stdout=file, check=True)
    subprocess.run(["lz4", "-q", "-f", "-1", str(tars), str(work / "tars.lz4")], check=True)
    seconds = time.monotonic() - begin
    tars.unlink()
    (work / "tars.lz4").unlink()
    return seconds


def main() -> None:
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        root = Path(directory)
        layout = Path(sys.argv[1].removeprefix("oci:")) if len(sys.argv) > 1 else made_layout(root / "layout")
        size = sum(layer.size for layer in layers_of(layout)[2].layers)
        with running_registry(root / "registry") as server:
            push(layout, f"{server.host}/source:v1")
            ours, plain, memory = [], [], []
            for number in range(repeats):  # in turn, so that whatever else runs here disturbs both
                # A repository of its own: nothing of it is there yet.
                seconds, peak = converted(f"{server.host}/source:v1", f"{server.host}/converted{number}:v1", root)
                ours.append(seconds)
                memory.append(peak)
                plain.append(plain_tools(layout, root))
    print(
        f"{size / 1e6:.0f} MB of layers: converted in {min(ours):.2f} s, gunzip + lz4 {min(plain):.2f} s, "
        f"ratio {min(ours) / min(plain):.2f}; at most {max(memory):.0f} MiB of memory"
    )
    print(f"all: {', '.join(f'{one:.2f}' for one in ours)} against {', '.join(f'{one:.2f}' for one in plain)}")


if __name__ == "__main__":
    main()
