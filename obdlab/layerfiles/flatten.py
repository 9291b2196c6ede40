"""Unpacking a read-only image to a plain file, shared by all devices of the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.cache.eviction import EvictingSpace
from obdlab.cache.unpacked import FlatFileError, FlatFiles
from obdlab.errors import ObdlabError
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.image.identity import name_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.image.open import Image
    from obdlab.settings.settings import Settings


class FlattenError(ObdlabError, code="flatten"):
    """An image cannot be unpacked at present."""


def flat_files(settings: Settings) -> FlatFiles:
    """Return the unpacked images in the directory that the settings name."""
    return FlatFiles(EvictingSpace(settings.cache_dir, quota=settings.cache_quota, min_free=settings.cache_min_free))


def flat_name(image: Image) -> str:
    """Return the name of the unpacked image: the same for images of the same layers of one registry.

    Raises FlattenError if a layer has nothing that identifies it.
    """
    if not image.identity or not all(image.identity):
        raise FlattenError(f"{image.name}: a layer has neither a digest nor a file of its own")
    return name_of(image.identity, image.origin)


def flatten(image: Image, files: FlatFiles, progress: Callable[[int, int], object] = lambda _, __: None) -> int:
    """Unpack the image, or check the unpacked file; return a descriptor that keeps the file from being removed.

    Every byte is read through the image, so every checksum is checked. ``progress`` gets the bytes of the disk done
    and in total. Raises FlattenError if layers are not wholly local, FlatFileError if there is no room, and the
    errors of reading; then nothing is left.
    """
    name = flat_name(image)
    fd = files.take_into_use(name)
    if fd is not None:
        return fd
    missing = image.unverified()
    if missing:
        raise FlattenError(
            f"{image.name}: {missing} of {len(image.layers)} layers are not in the cache whole and checked yet"
        )

    def read(offset: int, length: int) -> bytes | None:
        progress(offset, image.size)
        runs = image.index.lookup(offset // SECTOR, -(-(offset + length) // SECTOR))
        if all(source < 0 for _, _, source, _ in runs):
            return None
        data = image.read_at(offset, length)
        if image.unverified():  # evicted or damaged meanwhile, so read again: the layer's digest has not checked that
            raise FlattenError(f"{image.name}: a layer did not stay in the cache whole and checked")
        return data

    files.store(name, image.size, data_size(image), read)
    progress(image.size, image.size)
    # Reads it from the disk: the next start of the image then finds it checked.
    fd = files.take_into_use(name)
    if fd is None:
        raise FlatFileError(f"{files.path(name)}: was damaged or removed at once")
    return fd


def data_size(image: Image) -> int:
    """Return the bytes of the disk that its layers store as data, without ranges stored as zeros."""
    runs = image.index.lookup(0, -(-image.size // SECTOR))
    return SECTOR * sum(count for _, count, source, _ in runs if source >= 0)
