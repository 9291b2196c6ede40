"""Images that run, in a real registry: as any builder makes them, and converted."""

from __future__ import annotations

import io
import json
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions, convert_image
from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.reference import Reference
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


def push_converted(host: str, name: str, layers: Sequence[bytes], work_dir: Path, *, hash_trees: bool = True) -> str:
    """Push an ordinary image and convert it; return the converted image's reference."""
    plain = push_plain(host, f"{name}-plain", layers)
    converted = f"{host}/{name}:obd"
    with closing(RegistryClient(Credentials.load(None))) as client:
        options = ConvertOptions(work_dir=work_dir, hash_trees=hash_trees)
        convert_image(open_source(plain, client), open_destination(converted, client), options=options)
    return converted


def push_on_top(image: str, tag: str, layer: bytes) -> str:
    """Push an image with one more overlaybd layer, as a client that commits does; return its reference."""
    notes = {oci.BLOB_DIGEST: oci.digest_of(layer), oci.BLOB_SIZE: str(len(layer)), oci.OVERLAYBD_VERSION: "0.1.0"}
    return _push_on_top(image, tag, layer, notes)


def push_mixed(image: str, tag: str, layer: bytes) -> str:
    """Push an image with one more layer, an ordinary one; return its reference."""
    return _push_on_top(image, tag, layer, {})


def _push_on_top(image: str, tag: str, layer: bytes, annotations: dict[str, str]) -> str:
    base = Reference.parse(image)
    target = Reference.parse(f"{base.host}/{base.repository}:{tag}")
    with closing(RegistryClient(Credentials.load(None))) as registry:
        repository = registry.repository(base)
        manifest = oci.Manifest.parse(registry.get_manifest(base).data, image)
        config = json.loads(registry.read_blob(repository, manifest.config.digest, manifest.config.size, 1 << 20))
        config["rootfs"]["diff_ids"].append(oci.digest_of(layer))
        document = json.dumps(config).encode()
        for data in (document, layer):
            registry.push_blob(repository, oci.digest_of(data), len(data), partial(io.BytesIO, data))
        new = oci.Manifest(
            oci.Descriptor(oci.OCI_CONFIG, oci.digest_of(document), len(document)),
            (*manifest.layers, oci.Descriptor(oci.OCI_LAYER, oci.digest_of(layer), len(layer), annotations)),
        )
        registry.put_manifest(target, oci.OCI_MANIFEST, new.to_bytes())
    return str(target)
