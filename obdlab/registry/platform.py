"""The platform of an image, in the names of Go's GOOS and GOARCH (as image indexes use them)."""

from __future__ import annotations

import os

from obdlab.errors import ObdlabError
from obdlab.formats.oci import Platform

_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
    "loongarch64": ("loong64", ""),
}


class PlatformError(ObdlabError, code="platform"):
    """The text is not a platform."""


def host_platform() -> Platform:
    """Return the platform of this machine."""
    machine = os.uname().machine
    architecture, variant = _ARCHITECTURES.get(machine, (machine, ""))
    return Platform("linux", architecture, variant)


def parse_platform(text: str) -> Platform:
    """Read ``os/architecture[/variant]``. Raises PlatformError."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise PlatformError(f"malformed platform (got {text!r}, wanted os/architecture[/variant])")
    return Platform(*parts)
