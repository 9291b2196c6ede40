"""Images as they are read and stored, whatever they lie in: what every source and every destination can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from obdlab.errors import FormatError
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
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.blob import Blob
    from obdlab.convert.layout import VerifiedFile

LAYER_TYPES = (OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, DOCKER_LAYER, DOCKER_LAYER_GZIP, DOCKER_LAYER_ZSTD)
_MAX_NESTED_INDEXES = 4


class ImageSource(ABC):
    """An image to read. Content is checked against size and digest before its last byte is given out."""

    #: The image's name for messages.
    name: str

    @property
    def place(self) -> tuple[str, str] | None:
        """Host and repository that the image's blobs lie in; None where there is no such place."""
        return None

    def manifest(self, platform: Platform, *, overlaybd: bool = False) -> Manifest:
        """Return the image manifest, of an index the one for ``platform``. Raises as find()."""
        return self.find(platform, overlaybd=overlaybd)[1]

    def find(self, platform: Platform, *, overlaybd: bool = False) -> tuple[Descriptor, Manifest]:
        """Return the image manifest and its descriptor, of an index those for ``platform``.

        An image that is an overlaybd one is refused, unless ``overlaybd``. Raises SourceError if it
        cannot be had, FormatError if it is malformed or no container image.
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
        """Return an image manifest that an index names. Raises as find()."""
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

        ``advance`` is told how many bytes have come. Raises SourceError or CorruptBlobError.
        """

    def read(self, descriptor: Descriptor, max_size: int = MAX_MANIFEST_SIZE) -> bytes:
        """Return a manifest, index or config whole, checked. Raises SourceError, CorruptBlobError or FormatError."""
        return self._read(descriptor, max_size)

    @abstractmethod
    def open_blob(self, descriptor: Descriptor) -> Blob:
        """Return a blob to be read by position where it lies; nothing checks its digest. Raises SourceError."""

    def beside(self, digest: str) -> Descriptor | None:
        """Return a blob that lies where the image's do, part of it or not; None where that is not known."""
        return None

    def trace(self, digest: str) -> Descriptor | None:
        """Return the trace that refers to the image manifest ``digest``, if there is one."""
        return None

    @property
    def cache_name(self) -> str:
        """Under which name the block cache keeps the image's blobs; "" if it never does."""
        return ""

    def release(self, layer: VerifiedFile) -> None:
        """Close what fetch() returned, and remove it if it was downloaded."""
        layer.close()

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Give back what the source holds."""

    @abstractmethod
    def root(self) -> tuple[Descriptor | None, Manifest | Index]:
        """Return what the image's name names. The descriptor is None for an index made of a layout's entries.

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


class ImageDestination(ABC):
    """Where a converted image goes. May be used from several threads; close() ends its use, whatever happened."""

    name: str

    @property
    def place(self) -> tuple[str, str] | None:
        """Host and repository in which blobs stay for others to use; None where there is no such place."""
        return None

    @abstractmethod
    def put_file(self, descriptor: Descriptor, path: Path, advance: Callable[[int], None]) -> bool:
        """Store a blob that is in a file; False if it was there already. Raises SourceError.

        ``advance`` is told how many bytes have gone.
        """

    @abstractmethod
    def put_bytes(self, descriptor: Descriptor, data: bytes) -> None:
        """Store a small blob. Raises SourceError."""

    @abstractmethod
    def put_manifest(self, descriptor: Descriptor, data: bytes, *, tagged: bool = True) -> None:
        """Store a manifest or index, after what it names, under the destination's tag or only by its digest.

        Raises SourceError.
        """

    def has(self, descriptor: Descriptor) -> bool:
        """Tell whether the blob is there now, whole, and have it stay until the manifest is stored.

        Raises SourceError if that cannot be found out.
        """
        return False

    def share(self, descriptor: Descriptor, repository: str) -> bool:
        """Take over a blob that another repository of the same host has, without its bytes going anywhere.

        False if that one has it no more, or the host does not do such. Raises SourceError.
        """
        return False

    def open_blob(self, descriptor: Descriptor) -> Blob:
        """Return a blob that has() told of, or share() took over, read where it lies. Raises SourceError."""
        raise NotImplementedError  # not called where has() and share() never say so

    def manifest(self, digest: str) -> bytes | None:
        """Return a manifest stored before, its digest checked; None if it is gone. Raises SourceError."""
        return None

    def close(self) -> None:  # noqa: B027 - most destinations hold nothing
        """Give back what the destination holds. What was not named by put_manifest() may be gone after this."""
