"""obdlab: layers converted to overlaybd; a pull fetches metadata, a container's reads fetch blocks."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, ClassVar

from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions, convert_image
from obdlab.convert.layer import LayerOptions
from obdlab.lab.baselines.overlayfs import Overlayfs
from obdlab.lab.testbed.containerd import LAZY_SNAPSHOTTER

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from obdlab.lab.baselines.adapter import Source
    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.lab.testbed.registry import RegistryHost
    from obdlab.registry.client import RegistryClient

#: Part of the tag: raise it when conversion gives other bytes, so that stored images are converted again.
CONVERTER_VERSION = 1
_LARGE_BLOCK = 65536


class Lazy(Overlayfs):
    """obdlab's snapshotter, cold: no trace, no prefetch."""

    name: ClassVar[str] = LAZY_SNAPSHOTTER
    title: ClassVar[str] = "obdlab"
    snapshotter: ClassVar[str] = LAZY_SNAPSHOTTER
    registry_share: ClassVar[float] = 1.2
    host_share: ClassVar[float] = 1.2
    start_share: ClassVar[float] = 0.4
    #: Convert with hash trees, by which the reads of a start are checked.
    hash_trees: ClassVar[bool] = False

    def tag(self, source: Source) -> str:
        """Return the tag of the converted image."""
        return f"{source.identity}-obd{CONVERTER_VERSION}-{source.algorithm}-{source.block_size}"

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Convert the image into the registry."""
        layer = LayerOptions(algorithm=source.algorithm, block_size=source.block_size)
        convert_image(
            open_source(f"oci:{source.layout}", client),
            open_destination(reference, client),
            options=ConvertOptions(layer=layer, hash_trees=self.hash_trees),
        )

    def serving(self, host: OwnContainerd, registry: RegistryHost) -> AbstractContextManager[None]:
        """Run the snapshotter and the device host."""
        return host.serving_lazy()

    def pull(self, host: OwnContainerd, reference: str) -> None:
        """Pull metadata only, by a process of its own."""
        host.lazy_pull(reference)

    def versions(self) -> dict[str, str]:
        """Return obdlab's version."""
        return {"obdlab": version("obdlab")}


class LazySmall(Lazy):
    """obdlab with blocks of 64 KiB: nearer to gzip's bytes, of which its default has a fifth more."""

    name: ClassVar[str] = "obdlab-64k"
    title: ClassVar[str] = "obdlab with blocks of 64 KiB"

    def tag(self, source: Source) -> str:
        """Return the tag of the converted image."""
        return super().tag(replace(source, block_size=_LARGE_BLOCK))

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Convert the image into the registry."""
        super().publish(host, replace(source, block_size=_LARGE_BLOCK), client, reference)


class Verified(Lazy):
    """The same image with hash trees: each unit that a start reads is checked."""

    name: ClassVar[str] = "obdlab-verified"
    title: ClassVar[str] = "obdlab with hash trees"
    hash_trees: ClassVar[bool] = True

    def tag(self, source: Source) -> str:
        """Return the tag of the converted image with hash trees."""
        return f"{super().tag(source)}-trees1"
