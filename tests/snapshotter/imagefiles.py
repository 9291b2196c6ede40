"""A small OCI image of busybox, several layers with everything layers can do to each other, as a file for import."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.reference import Reference
from tests import capabilities

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
_APPLETS = (
    "sh",
    "ls",
    "cat",
    "stat",
    "find",
    "sha256sum",
    "sleep",
    "dd",
    "readlink",
    "touch",
    "echo",
    "rm",
    "sort",
    "xargs",
)


def busybox() -> Path | None:
    """The static busybox, or None if it is not installed."""
    found = shutil.which("busybox")
    return Path(found) if found else None


def require_busybox() -> None:
    """Skip the running test without busybox, or fail it where programs are required."""
    capabilities.require_tools("busybox")


def busybox_bytes() -> bytes:
    """The program itself."""
    path = busybox()
    assert path is not None
    return path.read_bytes()


class LayerTar:
    """A layer being made."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, **rest) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.mode, member.size, member.mtime = kind, mode, len(data), 1_600_000_000
        for key, value in rest.items():
            setattr(member, key, value)
        self._tar.addfile(member, io.BytesIO(data))

    def directory(self, name: str, mode: int = 0o755, **rest) -> None:
        self.add(name, kind=tarfile.DIRTYPE, mode=mode, **rest)

    def bytes(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()


def busybox_layers() -> list[bytes]:
    """Uncompressed layers, bottom first: files, then whiteouts, opaque directories, links and odd attributes."""
    base = LayerTar()
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "data", "data/old", "replaced"):
        base.directory(name, 0o1777 if name == "tmp" else 0o755)
    base.add("bin/busybox", busybox_bytes(), mode=0o755)
    for applet in _APPLETS:
        base.add(f"bin/{applet}", kind=tarfile.SYMTYPE, linkname="busybox", mode=0o777)
    base.add("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n")
    for name in ("data/deleted", "data/kept", "data/old/hidden", "replaced/file"):
        base.add(name, name.encode() * 100)
    second = LayerTar()
    second.directory("data")  # else unpacking leaves it the time of day
    second.add("data/.wh.deleted")
    second.directory("data/old", 0o700, uid=7, gid=8)
    second.add("data/old/.wh..wh..opq")
    second.add("data/old/visible", b"new", uid=1000, gid=1000, mode=0o4755)
    second.add(".wh.replaced")
    third = LayerTar()
    third.directory("data")
    third.directory("dev")
    third.add("data/one", b"linked" * 1000, pax_headers={"SCHILY.xattr.user.note": "an attribute"})
    third.add("data/two", kind=tarfile.LNKTYPE, linkname="data/one")
    third.add("replaced", b"now a file")
    third.add("dev/null0", kind=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
    third.add("data/" + "long" * 40, b"x")
    return [base.bytes(), second.bytes(), third.bytes()]


def image_documents(
    layers: Sequence[bytes],
    annotations: Sequence[dict[str, str]] | None = None,
    *,
    compress: bool = True,
    command: Sequence[str] = ("/bin/sh",),
) -> tuple[dict[str, bytes], str]:
    """Return all blobs of an image by digest, and the digest of its manifest."""
    blobs: dict[str, bytes] = {}

    def put(data: bytes, media_type: str) -> dict[str, object]:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": list(command)},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]},
    }
    descriptors = []
    for number, layer in enumerate(layers):
        data = gzip.compress(layer, 1, mtime=0) if compress else layer
        descriptor = put(data, oci.OCI_LAYER_GZIP if compress else oci.OCI_LAYER)
        if annotations:
            descriptor["annotations"] = annotations[number]
        descriptors.append(descriptor)
    manifest = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": put(json.dumps(config).encode(), oci.OCI_CONFIG),
        "layers": descriptors,
    }
    return blobs, str(put(json.dumps(manifest).encode(), oci.OCI_MANIFEST)["digest"])


def write_oci_archive(path: Path, name: str, layers: Sequence[bytes]) -> None:
    """Write an image as ``ctr images import`` reads it."""
    blobs, manifest = image_documents(layers)
    descriptor = {
        "mediaType": oci.OCI_MANIFEST,
        "digest": manifest,
        "size": len(blobs[manifest]),
        "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "latest"},
        "platform": {"architecture": "amd64", "os": "linux"},
    }
    files = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [descriptor]}).encode(),
        **{f"blobs/{digest.replace(':', '/')}": data for digest, data in blobs.items()},
    }
    with tarfile.open(path, "w") as archive:
        for file, data in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def golden_layers() -> tuple[list[bytes], list[dict[str, str]]]:
    """Two overlaybd layers made by the original's tools, bottom first, and their descriptors' annotations."""
    layers = [(_GOLDEN / name).read_bytes() for name in ("layer1.obd", "layer2.obd")]
    return layers, [
        {oci.BLOB_DIGEST: oci.digest_of(layer), oci.BLOB_SIZE: str(len(layer)), oci.OVERLAYBD_VERSION: "0.1.0"}
        for layer in layers
    ]


def push(host: str, name: str, blobs: Mapping[str, bytes], manifest: str) -> str:
    """Push an image's documents to a registry; return its reference."""
    reference = Reference.parse(f"{host}/{name}:latest")
    with closing(RegistryClient(Credentials.load(None))) as registry:
        repository = registry.repository(reference)
        for digest, data in blobs.items():
            if digest != manifest:
                registry.push_blob(repository, digest, len(data), partial(io.BytesIO, data))
        registry.put_manifest(reference, oci.OCI_MANIFEST, blobs[manifest])
    return str(reference)
