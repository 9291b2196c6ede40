"""The identity of an image's layers, and the name of its unpacked disk, which follows from it.

The name can be found from the image's configuration alone, without opening a layer or asking a registry: so an image
that was unpacked once is found again by its digests, after a reboot as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.localfile import LocalFile
from obdlab.registry.reference import Repository

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from obdlab.image.config import ImageConfig, LowerConfig


def name_of(identity: Sequence[str], origin: str) -> str:
    """Return the name of the unpacked disk of layers of this ``identity``, none of them empty.

    ``origin`` is the cache's name for the registry of the layers that are not local files ('' if all are). Like a
    blob in the cache, an unpacked disk serves images of its own registry alone: knowing a digest must not suffice to
    read bytes for which another registry wants credentials.
    """
    return hashlib.sha256(json.dumps([origin, *identity]).encode()).hexdigest()


def expected_name(config: ImageConfig) -> str | None:
    """Return the name that the image's unpacked disk has, if there is one; None if it can have no such disk."""
    lowers = config.lowers[:-1] if config.acceleration_layer else config.lowers
    try:
        files = [lower.local_file() for lower in lowers]
        tops = topmost(lowers, files)
        found = {top: _identity_of(lowers[top], files[top]) for top in set(tops)}
        is_local = not any(is_fetched(lower, file) for lower, file in zip(lowers, files, strict=True))
        origin = "" if is_local else Repository.from_blob_url(config.repo_blob_url).cache_name
    except (ObdlabError, ValueError):  # opening the image reports it
        return None
    identity = [found[top] for top in tops]
    return name_of(identity, origin) if identity and all(identity) else None


def is_fetched(lower: LowerConfig, file: str | None) -> bool:
    """Return True if the registry is needed for a lower whose local file is ``file``."""
    return bool(lower.remote_target or (lower.digest and not file))


def with_target(identity: str, target: str, lower: LowerConfig) -> str:
    """Return the identity of a turboOCI layer from that of its metadata and of its target, '' if one is empty.

    The files by which the target is decoded and checked belong to it. Raises SourceError if one cannot be opened.
    """
    if not identity or not target:
        return ""
    by = [
        f", {what} {_of_file(path)}" for what, path in (("index", lower.gzip_index), ("sums", lower.tar_sums)) if path
    ]
    return f"{identity} with target {target}{''.join(by)}"


# An image may list a layer several times, and only the topmost shows.
def topmost(lowers: Sequence[LowerConfig], files: Sequence[str | None]) -> list[int]:
    """Return for each lower, whose local file is that of ``files``, the number of the topmost of the same content."""
    keys: list[Hashable] = []
    for number, (lower, file) in enumerate(zip(lowers, files, strict=True)):
        try:
            found = os.stat(file) if file else None
        except OSError:  # opening it reports the error
            keys.append(number)
            continue
        stored = (found.st_dev, found.st_ino) if found is not None else lower.digest or number
        keys.append((stored, lower.target_file, lower.target_digest, lower.gzip_index, lower.tar_sums))
    last = {key: number for number, key in enumerate(keys)}
    return [last[key] for key in keys]


def _identity_of(lower: LowerConfig, file: str | None) -> str:
    found = _of_file(file) if file else lower.digest
    if not lower.is_turbo:
        return found
    return with_target(found, _of_file(lower.target_file) if lower.target_file else lower.target_digest, lower)


def _of_file(path: str | os.PathLike[str]) -> str:
    with LocalFile(path) as file:
        return file.identity()
