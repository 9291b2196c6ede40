"""obdlab with a turboOCI image: the layers stay as they were built, and small blobs beside them have the metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions, convert_image
from obdlab.lab.baselines.adapter import is_published
from obdlab.lab.baselines.lazy import Lazy
from obdlab.lab.baselines.overlayfs import Overlayfs

if TYPE_CHECKING:
    from obdlab.lab.baselines.adapter import Source
    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.registry.client import RegistryClient


class Turbo(Lazy):
    """obdlab's snapshotter, cold, on ext4 over gzip layers: SOCI's nearest relative."""

    name: ClassVar[str] = "obdlab-turbo"
    title: ClassVar[str] = "obdlab with turboOCI"
    registry_share: ClassVar[float] = 1.1  # includes the image as it was built
    host_share: ClassVar[float] = 1.2
    start_share: ClassVar[float] = 0.5

    def options(self, source: Source) -> ConvertOptions:
        """Return the options of the conversion."""
        return ConvertOptions(turbo=("ext4",))

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Push the layers as they are, and a turboOCI image of them into the same repository."""
        plain = f"{reference.rpartition(':')[0]}:{Overlayfs.tag(self, source)}"
        if not is_published(client, plain):
            Overlayfs.publish(self, host, source, client, plain)
        convert_image(
            open_source(plain, client),
            open_destination(reference, client),
            options=self.options(source),
        )
