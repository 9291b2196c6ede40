"""Images in registries."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from obdlab.blob import Blob, check_range
from obdlab.convert.endpoints.endpoint import DownloadedSource, ImageDestination
from obdlab.formats.oci import (
    HOT_LAYER,
    INDEX_TYPES,
    MAX_MANIFEST_SIZE,
    UNKNOWN_TYPE,
    Descriptor,
    Index,
    Manifest,
    parse_manifest,
)
from obdlab.image.from_manifest import TRACE_ARTIFACT, find_trace
from obdlab.registry.errors import RegistryError
from obdlab.registry.remoteblob import RemoteBlob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from obdlab.call import Call
    from obdlab.registry.client import RegistryClient
    from obdlab.registry.reference import Reference

_COPY = 1 << 20
# Size and number of cached pieces. The metadata of a layer below is read in many places, much of it together.
_PIECE = 256 << 10
_PIECES = 64


class RegistrySource(DownloadedSource):
    """An image in a registry."""

    def __init__(self, reference: Reference, client: RegistryClient) -> None:
        self.name = str(reference)
        self._reference = reference
        self._client = client
        self._repository = client.repository(reference)

    @property
    def place(self) -> tuple[str, str] | None:
        return self._repository.host, self._repository.name

    def _download(self, layer: Descriptor) -> Iterator[bytes]:
        with self._client.stream_blob(self._repository, layer.digest, layer.size) as stream:
            while piece := stream.read(_COPY):
                yield piece

    def open_blob(self, descriptor: Descriptor) -> Blob:
        return RemoteBlob(self._client, self._repository, descriptor.digest, descriptor.size)

    def beside(self, digest: str) -> Descriptor | None:
        if not self._client.has_blob(self._repository, digest):
            return None
        return Descriptor(UNKNOWN_TYPE, digest, self._client.blob_size(self._repository, digest))

    def trace(self, digest: str) -> Descriptor | None:
        found = find_trace(self._client, self._reference, digest)
        if not found.digest:
            return None
        return Descriptor(TRACE_ARTIFACT, found.digest, found.size, {HOT_LAYER: "yes"} if found.hot else {})

    @property
    def cache_name(self) -> str:
        return self._repository.cache_name

    def root(self) -> tuple[Descriptor | None, Manifest | Index]:
        fetched = self._client.get_manifest(self._reference)
        document = parse_manifest(fetched.data, self.name)
        return Descriptor(document.media_type, fetched.digest, len(fetched.data)), document

    def _read(self, descriptor: Descriptor, max_size: int) -> bytes:
        if descriptor.media_type in INDEX_TYPES or max_size == MAX_MANIFEST_SIZE:
            return self._client.get_manifest(self._reference.with_digest(descriptor.digest)).data
        return self._client.read_blob(self._repository, descriptor.digest, descriptor.size, max_size)


class RegistryDestination(ImageDestination):
    """A tag, or only a digest, in a registry."""

    def __init__(self, reference: Reference, client: RegistryClient) -> None:
        self.name = str(reference)
        self._reference = reference
        self._client = client
        self._repository = client.repository(reference)

    @property
    def place(self) -> tuple[str, str] | None:
        return self._repository.host, self._repository.name

    @property
    def keeps_trees(self) -> bool:
        return True

    def has(self, descriptor: Descriptor) -> bool:
        return self._client.has_blob(self._repository, descriptor.digest)

    def share(self, descriptor: Descriptor, repository: str) -> bool:
        return self._client.mount_blob(self._repository, descriptor.digest, repository)

    def open_blob(self, descriptor: Descriptor) -> Blob:
        return _Recent(RemoteBlob(self._client, self._repository, descriptor.digest, descriptor.size))

    def manifest(self, digest: str) -> bytes | None:
        try:
            return self._client.get_manifest(self._reference.with_digest(digest), helped=False).data
        except RegistryError as error:
            if error.status == 404:
                return None
            raise

    def put_file(self, descriptor: Descriptor, path: Path, advance: Callable[[int], None]) -> bool:
        return self._client.push_blob(
            self._repository, descriptor.digest, descriptor.size, lambda: _CountedFile(path, advance)
        )

    def put_bytes(self, descriptor: Descriptor, data: bytes) -> None:
        self._client.push_blob(self._repository, descriptor.digest, descriptor.size, lambda: io.BytesIO(data))

    def put_manifest(self, descriptor: Descriptor, data: bytes, *, tagged: bool = True) -> None:
        reference = self._reference if tagged else self._reference.with_digest(descriptor.digest)
        self._client.put_manifest(reference, descriptor.media_type, data)


class _Recent(Blob):
    # A blob with a cache of recent pieces. A wrong piece fails ZFile's checksums, is evicted and read again.
    below: Blob

    def __init__(self, blob: Blob) -> None:
        self.name = blob.name
        self.below = blob
        self._pieces: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return self.below.size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        if not length:
            return b""
        first, last = offset // _PIECE, (offset + length - 1) // _PIECE
        data = b"".join(self._piece(number, call) for number in range(first, last + 1))
        return data[offset - first * _PIECE :][:length]

    def evict(self, offset: int, length: int) -> None:
        with self._lock:
            self._pieces.clear()
        self.below.evict(offset, length)

    def _piece(self, number: int, call: Call | None) -> bytes:
        with self._lock:
            piece = self._pieces.get(number)
            if piece is not None:
                self._pieces.move_to_end(number)
                return piece
        begin = number * _PIECE
        piece = self.below.read_at(begin, min(_PIECE, self.size - begin), call)
        with self._lock:
            self._pieces[number] = piece
            if len(self._pieces) > _PIECES:
                self._pieces.popitem(last=False)
        return piece


class _CountedFile(io.FileIO):
    # A file to upload that reports the bytes sent.
    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        super().__init__(path)
        self._advance = advance

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._advance(len(data))
        return data
