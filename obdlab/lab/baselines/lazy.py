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

    def options(self, source: Source) -> ConvertOptions:
        """Return the options of the conversion."""
        layer = LayerOptions(algorithm=source.algorithm, block_size=source.block_size)
        return ConvertOptions(layer=layer, hash_trees=self.hash_trees)

    def tag(self, source: Source) -> str:
        """Return the tag of the converted image: another one when options or converter give other bytes."""
        return f"{source.identity}-obd-{self.options(source).digest()[:16]}"

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Convert the image into the registry."""
        convert_image(
            open_source(f"oci:{source.layout}", client),
            open_destination(reference, client),
            options=self.options(source),
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

    def options(self, source: Source) -> ConvertOptions:
        """Return the options of the conversion."""
        return super().options(replace(source, block_size=_LARGE_BLOCK))


class Verified(Lazy):
    """The same image with hash trees: each unit that a start reads is checked."""

    name: ClassVar[str] = "obdlab-verified"
    title: ClassVar[str] = "obdlab with hash trees"
    hash_trees: ClassVar[bool] = True
