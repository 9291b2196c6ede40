"""Opening images by their names, as sources and as destinations. The forms of names: forms.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.containerd.client import DEFAULT_ADDRESS
from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
from obdlab.convert.endpoints.forms import (
    ARCHIVE,
    CONTAINERD,
    DOCKER_ARCHIVE,
    LAYOUT,
    check_no_path,
    split_namespace,
    split_transport,
)
from obdlab.convert.endpoints.layout import ImageLayout, split_tag
from obdlab.convert.endpoints.layoutimages import LayoutDestination, LayoutSource
from obdlab.convert.endpoints.registryimages import RegistryDestination, RegistrySource
from obdlab.errors import FormatError
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from obdlab.registry.client import RegistryClient

__all__ = ["ImageDestination", "ImageSource", "check_apart", "open_destination", "open_source"]


def open_source(text: str, client: RegistryClient, *, containerd: str = DEFAULT_ADDRESS) -> ImageSource:
    """Return the image named ``text``; close it after use. ``containerd`` is the path of its socket.

    Raises FormatError if ``text`` is not an image's name, or names a file or directory that is not an image. Errors
    of opening an archive or containerd pass through.
    """
    transport, rest = split_transport(text)
    if transport == LAYOUT:
        root, tag = split_tag(rest)
        return LayoutSource(ImageLayout(root), tag)
    if transport in (ARCHIVE, DOCKER_ARCHIVE):
        from obdlab.convert.endpoints.archive import ArchivedLayout, DockerArchiveSource

        if transport == DOCKER_ARCHIVE:
            return DockerArchiveSource(*_split_file(rest))
        path, tag = split_tag(rest)
        return LayoutSource(ArchivedLayout(path), tag, ARCHIVE)
    if transport == CONTAINERD:
        from obdlab.convert.endpoints.containerdimages import ContainerdSource

        return ContainerdSource(containerd, *split_namespace(text, rest))
    check_no_path(text)
    return RegistrySource(Reference.parse(rest), client)


def open_destination(text: str, client: RegistryClient, *, containerd: str = DEFAULT_ADDRESS) -> ImageDestination:
    """Return the destination named ``text``; close it after use. The default tag of a layout is "latest".

    Raises FormatError if ``text`` does not name a writable destination, SourceError if the directory cannot be used;
    errors of containerd pass through.
    """
    transport, rest = split_transport(text)
    if transport == LAYOUT:
        root, tag = split_tag(rest)
        return LayoutDestination(root, tag or "latest")
    if transport == ARCHIVE:
        from obdlab.convert.endpoints.archive import ArchiveDestination

        path, tag = split_tag(rest)
        return ArchiveDestination(path, tag or "latest")
    if transport == CONTAINERD:
        from obdlab.convert.endpoints.containerdimages import ContainerdDestination

        return ContainerdDestination(containerd, *split_namespace(text, rest))
    if transport == DOCKER_ARCHIVE:
        raise FormatError(
            "docker's archives cannot hold overlaybd layers' annotations", blob=text, wanted=f"{ARCHIVE}:FILE:TAG"
        )
    return RegistryDestination(Reference.parse(rest), client)


def check_apart(source: str, destination: str) -> None:
    """Raise FormatError if the converted image would take the name of the image it is made from.

    The source would lose that name and, sooner or later, be deleted.
    """
    if _name_of(source, None) == _name_of(destination, "latest"):
        raise FormatError(
            "the converted image would replace its source", blob=destination, wanted="another tag or name"
        )


# The name that storing would overwrite. A layout's only image needs no tag; an archive is replaced as a whole.
def _name_of(text: str, default_tag: str | None) -> tuple[object, str | None]:
    transport, rest = split_transport(text)
    if transport == LAYOUT:
        root, tag = split_tag(rest)
        return root.resolve(), tag or default_tag or ImageLayout(root).only_tag()
    if transport in (ARCHIVE, DOCKER_ARCHIVE):
        path = split_tag(rest)[0] if transport == ARCHIVE else _split_file(rest)[0]
        return path.resolve(), None
    if transport == CONTAINERD:
        return split_namespace(text, rest)
    check_no_path(text)
    reference = Reference.parse(rest)
    return (reference.host, reference.repository), reference.tag or reference.digest


def _split_file(rest: str) -> tuple[Path, str | None]:
    # Path and tag may hold colons. The path is the whole text if it is a file, else its shortest such prefix.
    at = rest.find(":")
    while at >= 0 and not Path(rest).is_file():
        if Path(rest[:at]).is_file():
            return Path(rest[:at]), rest[at + 1 :] or None
        at = rest.find(":", at + 1)
    return Path(rest), None
