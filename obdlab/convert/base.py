"""A base that is converted already, by obdlab or by the original: the lowest layers of further images.

The base's original image proves which layers of a source the converted ones stand for, by their diff IDs. Its
converted layers are stored with the new image as they are, and the source's other layers are built on them.
"""

from __future__ import annotations

import itertools
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import FormatError
from obdlab.formats import oci
from obdlab.layers.lsmt import open_layer

if TYPE_CHECKING:
    from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
    from obdlab.convert.progress import Progress
    from obdlab.layers.lsmt import Layer

_EXT4 = "ext4"


@dataclass(frozen=True, slots=True)
class Base:
    """An image, and the same image as an overlaybd one."""

    original: ImageSource
    converted: ImageSource

    def below(self, name: str, manifest: oci.Manifest, config: oci.Config) -> Below:
        """Return the layers below those of the image ``name`` that are to be converted.

        Raises FormatError if the original's layers are not the image's lowest ones, or the converted image has no
        ext4 for further layers; errors of reading pass through.
        """
        platform = config.platform
        replaced = self.original.config(self.original.manifest(platform)).diff_ids
        if config.diff_ids[: len(replaced)] != replaced:
            pairs = zip(config.diff_ids, replaced, strict=False)
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            raise FormatError(
                f"image is not built on {self.original.name}", blob=name,
                got=f"{shared} layers in common", wanted=f"its {len(replaced)} layers as the lowest ones",
            )  # fmt: skip
        converted = self.converted.manifest(platform, overlaybd=True)
        check_extensible(converted, self.converted.name)
        return Below(self.converted, converted.layers, manifest.layers[: len(replaced)])


def check_extensible(image: oci.Manifest, name: str) -> None:
    """Raise FormatError unless layers can be built on an image: it must be an overlaybd image of ext4."""
    if not image.is_overlaybd:
        raise FormatError("base is not an overlaybd image", blob=name)
    if any(layer.turbo_target is not None for layer in image.layers):
        raise FormatError("base has turboOCI layers, on which no others can be built", blob=name)
    if image.layers[-1].annotations.get(oci.ACCELERATION_LAYER) == "yes":
        raise FormatError("base has a trace on top: give the image without it", blob=name)
    kind = image.layers[0].annotations.get(oci.BLOB_FS_TYPE, _EXT4).partition(";")[0]
    if kind != _EXT4:
        raise FormatError("no layers can be added to the base", blob=name, got=kind, wanted=_EXT4)


@dataclass(frozen=True, slots=True)
class Below:
    """Converted layers, bottom first, and the OCI layers that they replace: not always one for one."""

    source: ImageSource
    layers: tuple[oci.Descriptor, ...]
    replaced: tuple[oci.Descriptor, ...]

    @property
    def digests(self) -> list[str]:
        """The layers' digests, bottom first."""
        return [layer.digest for layer in self.layers]

    def open(self, most_bytes: int) -> list[Layer]:
        """Open the layers, to be read in place.

        Raises FormatError for a malformed one, or a disk of more than ``most_bytes``; errors of reading pass through.
        """
        opened: list[Layer] = []
        try:
            opened.extend(open_layer(self.source.open_blob(descriptor)) for descriptor in self.layers)
            size = next((layer.virtual_size for layer in reversed(opened) if layer.virtual_size), 0)
            if size > most_bytes:
                wanted = f"at most {most_bytes} (--vsize-gib)"
                raise FormatError("disk of the base is too large", blob=self.source.name, got=size, wanted=wanted)
        except BaseException:
            for layer in opened:
                layer.close()
            raise
        return opened

    def store(self, destination: ImageDestination, work_dir: Path, progress: Progress) -> list[bool]:
        """Store the layers that the destination lacks; return True for each such. Errors pass through."""
        with tempfile.TemporaryDirectory(prefix="obdlab-base-", dir=work_dir) as directory:
            return [
                copy_layer(self.source, layer, destination, Path(directory), f"base layer {number}", progress)
                for number, layer in enumerate(self.layers)
            ]

    def parts(self) -> list[tuple[oci.Descriptor, ...]]:
        """Return for each layer the OCI layers that it stands for.

        The lowest stands for all beyond one each. If there are more layers than those, the lowest stand for none.
        """
        extra = len(self.replaced) - len(self.layers)
        if extra < 0:
            return [*((),) * -extra, *((layer,) for layer in self.replaced)]
        return [self.replaced[: extra + 1], *((layer,) for layer in self.replaced[extra + 1 :])]


def copy_layer(
    source: ImageSource,
    layer: oci.Descriptor,
    destination: ImageDestination,
    directory: Path,
    title: str,
    progress: Progress,
) -> bool:
    """Copy a layer's blob, checked, to a destination that lacks it. Return False if nothing had to be copied."""
    if destination.has(layer):
        return False
    place = source.place
    near = place is not None and destination.place is not None and place[0] == destination.place[0]
    if place is not None and near and destination.share(layer, place[1]):
        return False
    with ExitStack() as ended, progress.task(f"{title}: copy", layer.size) as task:
        file = source.fetch(layer, directory, task.advance)
        ended.callback(source.release, file)
        path = ended.enter_context(file.own_file(directory))
        return destination.put_file(layer, path, lambda _: None)
