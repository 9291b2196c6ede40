"""The targets of a stored turboOCI image, looked for and checked: the image is lost without them."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from obdlab.convert.endpoints.disks import target_of, unpacked
from obdlab.errors import FormatError, ObdlabError
from obdlab.image.target import check_target_size, summed, uncompressed_target
from obdlab.image.turboblob import FILE_SYSTEMS, file_systems_in, lower_of
from obdlab.layers.lsmt import open_layer
from obdlab.layers.spancache import SpanCache
from obdlab.layers.warp import WarpLayer
from obdlab.localfile import LocalFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.convert.endpoints.endpoint import ImageSource
    from obdlab.formats.oci import Descriptor

_PIECE = 1 << 20


def look_for_target(source: ImageSource, layer: Descriptor) -> tuple[int, str]:
    """Return the size of a turboOCI layer's target, and ""; or 0, and the error as a sentence."""
    try:
        return target_of(source, layer.turbo_target or "").size, ""
    except ObdlabError as error:
        return 0, str(error)


def verify_target(source: ImageSource, layer: Descriptor, place: Path, advance: Callable[[int], None]) -> None:
    """Read a turboOCI layer's target whole, and compare it with all that the layer's blob says of it.

    Files are put below the directory ``place``. ``advance`` is called with the bytes fetched. Raises SourceError if
    the target is missing, FormatError for another size, CorruptBlobError for another digest or content; and if index
    or metadata do not fit it.
    """
    directory = unpacked(source, place, layer)
    file_systems = file_systems_in(directory)
    if not file_systems:
        wanted = " or ".join(FILE_SYSTEMS)
        raise FormatError("turboOCI layer has no file system", blob=f"{source.name}@{layer.digest}", wanted=wanted)
    lower = lower_of(layer, directory, file_systems[0])
    found = target_of(source, lower.target_digest)
    check_target_size(f"{source.name}@{found.digest}", found.size, lower)
    file = source.fetch(found, place, advance)
    try:
        while file.read(_PIECE):  # to the end, where the digest is checked
            pass
        spans = SpanCache(directory=str(place))
        with closing(file.as_blob()) as stored, closing(uncompressed_target(stored, lower.gzip_index, spans)) as bare:
            tar = summed(bare, lower, spans)
            for name in file_systems:
                with LocalFile(lower_of(layer, directory, name).file) as meta:
                    open_layer(meta, kind=partial(WarpLayer, tar))
            for at in range(0, tar.size, _PIECE):
                tar.read_at(at, min(_PIECE, tar.size - at))
    finally:
        source.release(file)
