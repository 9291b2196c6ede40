"""Image names: the transports of sources and destinations.

``docker://HOST/NAME:TAG`` (a registry; the prefix may be left out), ``oci:DIR[:TAG]`` (an OCI layout directory; the
prefix may be left out for an existing one), ``oci-archive:FILE[:TAG]`` (a layout in a tar),
``docker-archive:FILE[:NAME:TAG]`` (output of ``docker save``) and ``containerd:NAMESPACE:NAME`` (containerd's
stores). The names are those of skopeo (containers-transports(5)), except for containerd's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.containerd.client import DEFAULT_ADDRESS
from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
from obdlab.convert.endpoints.layout import ImageLayout, is_layout, split_tag
from obdlab.convert.endpoints.layoutimages import LayoutDestination, LayoutSource
from obdlab.convert.endpoints.registryimages import RegistryDestination, RegistrySource
from obdlab.errors import FormatError
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from obdlab.registry.client import RegistryClient

__all__ = [
    "ImageDestination",
    "ImageSource",
    "check_apart",
    "in_registry",
    "names_image",
    "open_destination",
    "open_source",
]

_REGISTRY = "docker"
_LAYOUT = "oci"
_ARCHIVE = "oci-archive"
_DOCKER_ARCHIVE = "docker-archive"
_CONTAINERD = "containerd"
_TRANSPORTS = (_REGISTRY, _LAYOUT, _ARCHIVE, _DOCKER_ARCHIVE, _CONTAINERD)
# Other transports of skopeo, which must not be taken for registries.
_NOT_HERE = ("dir", "docker-daemon", "containers-storage", "ostree", "sif", "tarball")
# containerd, pkg/identifiers
_NAMESPACE = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*", re.ASCII)


def open_source(text: str, client: RegistryClient, *, containerd: str = DEFAULT_ADDRESS) -> ImageSource:
    """Return the image named ``text``; close it after use. ``containerd`` is the path of its socket.

    Raises FormatError if ``text`` is not an image's name, or names a file or directory that is not an image. Errors
    of opening an archive or containerd pass through.
    """
    transport, rest = _split(text)
    if transport == _LAYOUT:
        root, tag = split_tag(rest)
        return LayoutSource(ImageLayout(root), tag)
    if transport in (_ARCHIVE, _DOCKER_ARCHIVE):
        from obdlab.convert.endpoints.archive import ArchivedLayout, DockerArchiveSource

        if transport == _DOCKER_ARCHIVE:
            return DockerArchiveSource(*_split_file(rest))
        path, tag = split_tag(rest)
        return LayoutSource(ArchivedLayout(path), tag, _ARCHIVE)
    if transport == _CONTAINERD:
        from obdlab.convert.endpoints.containerdimages import ContainerdSource

        return ContainerdSource(containerd, *_split_namespace(text, rest))
    _check_no_path(text)
    return RegistrySource(Reference.parse(rest), client)


def open_destination(text: str, client: RegistryClient, *, containerd: str = DEFAULT_ADDRESS) -> ImageDestination:
    """Return the destination named ``text``; close it after use. The default tag of a layout is "latest".

    Raises FormatError if ``text`` does not name a writable destination, SourceError if the directory cannot be used;
    errors of containerd pass through.
    """
    transport, rest = _split(text)
    if transport == _LAYOUT:
        root, tag = split_tag(rest)
        return LayoutDestination(root, tag or "latest")
    if transport == _ARCHIVE:
        from obdlab.convert.endpoints.archive import ArchiveDestination

        path, tag = split_tag(rest)
        return ArchiveDestination(path, tag or "latest")
    if transport == _CONTAINERD:
        from obdlab.convert.endpoints.containerdimages import ContainerdDestination

        return ContainerdDestination(containerd, *_split_namespace(text, rest))
    if transport == _DOCKER_ARCHIVE:
        raise FormatError(
            "docker's archives cannot hold overlaybd layers' annotations", blob=text, wanted=f"{_ARCHIVE}:FILE:TAG"
        )
    return RegistryDestination(Reference.parse(rest), client)


# A text that looks like a path mostly is one; a reference of the same form can be given with its registry or tag.
def _check_no_path(text: str) -> None:
    path = Path(text)
    if not names_image(text) and (path.exists() or text.startswith(("/", "./", "../"))):
        kind = (
            "a directory, but no OCI layout" if path.is_dir() else "a file" if path.exists() else "no such directory"
        )
        raise FormatError(
            kind,
            blob=text,
            wanted=f"oci:DIR, {_ARCHIVE}:FILE, {_DOCKER_ARCHIVE}:FILE, or an image in a registry as HOST/NAME:TAG",
        )


def names_image(text: str) -> bool:
    """Return True if ``text`` can only mean an image: it has a transport, a tag or a host, and is not a file."""
    if Path(text).is_file():
        return False
    first, slash, _ = text.partition("/")
    if text.partition(":")[0] in _TRANSPORTS or is_layout(Path(text)):
        return True
    return ":" in text if not slash else first == "localhost" or (first[:1] != "." and any(c in first for c in ".:"))


def in_registry(text: str) -> bool:
    """Return True if ``text`` names an image in a registry. Raises FormatError for an unknown transport."""
    return _split(text)[0] == _REGISTRY


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
    transport, rest = _split(text)
    if transport == _LAYOUT:
        root, tag = split_tag(rest)
        return root.resolve(), tag or default_tag or ImageLayout(root).only_tag()
    if transport in (_ARCHIVE, _DOCKER_ARCHIVE):
        path = split_tag(rest)[0] if transport == _ARCHIVE else _split_file(rest)[0]
        return path.resolve(), None
    if transport == _CONTAINERD:
        return _split_namespace(text, rest)
    _check_no_path(text)
    reference = Reference.parse(rest)
    return (reference.host, reference.repository), reference.tag or reference.digest


def _split(text: str) -> tuple[str, str]:
    transport, colon, rest = text.partition(":")
    if transport == _REGISTRY and rest.startswith("//"):
        return transport, rest.removeprefix("//")
    if colon and transport in _TRANSPORTS[1:]:
        if not rest:
            raise FormatError("image name ends after its transport", got=repr(text), wanted=f"{transport}:...")
        return transport, rest
    if colon and transport in _NOT_HERE:
        known = ", ".join(["docker://", *(f"{name}:" for name in _TRANSPORTS[1:])])
        raise FormatError("transport is not known here", got=f"{transport}:", wanted=f"one of {known}")
    return (_LAYOUT, text) if is_layout(Path(text)) else (_REGISTRY, text)


def _split_file(rest: str) -> tuple[Path, str | None]:
    # Path and tag may hold colons. The path is the whole text if it is a file, else its shortest such prefix.
    at = rest.find(":")
    while at >= 0 and not Path(rest).is_file():
        if Path(rest[:at]).is_file():
            return Path(rest[:at]), rest[at + 1 :] or None
        at = rest.find(":", at + 1)
    return Path(rest), None


def _split_namespace(text: str, rest: str) -> tuple[str, str]:
    namespace, colon, name = rest.partition(":")
    if not colon or not name or _NAMESPACE.fullmatch(namespace) is None:
        raise FormatError(
            "malformed image name", got=repr(text), wanted="containerd:NAMESPACE:NAME, NAME as containerd lists it"
        )
    return namespace, name
