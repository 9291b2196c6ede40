"""Images in OCI layout directories."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
from obdlab.convert.endpoints.layout import ImageLayout, VerifiedFile
from obdlab.errors import CorruptBlobError
from obdlab.formats.oci import MAX_MANIFEST_SIZE, UNKNOWN_TYPE, Descriptor, Index, Manifest, digest_of
from obdlab.localfile import LocalFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.blob import Blob


class LayoutSource(ImageSource):
    """An image in an OCI layout directory."""

    def __init__(self, layout: ImageLayout, tag: str | None, transport: str = "oci") -> None:
        self.name = f"{transport}:{layout.root}" + (f":{tag}" if tag else "")
        self._layout = layout
        self._tag = tag

    def close(self) -> None:
        self._layout.close()

    def fetch(self, layer: Descriptor, directory: Path, advance: Callable[[int], None]) -> VerifiedFile:
        advance(layer.size)  # first: it raises if the conversion was stopped
        return self._layout.open_blob(layer)

    def layer_file(self, layer: Descriptor) -> Path | None:
        return self._layout.blob_file(layer)

    def beside(self, digest: str) -> Descriptor | None:
        size = self._layout.blob_size(digest)
        return None if size is None else Descriptor(UNKNOWN_TYPE, digest, size)

    def open_blob(self, descriptor: Descriptor) -> Blob:
        with self._layout.open_blob(descriptor) as file:
            return file.as_blob()

    def root(self) -> tuple[Descriptor | None, Manifest | Index]:
        entries = self._layout.select(self._tag)
        return (entries[0], self._document(entries[0])) if len(entries) == 1 else (None, Index(entries))

    def _read(self, descriptor: Descriptor, max_size: int) -> bytes:
        return self._layout.read_blob(descriptor, max_size)


class LayoutDestination(ImageDestination):
    """A tag in an OCI layout directory. The first blob makes the directory if it is missing.

    A conversion whose source cannot be read stores nothing, and so leaves no empty layout.
    """

    def __init__(self, root: Path, tag: str) -> None:
        self.name = f"oci:{root}:{tag}"
        self._layout = ImageLayout(root)
        self._layout.check_place()
        self._tag = tag
        self._making = threading.Lock()

    @property
    def place(self) -> tuple[str, str] | None:
        return "oci", str(self._layout.root.resolve())

    @property
    def keeps_unnamed(self) -> bool:
        return True

    def has(self, descriptor: Descriptor) -> bool:
        return self._layout.has_blob(descriptor)

    def open_blob(self, descriptor: Descriptor) -> Blob:
        return LocalFile(self._layout.blob_path(descriptor.digest))

    def manifest(self, digest: str) -> bytes | None:
        path = self._layout.blob_path(digest)
        if not path.is_file():
            return None
        with LocalFile(path) as file:
            data = file.read_at(0, min(file.size, MAX_MANIFEST_SIZE + 1))
        if digest_of(data) != digest:
            raise CorruptBlobError("wrong content", blob=str(path), got=digest_of(data), wanted=digest)
        return data

    def put_file(self, descriptor: Descriptor, path: Path, advance: Callable[[int], None]) -> bool:
        stored = self._made().add_file(descriptor.digest, path)
        advance(descriptor.size)
        return stored

    def put_bytes(self, descriptor: Descriptor, data: bytes) -> None:
        self._made().add_bytes(descriptor.digest, data)

    def put_manifest(self, descriptor: Descriptor, data: bytes, *, tagged: bool = True) -> None:
        self._made().add_bytes(descriptor.digest, data)
        if tagged:
            self._layout.set_tag(self._tag, descriptor)

    def _made(self) -> ImageLayout:
        with self._making:
            return ImageLayout.create(self._layout.root)
