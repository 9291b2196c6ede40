"""A whole pull in the manner of containerd's EROFS snapshotter (2.1), which Debian's containerd does not have.

Every layer becomes one EROFS file at the pull, by ``mkfs.erofs --tar=f --aufs`` as its differ calls it; a container's
root is an overlay over the mounted files. Nothing is unpacked into many small files. Three layers are downloaded at
once, as containerd does by default, and each is converted when it is there.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import TYPE_CHECKING, ClassVar

from obdlab.formats import oci
from obdlab.lab.baselines.file import Erofs
from obdlab.lab.images.ocilayout import push_layout
from obdlab.lab.testbed.process import LabError, run
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.system import mount

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.lab.baselines.adapter import Source
    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.registry.reference import Repository

_CHUNK = 1 << 20
_MOST_CONFIG = 4 << 20
_AT_ONCE = 3
_MAKE_TIMEOUT_S = 600.0
_MAKE = ("mkfs.erofs", "--quiet", "--tar=f", "--aufs", "-Enoinline_data", "-T0")


class ErofsLayers(Erofs):
    """The image's own gzip layers, pulled whole, each turned into an EROFS file."""

    name: ClassVar[str] = "erofs-layers"
    title: ClassVar[str] = "a full pull into an EROFS file a layer"
    registry_share: ClassVar[float] = 1.0
    host_share: ClassVar[float] = 4.0
    start_share: ClassVar[float] = 1.0

    def tag(self, source: Source) -> str:
        """Return the tag of the image as it was built."""
        return source.identity

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Push the layers as they are."""
        push_layout(source.layout, client, Reference.parse(reference))

    def pull(self, host: OwnContainerd, reference: str) -> None:
        """Download all layers, make an EROFS file of each, and mount them over each other."""
        place = self._place(host, reference)
        (place / "lower").mkdir(parents=True)
        with closing(RegistryClient()) as client:
            parsed = Reference.parse(reference)
            manifest = oci.Manifest.parse(client.get_manifest(parsed).data)
            repository = client.repository(parsed)
            config = client.read_blob(repository, manifest.config.digest, manifest.config.size, _MOST_CONFIG)
            (place / "config").write_bytes(config)
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                made = [
                    pool.submit(_layer, client, repository, layer, place / str(number))
                    for number, layer in enumerate(manifest.layers)
                ]
                directories = [each.result() for each in made]
        for directory in directories:
            mount.mount(directory.with_suffix(".erofs"), directory, read_only=True, fs_type="erofs")
        if len(directories) == 1:
            run(["mount", "--bind", directories[0], place / "lower"])
            return
        # The uppermost layer comes first. Relative, as mount(8) passes at most 256 bytes on.
        lower = ":".join(directory.name for directory in reversed(directories))
        run(["mount", "-t", "overlay", "overlay", "-o", f"ro,lowerdir={lower}", place / "lower"], directory=place)

    def remove(self, host: OwnContainerd, reference: str) -> None:
        """Unmount the files and delete them."""
        place = self._place(host, reference)
        with suppress(OSError):
            mount.unmount(place / "lower")
        for directory in place.glob("[0-9]*"):
            if directory.is_dir():
                with suppress(OSError):
                    mount.unmount(directory)
        shutil.rmtree(place, ignore_errors=True)


# Download and check a layer, then convert it; return the directory for its mount. The tar goes through a pipe.
def _layer(client: RegistryClient, repository: Repository, layer: oci.Descriptor, place: Path) -> Path:
    place.mkdir()
    blob = place.with_suffix(".blob")
    with blob.open("wb") as target, client.stream_blob(repository, layer.digest, layer.size) as data:
        shutil.copyfileobj(data, target, _CHUNK)
    command = [*_MAKE, str(place.with_suffix(".erofs"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as making:
        assert making.stdin is not None
        assert making.stderr is not None
        with suppress(BrokenPipeError), gzip.open(blob) as tar:
            shutil.copyfileobj(tar, making.stdin, _CHUNK)
        with suppress(BrokenPipeError):
            making.stdin.close()
        error = making.stderr.read().decode(errors="replace")
        if making.wait(_MAKE_TIMEOUT_S):
            raise LabError(f"mkfs.erofs: status {making.returncode} for layer {layer.digest}: {error.strip()[-300:]}")
    blob.unlink()
    return place
