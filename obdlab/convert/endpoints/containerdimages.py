"""Images in containerd's content store: reading from it and importing into it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from obdlab.blob import Blob, check_range
from obdlab.containerd import gclabels
from obdlab.containerd.client import Containerd
from obdlab.containerd.errors import NotFoundError
from obdlab.containerd.images import Image
from obdlab.convert.endpoints.endpoint import DownloadedSource, ImageDestination
from obdlab.errors import FormatError, SourceError
from obdlab.formats import oci

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from obdlab.call import Call


_COPY = 1 << 20
# The lease keeps content of a killed conversion for this time; the next conversion finds it.
_LEASE_S = 24 * 3600.0


class ContainerdSource(DownloadedSource):
    """An image of one namespace, by its name in containerd."""

    def __init__(self, address: str, namespace: str, image: str) -> None:
        self.name = f"containerd:{namespace}:{image}"
        self._image = image
        self._place = _place(address, namespace)
        self._client = Containerd(address, namespace)

    @property
    def place(self) -> tuple[str, str] | None:
        return self._place

    def close(self) -> None:
        self._client.close()

    def _download(self, layer: oci.Descriptor) -> Iterator[bytes]:
        try:
            yield from self._client.content.stream(layer.digest, layer.size)
        except NotFoundError as error:
            raise SourceError(
                "containerd does not have this layer (pulled for another platform, or its content was discarded)",
                blob=f"{self.name}@{layer.digest}",
            ) from error

    def open_blob(self, descriptor: oci.Descriptor) -> Blob:
        return _StoredBlob(self._client, self.name, descriptor)

    def beside(self, digest: str) -> oci.Descriptor | None:
        try:
            info = self._client.content.info(digest)
            # containerd answers that from its database, also if the file is gone or cut.
            if info.size and not self._client.content.read_range(digest, info.size - 1, 1):
                what = f"containerd's content ends early (wanted {info.size} bytes)"
                raise SourceError(what, blob=f"{self.name}@{digest}")
        except NotFoundError:
            return None
        return oci.Descriptor(oci.UNKNOWN_TYPE, digest, info.size)

    def root(self) -> tuple[oci.Descriptor | None, oci.Manifest | oci.Index]:
        try:
            image = self._client.images.get(self._image)
        except NotFoundError as error:
            known = sorted(image.name for image in self._client.images.list())
            raise FormatError(
                "containerd has no such image", blob=self.name, got=", ".join(known[:20]) or "no images"
            ) from error
        descriptor = oci.Descriptor(image.media_type, image.digest, image.size)
        return descriptor, self._document(descriptor)

    def _read(self, descriptor: oci.Descriptor, max_size: int) -> bytes:
        if descriptor.size > max_size:
            raise FormatError("blob too large", blob=self.name, got=descriptor.size, wanted=f"at most {max_size}")
        try:
            return self._client.content.read(descriptor.digest)
        except NotFoundError as error:
            raise SourceError("containerd does not have it", blob=f"{self.name}@{descriptor.digest}") from error


class ContainerdDestination(ImageDestination):
    """An image of one namespace. A lease keeps its content until the image refers to it."""

    def __init__(self, address: str, namespace: str, image: str) -> None:
        self.name = f"containerd:{namespace}:{image}"
        self._image = image
        self._place = _place(address, namespace)
        self._ended = ExitStack()
        client = Containerd(address, namespace)
        self._ended.callback(client.close)
        try:
            self._client = self._ended.enter_context(client.lease(expire_s=_LEASE_S))
        except BaseException:
            self._ended.close()
            raise

    @property
    def place(self) -> tuple[str, str] | None:
        return self._place

    def has(self, descriptor: oci.Descriptor) -> bool:
        try:
            info = self._client.content.info(descriptor.digest)
        except NotFoundError:
            return False
        # Beginning a write of existing content adds it to the lease.
        return info.size == descriptor.size and not self._client.content.ingest(
            descriptor.digest, descriptor.size, _nothing(descriptor.digest)
        )

    def open_blob(self, descriptor: oci.Descriptor) -> Blob:
        return _StoredBlob(self._client, self.name, descriptor)

    def manifest(self, digest: str) -> bytes | None:
        try:
            return self._client.content.read(digest)
        except NotFoundError:
            return None

    def put_file(self, descriptor: oci.Descriptor, path: Path, advance: Callable[[int], None]) -> bool:
        def pieces() -> Iterator[bytes]:
            with path.open("rb", buffering=0) as file:
                while piece := file.read(_COPY):
                    yield piece
                    advance(len(piece))

        try:
            return self._client.content.ingest(descriptor.digest, descriptor.size, pieces())
        except OSError as error:
            raise SourceError(f"cannot read the layer: {error.strerror}", blob=str(path)) from error

    def put_bytes(self, descriptor: oci.Descriptor, data: bytes) -> None:
        self._client.content.write(descriptor.digest, data)

    def put_manifest(self, descriptor: oci.Descriptor, data: bytes, *, tagged: bool = True) -> None:
        self._client.content.write(descriptor.digest, data, _references(oci.parse_manifest(data, self.name)))
        if tagged:
            self._client.images.put(Image(self._image, descriptor.media_type, descriptor.digest, len(data), {}))

    def close(self) -> None:
        self._ended.close()


def _place(address: str, namespace: str) -> tuple[str, str]:
    return "containerd", f"{address}#{namespace}"


def _nothing(digest: str) -> Iterator[bytes]:
    raise SourceError("containerd lost the blob meanwhile", blob=digest, temporary=True)
    yield b""


def _references(document: oci.Manifest | oci.Index) -> dict[str, str]:
    if isinstance(document, oci.Index):
        return gclabels.of_index(entry.digest for entry in document.manifests)
    return gclabels.of_manifest(document)


class _StoredBlob(Blob):
    # A blob of the content store, read by position.
    def __init__(self, client: Containerd, name: str, descriptor: oci.Descriptor) -> None:
        self.name = f"{name}@{descriptor.digest}"
        self._client = client
        self._descriptor = descriptor

    @property
    def size(self) -> int:
        return self._descriptor.size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        data = self._client.content.read_range(self._descriptor.digest, offset, length) if length else b""
        if len(data) != length:
            raise SourceError("containerd gave fewer bytes than asked for", blob=self.name, offset=offset)
        return data
