"""Images that run, in a real registry: as any builder makes them, and converted."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from obdlab.convert.image import ConvertOptions, convert_image
from obdlab.convert.source import open_destination, open_source
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from tests.snapshotter import imagefiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def busybox_layer(files: Mapping[str, bytes] | None = None) -> bytes:
    """A layer with busybox as /bin/sh, and these files."""
    tar = imagefiles.LayerTar()
    for name in ("bin", "proc", "sys", "dev", "tmp", "etc"):
        tar.directory(name)
    tar.add("bin/busybox", imagefiles.busybox_bytes(), mode=0o755)
    tar.add("bin/sh", kind=b"2", linkname="busybox", mode=0o777)
    for name, data in (files or {}).items():
        tar.add(name, data)
    return tar.bytes()


def file_layer(files: Mapping[str, bytes]) -> bytes:
    """A layer with these files."""
    tar = imagefiles.LayerTar()
    for name, data in files.items():
        tar.add(name, data)
    return tar.bytes()


def push_plain(host: str, name: str, layers: Sequence[bytes], command: Sequence[str] = ("/bin/sh",)) -> str:
    """Push an ordinary image; return its reference."""
    return imagefiles.push(host, name, *imagefiles.image_documents(layers, command=command))


def push_pause(host: str) -> str:
    """Push an image for pods' sandboxes: it only waits, with a static busybox from Debian."""
    return push_plain(host, "e2e/pause", [busybox_layer()], ("/bin/busybox", "sleep", "inf"))


def push_converted(host: str, name: str, layers: Sequence[bytes], work_dir: Path) -> str:
    """Push an ordinary image and convert it; return the converted image's reference."""
    plain = push_plain(host, f"{name}-plain", layers)
    converted = f"{host}/{name}:obd"
    with closing(RegistryClient(Credentials.load(None))) as client:
        convert_image(
            open_source(plain, client), open_destination(converted, client), options=ConvertOptions(work_dir=work_dir)
        )
    return converted
