"""Interfaces of every source and destination of images: reading and storing."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING

from obdlab.convert.endpoints.layout import VerifiedFile
from obdlab.errors import FormatError, SourceError
from obdlab.formats.oci import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    MAX_CONFIG_SIZE,
    MAX_MANIFEST_SIZE,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    Config,
    Descriptor,
    Index,
    Manifest,
    Platform,
    parse_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from obdlab.blob import Blob

LAYER_TYPES = (OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, DOCKER_LAYER, DOCKER_LAYER_GZIP, DOCKER_LAYER_ZSTD)
_MAX_NESTED_INDEXES = 4


class ImageSource(ABC):
    """An image to read. Content is checked against size and digest before its last byte is returned."""

    #: The image's name in messages.
    name: str

    @property
    def place(self) -> tuple[str, str] | None:
        """Host and repository with the image's blobs; None for sources without such a place."""
        return None

    def manifest(self, platform: Platform, *, overlaybd: bool = False) -> Manifest:
        """Return the image manifest, from an index that for ``platform``. Raises as find()."""
        return self.find(platform, overlaybd=overlaybd)[1]

    def find(self, platform: Platform, *, overlaybd: bool = False) -> tuple[Descriptor, Manifest]:
        """Return the image manifest and its descriptor, from an index those for ``platform``.

        An overlaybd image is refused, unless ``overlaybd``. Raises SourceError if the image cannot be read,
        FormatError if it is malformed or not a container image.
        """
        descriptor, document = self.root()
        for _ in range(_MAX_NESTED_INDEXES):
            if isinstance(document, Manifest):
                assert descriptor is not None
                return descriptor, self._checked(document, overlaybd=overlaybd)
            descriptor = document.select(platform)
            document = self._document(descriptor)
        raise FormatError("indexes nested too deep", blob=self.name)

    def child(self, descriptor: Descriptor) -> Manifest:
        """Return an image manifest from an index's entry. Raises as find()."""
        document = self._document(descriptor)
        if isinstance(document, Manifest):
            return self._checked(document, overlaybd=False)
        raise FormatError("index names an index", blob=f"{self.name}@{descriptor.digest}", wanted="an image manifest")

    def config(self, manifest: Manifest) -> Config:
        """Return the image config, which must describe as many layers as the manifest has. Raises as manifest()."""
        config = Config.parse(self._read(manifest.config, MAX_CONFIG_SIZE), f"{self.name} config")
        if len(config.diff_ids) != len(manifest.layers):
            raise FormatError(
                "config and manifest disagree about the number of layers",
                blob=self.name,
                got=f"{len(config.diff_ids)} diff_ids",
                wanted=f"{len(manifest.layers)} layers",
            )
        return config

    @abstractmethod
    def fetch(self, layer: Descriptor, directory: Path, advance: Callable[[int], None]) -> VerifiedFile:
        """Return the layer blob as a local file, downloaded to ``directory`` if need be.

        ``advance`` is called with the number of bytes received. Raises SourceError or CorruptBlobError.
        """

    def read(self, descriptor: Descriptor, max_size: int = MAX_MANIFEST_SIZE) -> bytes:
        """Return a whole manifest, index or config, checked. Raises SourceError, CorruptBlobError or FormatError."""
        return self._read(descriptor, max_size)

    @abstractmethod
    def open_blob(self, descriptor: Descriptor) -> Blob:
        """Return a blob that is read in place, by position; its digest is not checked. Raises SourceError."""

    def layer_file(self, layer: Descriptor) -> Path | None:
        """Return the path of the file that is the layer's blob; None if no file holds just this blob."""
        return None

    def beside(self, digest: str) -> Descriptor | None:
        """Return a blob stored beside the image's, part of it or not; None if the source cannot look it up."""
        return None

    def trace(self, digest: str) -> Descriptor | None:
        """Return the trace that refers to the image manifest ``digest``, if there is one."""
        return None

    @property
    def cache_name(self) -> str:
        """Name of the image's blobs in the block cache; "" if it never keeps them."""
        return ""

    def release(self, layer: VerifiedFile) -> None:
        """Close the file of fetch(), and remove it if it was downloaded."""
        layer.close()

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Release the source's resources."""

    @abstractmethod
    def root(self) -> tuple[Descriptor | None, Manifest | Index]:
        """Return the document of the image's name. The descriptor is None for an index made of a layout's entries.

        Raises SourceError or FormatError.
        """

    @abstractmethod
    def _read(self, descriptor: Descriptor, max_size: int) -> bytes: ...

    def _document(self, descriptor: Descriptor) -> Manifest | Index:
        return parse_manifest(self._read(descriptor, MAX_MANIFEST_SIZE), f"{self.name}@{descriptor.digest}")

    def _checked(self, manifest: Manifest, *, overlaybd: bool) -> Manifest:
        if manifest.is_overlaybd and not overlaybd:
            raise FormatError("image is an overlaybd image already", blob=self.name)
        if manifest.config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
            raise FormatError("not a container image", blob=self.name, got=manifest.config.media_type)
        for layer in manifest.layers:
            if layer.media_type not in LAYER_TYPES:
                raise FormatError(
                    f"layer {layer.digest} is of no known type",
                    blob=self.name,
                    got=layer.media_type,
                    wanted="tar, tar+gzip or tar+zstd",
                )
        return manifest


class DownloadedSource(ImageSource):
    """A source whose layers are downloaded to be read."""

    @abstractmethod
    def _download(self, layer: Descriptor) -> Iterator[bytes]:
        """Yield the layer's bytes in pieces. Raises SourceError."""

    def fetch(self, layer: Descriptor, directory: Path, advance: Callable[[int], None]) -> VerifiedFile:
        path = directory / f"source-{layer.digest.removeprefix('sha256:')}"
        try:
            with path.open("wb", buffering=0) as file:
                for piece in self._download(layer):
                    file.write(piece)
                    advance(len(piece))
        except OSError as error:
            raise SourceError(f"cannot download the layer: {error.strerror or error}", blob=str(path)) from error
        return VerifiedFile(path, layer, name=f"{self.name}@{layer.digest}")

    def release(self, layer: VerifiedFile) -> None:
        layer.close()
        with suppress(FileNotFoundError):
            os.unlink(layer.path)


class ImageDestination(ABC):
    """The destination of a converted image. Thread-safe; close() ends its use, also after errors."""

    name: str

    @property
    def place(self) -> tuple[str, str] | None:
        """Host and repository in which blobs stay for reuse; None for destinations without such a place."""
        return None

    @property
    def keeps_unnamed(self) -> bool:
        """True if a stored blob stays for good even though no manifest names it."""
        return False

    @property
    def keeps_trees(self) -> bool:
        """True if readers of the image find the files of its layers' hash trees here."""
        return False

    @abstractmethod
    def put_file(self, descriptor: Descriptor, path: Path, advance: Callable[[int], None]) -> bool:
        """Store the blob in a file; return False if it was there already. Raises SourceError.

        ``advance`` is called with the number of bytes sent.
        """

    @abstractmethod
    def put_bytes(self, descriptor: Descriptor, data: bytes) -> None:
        """Store a small blob. Raises SourceError."""

    @abstractmethod
    def put_manifest(self, descriptor: Descriptor, data: bytes, *, tagged: bool = True) -> None:
        """Store a manifest or index, after its content, under the destination's tag or only by its digest.

        Raises SourceError.
        """

    def has(self, descriptor: Descriptor) -> bool:
        """Return True if the whole blob is there, and keep it until the manifest is stored.

        Raises SourceError if the destination does not answer.
        """
        return False

    def share(self, descriptor: Descriptor, repository: str) -> bool:
        """Share a blob from another repository of the same host, without transferring its bytes.

        Returns False if that repository no longer has it, or the host does not support sharing. Raises SourceError.
        """
        return False

    def open_blob(self, descriptor: Descriptor) -> Blob:
        """Return a blob for which has() or share() returned True, read in place. Raises SourceError."""
        raise NotImplementedError  # not called if has() and share() never return True

    def manifest(self, digest: str) -> bytes | None:
        """Return an earlier manifest, its digest checked; None if it is gone. Raises SourceError."""
        return None

    def close(self) -> None:  # noqa: B027 - most destinations hold nothing
        """Release the destination's resources. Content without a manifest from put_manifest() may be lost."""
