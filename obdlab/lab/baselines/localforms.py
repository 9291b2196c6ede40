"""obdlab after it has completed an image: no server takes part in a start, only a file on the disk.

The pull completes and unpacks the image, as a host does by itself in idle minutes: these arms are for warm and
dropped starts.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, ClassVar

from obdlab.devices.usage import STARTS_END_S
from obdlab.formats import oci
from obdlab.image.from_manifest import fetch_config
from obdlab.lab.baselines.file import Erofs
from obdlab.lab.baselines.lazy import Lazy
from obdlab.lab.testbed.coldness import empty_directory
from obdlab.lab.testbed.process import LabError, run
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.system import mount

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from obdlab.lab.baselines.adapter import Source
    from obdlab.lab.images.recipe import Probe
    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.lab.testbed.registry import RegistryHost
    from obdlab.lab.testbed.startedcontainer import RunningContainer

_MOST_CONFIG = 4 << 20
_MAKE_TIMEOUT_S = 1800.0
_DEVICE = "unpacking"
_MAKE = ("mkfs.erofs", "--quiet", "-zlz4", "-T0")


class Local(Lazy):
    """Each start opens the unpacked ext4 by a loop device."""

    name: ClassVar[str] = "obdlab-local"
    title: ClassVar[str] = "obdlab with the image completed and unpacked"
    cached_above: ClassVar[bool] = True  # the loop device reads the disk with direct I/O
    host_share: ClassVar[float] = 5.0  # the layers and the disk
    start_share: ClassVar[float] = 1.2

    def tag(self, source: Source) -> str:
        """Return the tag of the converted image."""
        return f"{super().tag(source)}-local"

    def pull(self, host: OwnContainerd, reference: str) -> None:
        """Pull as obdlab does; then fetch the layers whole and unpack them."""
        super().pull(host, reference)
        _complete(host, reference)

    @contextmanager
    def running(self, host: OwnContainerd, reference: str, name: str, probe: Probe) -> Iterator[RunningContainer]:
        """Run a container. Raises LabError if its image is served all the same."""
        with super().running(host, reference, name, probe) as container:
            devices = host.devices.list()
            if not devices or not all(device.graduated for device in devices):
                raise LabError(f"{reference}: a server took part in the start (see the snapshotter's log)")
            yield container


class LocalCompressed(Erofs):
    """The unpacked files as an EROFS compressed by LZ4, made on the host, which the kernel mounts from its file."""

    name: ClassVar[str] = "obdlab-local-compressed"
    title: ClassVar[str] = "obdlab with the image completed and compressed"
    registry_share: ClassVar[float] = 1.2
    host_share: ClassVar[float] = 6.0
    start_share: ClassVar[float] = 1.2

    def tag(self, source: Source) -> str:
        """Return the tag of the converted image, the same as for the uncompressed form."""
        return Local().tag(source)

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Convert the image into the registry."""
        Local().publish(host, source, client, reference)

    def serving(self, host: OwnContainerd, registry: RegistryHost) -> AbstractContextManager[None]:
        """Run the device host."""
        return host.serving_lazy()

    def pull(self, host: OwnContainerd, reference: str) -> None:
        """Fetch the layers whole, unpack them, and make the file of that; then only the file stays."""
        config = _complete(host, reference)
        place = self._place(host, reference)
        for name in ("lower", "tree"):
            (place / name).mkdir(parents=True)
        device = host.devices.attach(config, _DEVICE)
        try:
            host.devices.mount(device, place / "tree")
            try:
                run([*_MAKE, place / "file", place / "tree"], timeout_s=_MAKE_TIMEOUT_S)
            finally:
                mount.unmount(place / "tree")
        finally:
            host.devices.detach(_DEVICE, patience_s=STARTS_END_S)
        empty_directory(host.cache_dir)
        (place / "config").write_bytes(_image_config(reference))
        self.mount(place / "file", place / "lower")


def _complete(host: OwnContainerd, reference: str) -> Path:
    with closing(RegistryClient()) as client:
        image = fetch_config(client, Reference.parse(reference), host_platform())
    config = host.files_dir / "config.v1.json"
    image.save(config)
    host.complete(config, _DEVICE)
    return config


def _image_config(reference: str) -> bytes:
    with closing(RegistryClient()) as client:
        parsed = Reference.parse(reference)
        wanted = oci.Manifest.parse(client.get_manifest(parsed).data).config
        return client.read_blob(client.repository(parsed), wanted.digest, wanted.size, _MOST_CONFIG)
