"""Where images come from and go to: registries and OCI layout directories behind one face each."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.convert.layout import ImageLayout, VerifiedFile, layout_of
from obdlab.errors import FormatError, SourceError
from obdlab.formats.oci import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    INDEX_TYPES,
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
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.registry.client import RegistryClient

LAYER_TYPES = (OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, DOCKER_LAYER, DOCKER_LAYER_GZIP, DOCKER_LAYER_ZSTD)
_MAX_NESTED_INDEXES = 4
_COPY = 1 << 20


class ImageSource(ABC):
    """An image to read. Content is checked against size and digest before its last byte is given out."""

    #: The image's name for messages.
    name: str

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

    def release(self, layer: VerifiedFile) -> None:
        """Close what fetch() returned, and remove it if it was downloaded."""
        layer.close()

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


class RegistrySource(ImageSource):
    """An image in a registry."""

    def __init__(self, reference: Reference, client: RegistryClient) -> None:
        self.name = str(reference)
        self._reference = reference
        self._client = client
        self._repository = client.repository(reference)

    def fetch(self, layer: Descriptor, directory: Path, advance: Callable[[int], None]) -> VerifiedFile:
        path = directory / f"source-{layer.digest.removeprefix('sha256:')}"
        try:
            with (
                path.open("wb", buffering=0) as file,
                self._client.stream_blob(self._repository, layer.digest, layer.size) as stream,
            ):
                while piece := stream.read(_COPY):
                    file.write(piece)
                    advance(len(piece))
        except OSError as error:
            raise SourceError(f"cannot download the layer: {error.strerror or error}", blob=str(path)) from error
        return VerifiedFile(path, layer)

    def release(self, layer: VerifiedFile) -> None:
        layer.close()
        with suppress(FileNotFoundError):
            os.unlink(layer.path)

    def root(self) -> tuple[Descriptor | None, Manifest | Index]:
        fetched = self._client.get_manifest(self._reference)
        document = parse_manifest(fetched.data, self.name)
        return Descriptor(document.media_type, fetched.digest, len(fetched.data)), document

    def _read(self, descriptor: Descriptor, max_size: int) -> bytes:
        if descriptor.media_type in INDEX_TYPES or max_size == MAX_MANIFEST_SIZE:
            return self._client.get_manifest(self._reference.with_digest(descriptor.digest)).data
        return self._client.read_blob(self._repository, descriptor.digest, descriptor.size, max_size)


class LayoutSource(ImageSource):
    """An image in an OCI layout directory."""

    def __init__(self, root: Path, tag: str | None) -> None:
        self.name = f"oci:{root}" + (f":{tag}" if tag else "")
        self._layout = ImageLayout(root)
        self._tag = tag

    def fetch(self, layer: Descriptor, directory: Path, advance: Callable[[int], None]) -> VerifiedFile:
        file = self._layout.open_blob(layer)
        advance(layer.size)
        return file

    def root(self) -> tuple[Descriptor | None, Manifest | Index]:
        entries = self._layout.select(self._tag)
        return (entries[0], self._document(entries[0])) if len(entries) == 1 else (None, Index(entries))

    def _read(self, descriptor: Descriptor, max_size: int) -> bytes:
        return self._layout.read_blob(descriptor, max_size)


class ImageDestination(ABC):
    """Where a converted image goes. May be used from several threads."""

    name: str

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


class RegistryDestination(ImageDestination):
    """A tag (or only a digest) in a registry."""

    def __init__(self, reference: Reference, client: RegistryClient) -> None:
        self.name = str(reference)
        self._reference = reference
        self._client = client
        self._repository = client.repository(reference)

    def put_file(self, descriptor: Descriptor, path: Path, advance: Callable[[int], None]) -> bool:
        return self._client.push_blob(
            self._repository, descriptor.digest, descriptor.size, lambda: _CountedFile(path, advance)
        )

    def put_bytes(self, descriptor: Descriptor, data: bytes) -> None:
        self._client.push_blob(self._repository, descriptor.digest, descriptor.size, lambda: io.BytesIO(data))

    def put_manifest(self, descriptor: Descriptor, data: bytes, *, tagged: bool = True) -> None:
        reference = self._reference if tagged else self._reference.with_digest(descriptor.digest)
        self._client.put_manifest(reference, descriptor.media_type, data)


class LayoutDestination(ImageDestination):
    """A tag in an OCI layout directory, which is made if it does not exist."""

    def __init__(self, root: Path, tag: str) -> None:
        self.name = f"oci:{root}:{tag}"
        self._layout = ImageLayout.create(root)
        self._tag = tag

    def put_file(self, descriptor: Descriptor, path: Path, advance: Callable[[int], None]) -> bool:
        stored = self._layout.add_file(descriptor.digest, path)
        advance(descriptor.size)
        return stored

    def put_bytes(self, descriptor: Descriptor, data: bytes) -> None:
        self._layout.add_bytes(descriptor.digest, data)

    def put_manifest(self, descriptor: Descriptor, data: bytes, *, tagged: bool = True) -> None:
        self._layout.add_bytes(descriptor.digest, data)
        if tagged:
            self._layout.set_tag(self._tag, descriptor)


class _CountedFile(io.FileIO):
    # A file to upload that tells how much of it has gone.
    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        super().__init__(path)
        self._advance = advance

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._advance(len(data))
        return data


def check_apart(source: str, destination: str) -> None:
    """Raise FormatError if the converted image would take the name of the image it is made from.

    That name would be lost, and with it, sooner or later, the image.
    """
    if _name_of(source, None) == _name_of(destination, "latest"):
        raise FormatError(
            "the converted image would replace its source", blob=destination, wanted="another tag or name"
        )


# What is overwritten when something is stored under the name. A layout's only image needs no tag.
def _name_of(text: str, default_tag: str | None) -> tuple[object, str | None]:
    layout = layout_of(text)
    if layout:
        root, tag = layout
        return root.resolve(), tag or default_tag or ImageLayout(root).only_tag()
    reference = Reference.parse(text)
    return (reference.host, reference.repository), reference.tag or reference.digest


def open_source(text: str, client: RegistryClient) -> ImageSource:
    """Return the image that ``text`` names: ``oci:DIR[:TAG]``, an OCI layout directory, or a registry reference.

    Raises FormatError if it is none of these.
    """
    layout = layout_of(text)
    return LayoutSource(*layout) if layout else RegistrySource(Reference.parse(text), client)


def open_destination(text: str, client: RegistryClient) -> ImageDestination:
    """Return the place that ``text`` names: ``oci:DIR[:TAG]``, an OCI layout directory, or a registry reference.

    The tag is "latest" if there is none. Raises FormatError, or SourceError if the directory cannot be used.
    """
    layout = layout_of(text)
    if layout:
        return LayoutDestination(layout[0], layout[1] or "latest")
    return RegistryDestination(Reference.parse(text), client)
