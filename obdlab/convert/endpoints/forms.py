"""The forms of image names, and the only parsing of them. Imports nothing that reads images.

The names are those of skopeo (containers-transports(5)), except for containerd's.
"""

from __future__ import annotations

import re
from pathlib import Path

from obdlab.convert.endpoints.layout import is_layout
from obdlab.errors import FormatError

REGISTRY, LAYOUT, ARCHIVE, DOCKER_ARCHIVE, CONTAINERD = "docker", "oci", "oci-archive", "docker-archive", "containerd"
TRANSPORTS = (REGISTRY, LAYOUT, ARCHIVE, DOCKER_ARCHIVE, CONTAINERD)
#: All forms, for errors.
FORMS = (
    "HOST/NAME:TAG, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME:TAG] or "
    "containerd:[NAMESPACE:]NAME"
)
# Other transports of skopeo, which must not be taken for registries.
_NOT_HERE = ("dir", "docker-daemon", "containers-storage", "ostree", "sif", "tarball")
# containerd, pkg/identifiers
_NAMESPACE = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*", re.ASCII)
_NAMESPACE_DEFAULT = "default"
_PORT = re.compile(r"[0-9]{1,5}/", re.ASCII)


def split_transport(text: str) -> tuple[str, str]:
    """Return the transport of an image's name, and the rest of the name.

    Without a transport, an existing OCI layout directory is one, anything else is in a registry. Raises FormatError
    for a transport that is unknown, or that nothing follows.
    """
    transport, colon, rest = text.partition(":")
    if transport == REGISTRY and rest.startswith("//"):
        return transport, rest.removeprefix("//")
    if colon and transport in TRANSPORTS[1:]:
        if not rest:
            raise FormatError("image name ends after its transport", got=repr(text), wanted=FORMS)
        return transport, rest
    if colon and transport in _NOT_HERE:
        raise FormatError("transport is not known here", got=f"{transport}:", wanted=FORMS)
    return (LAYOUT, text) if is_layout(Path(text)) else (REGISTRY, text)


def in_registry(text: str) -> bool:
    """Return True if ``text`` names an image in a registry. Raises FormatError for an unknown transport."""
    return split_transport(text)[0] == REGISTRY


def names_image(text: str) -> bool:
    """Return True if ``text`` can only mean an image: it has a transport, a tag or a host, and is not a file."""
    if Path(text).is_file():
        return False
    first, slash, _ = text.partition("/")
    if text.partition(":")[0] in TRANSPORTS or is_layout(Path(text)):
        return True
    return ":" in text if not slash else first == "localhost" or (first[:1] != "." and any(c in first for c in ".:"))


def check_no_path(text: str) -> None:
    """Raise FormatError if a name without a transport looks like a path: then it mostly is one.

    A reference of the same form can be given with its registry or tag.
    """
    path = Path(text)
    if not names_image(text) and (path.exists() or text.startswith(("/", "./", "../"))):
        kind = (
            "a directory, but no OCI layout" if path.is_dir() else "a file" if path.exists() else "no such directory"
        )
        raise FormatError(f"{kind}, and not the name of an image", blob=text, wanted=FORMS)


def split_namespace(text: str, rest: str) -> tuple[str, str]:
    """Return namespace and name of ``containerd:[NAMESPACE:]NAME``. Raises FormatError if malformed.

    Without a namespace it is "default". HOST:PORT/... is a name, as no image of containerd's has a name that begins
    with a port.
    """
    namespace, colon, name = rest.partition(":")
    if colon and _NAMESPACE.fullmatch(namespace) and not _PORT.match(name):
        if name:
            return namespace, name
    elif "/" in rest:
        return _NAMESPACE_DEFAULT, rest
    raise FormatError(
        "malformed image name", got=repr(text), wanted="containerd:[NAMESPACE:]NAME, NAME as containerd lists it"
    )
