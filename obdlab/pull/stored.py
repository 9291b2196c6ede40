"""Unpacking an image that containerd's content store has whole, without any registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.containerd import gclabels
from obdlab.containerd.errors import NotFoundError
from obdlab.errors import FormatError
from obdlab.formats import oci
from obdlab.pull.errors import PullError
from obdlab.pull.unpack import Unpacker
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.containerd.client import Containerd
    from obdlab.pull.unpack import LayerResult

_LEASE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image of one platform, all of whose blobs are in the content store.

    ``name`` is empty if it is not a registry's, and so cannot be a label. ``targets`` are the ordinary layers that
    turboOCI layers point into, by digest.
    """

    name: str
    config: str
    layers: tuple[oci.Descriptor, ...]
    diff_ids: tuple[str, ...]
    chain_ids: tuple[str, ...]
    targets: dict[str, oci.Descriptor]

    @classmethod
    def find(cls, containerd: Containerd, name: str, platform: oci.Platform) -> StoredImage:
        """Read the documents of the image that containerd knows as ``name``.

        Raises PullError if a blob is missing, FormatError if a document is malformed, ContainerdError.
        """
        try:
            digest = containerd.images.get(name).digest
            document = oci.parse_manifest(containerd.content.read(digest), name)
            if isinstance(document, oci.Index):
                digest = document.select(platform).digest
                document = oci.Manifest.parse(containerd.content.read(digest), name)
            config = oci.Config.parse(containerd.content.read(document.config.digest), f"{name} config")
            wanted = [layer.turbo_target for layer in document.layers if layer.turbo_target is not None]
            targets = {each: oci.Descriptor(oci.UNKNOWN_TYPE, each, containerd.content.info(each).size)
                       for each in wanted}  # fmt: skip
            for layer in document.layers:
                containerd.content.info(layer.digest)
        except NotFoundError as error:
            raise PullError(f"{name}: containerd does not have all of this image ({error})") from error
        if not document.layers or len(config.diff_ids) != len(document.layers):
            raise PullError(
                f"{name}: manifest and config disagree (got {len(document.layers)} layers, wanted "
                f"{len(config.diff_ids)} as in diff_ids, and at least one)"
            )
        chain = oci.chain_ids(config.diff_ids)
        label = name if _is_reference(name) else ""
        return cls(label, document.config.digest, document.layers, config.diff_ids, chain, targets)


def unpack_stored(
    containerd: Containerd, name: str, *, snapshotter: str, platform: oci.Platform
) -> tuple[LayerResult, ...]:
    """Make an image of the content store runnable in ``snapshotter``; it stays so as long as the image is there.

    The snapshotter reads the files of turboOCI layers from the content store. A failure leaves no snapshot behind.
    Raises as :meth:`StoredImage.find`, and PullError if there is no such snapshotter.
    """
    if not containerd.snapshots(snapshotter).exists():
        raise PullError(f"containerd has no snapshotter {snapshotter!r}: is it in its config.toml?")
    with containerd.lease(expire_s=_LEASE_S) as leased:
        image = StoredImage.find(leased, name, platform)
        made = Unpacker(leased, snapshotter, image, _Here(), targets=image.targets).run()
        leased.content.label(image.config, gclabels.of_config(snapshotter, image.chain_ids[-1]))
    return made


class _Here:
    # The fetcher of an image that is there.
    def start(self, layers: Sequence[oci.Descriptor]) -> None:
        pass

    def wait(self, layer: oci.Descriptor) -> None:
        pass


def _is_reference(name: str) -> bool:
    try:
        Reference.parse(name)
    except FormatError:
        return False
    return True
