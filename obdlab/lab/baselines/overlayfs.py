"""The baseline: pull everything, unpack it, and let the kernel's overlayfs join the layers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from obdlab.lab.baselines.adapter import Adapter, first_line
from obdlab.lab.images.ocilayout import push_layout
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from obdlab.lab.baselines.adapter import Source
    from obdlab.lab.images.recipe import Probe
    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.lab.testbed.registry import RegistryHost
    from obdlab.lab.testbed.startedcontainer import RunningContainer
    from obdlab.registry.client import RegistryClient


class Overlayfs(Adapter):
    """containerd's own overlayfs snapshotter."""

    name: ClassVar[str] = "overlayfs"
    title: ClassVar[str] = "a full pull with overlayfs"
    #: containerd's name of the snapshotter; empty if it is the adapter's name.
    snapshotter: ClassVar[str] = ""
    registry_share: ClassVar[float] = 1.0
    host_share: ClassVar[float] = 3.7  # compressed and unpacked
    start_share: ClassVar[float] = 1.0
    programs: ClassVar[dict[str, str]] = {"containerd": "containerd", "ctr": "containerd", "runc": "runc"}

    def tag(self, source: Source) -> str:
        """Return the tag of the image as it was built."""
        return source.identity

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Push the layers as they are."""
        push_layout(source.layout, client, Reference.parse(reference))

    def pull(self, host: OwnContainerd, reference: str) -> None:
        """Pull and unpack everything."""
        host.pull(reference)

    @contextmanager
    def running(self, host: OwnContainerd, reference: str, name: str, probe: Probe) -> Iterator[RunningContainer]:
        """Run a container on a new snapshot."""
        container = host.start(reference, name, self.snapshotter or self.name, probe)
        try:
            yield container
        finally:
            container.remove()

    def remove(self, host: OwnContainerd, reference: str) -> None:
        """Remove image, content and snapshots."""
        host.remove_image(reference)

    def layers(self, host: OwnContainerd) -> Path:
        """Return the snapshots' directory."""
        return host.layer_directories[self.snapshotter or self.name]

    def versions(self) -> dict[str, str]:
        """Return containerd's version."""
        return {"containerd": first_line("containerd", "--version")}


class OverlayfsUnpigz(Overlayfs):
    """The same where pigz is installed: containerd then unpacks by ``unpigz``, a process for each layer."""

    name: ClassVar[str] = "overlayfs-unpigz"
    title: ClassVar[str] = "a full pull with overlayfs and unpigz"
    snapshotter: ClassVar[str] = "overlayfs"
    programs: ClassVar[dict[str, str]] = {**Overlayfs.programs, "unpigz": "pigz"}

    def serving(self, host: OwnContainerd, registry: RegistryHost) -> AbstractContextManager[None]:
        """Run containerd with unpigz."""
        return host.unpacking_by_unpigz()

    def versions(self) -> dict[str, str]:
        """Return the versions of containerd and pigz."""
        return {**super().versions(), "pigz": first_line("unpigz", "--version")}
