"""OCI layout directories made from tar members, for tests."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from typing import TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

MTIME = 1_700_000_000
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"

Member = tuple[tarfile.TarInfo, bytes]


def member(
    name: str,
    data: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    mode: int | None = None,
    uid: int = 0,
    gid: int = 0,
    link: str = "",
    xattrs: dict[str, bytes] | None = None,
    mtime: float = MTIME,
    rdev: tuple[int, int] = (0, 0),
    pax: dict[str, str] | None = None,
) -> Member:
    """One tar member; xattrs are written as containers do (SCHILY.xattr pax records)."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = mode if mode is not None else (0o755 if kind == tarfile.DIRTYPE else 0o644)
    info.uid, info.gid = uid, gid
    info.linkname = link
    info.mtime = mtime
    info.devmajor, info.devminor = rdev
    info.size = len(data)
    info.pax_headers = dict(pax or {})
    for key, value in (xattrs or {}).items():
        info.pax_headers[f"SCHILY.xattr.{key}"] = value.decode("utf-8", "surrogateescape")
    return info, data


def directory(name: str, **options: object) -> Member:
    return member(name, kind=tarfile.DIRTYPE, **options)  # type: ignore[arg-type]


def symlink(name: str, target: str, **options: object) -> Member:
    return member(name, kind=tarfile.SYMTYPE, link=target, mode=0o777, **options)  # type: ignore[arg-type]


def hardlink(name: str, target: str, **options: object) -> Member:
    return member(name, kind=tarfile.LNKTYPE, link=target, **options)  # type: ignore[arg-type]


def tar_bytes(members: Iterable[Member], *, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """The tar of the members, in order. Pax records keep raw bytes (surrogate escapes)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format, encoding="utf-8", errors="surrogateescape") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def compress(data: bytes, how: str) -> bytes:
    if how == "gzip":
        return gzip.compress(data, 6, mtime=0)
    if how == "zstd":
        return zstandard.ZstdCompressor().compress(data)
    if how == "zstd frames":  # as zstd:chunked: small frames, and a table of contents in a skippable one
        frames = b"".join(compress(data[at : at + 10_000], "zstd") for at in range(0, len(data), 10_000))
        return frames + bytes.fromhex("502a4d1805000000") + b"table"
    return data


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Layout:
    """An OCI layout directory under construction."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs" / "sha256").mkdir(parents=True)
        (root / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def add_blob(self, data: bytes, media_type: str, **extra: object) -> dict[str, object]:
        digest = digest_of(data)
        (self.blob_path(digest)).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data), **extra}

    def add_json(self, value: object, media_type: str, **extra: object) -> dict[str, object]:
        return self.add_blob(json.dumps(value).encode(), media_type, **extra)

    def blob_path(self, digest: str) -> Path:
        return self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def add_image(
        self, tars: Sequence[bytes], *, how: Sequence[str] | str = "gzip", architecture: str = "amd64"
    ) -> dict[str, object]:
        """Add config, layers and manifest; return the manifest's descriptor."""
        kinds = [how] * len(tars) if isinstance(how, str) else how
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
            "history": [{"created_by": f"layer {number}"} for number in range(len(tars))],
        }
        suffix = {"gzip": "+gzip", "zstd": "+zstd", "zstd frames": "+zstd", "plain": ""}
        layers = [
            self.add_blob(compress(tar, kind), LAYER + suffix[kind]) for tar, kind in zip(tars, kinds, strict=True)
        ]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.add_json(config, CONFIG),
            "layers": layers,
        }
        platform = {"os": "linux", "architecture": architecture}
        return self.add_json(manifest, MANIFEST, platform=platform)

    def write_index(self, descriptors: Sequence[dict[str, object]], tag: str = "latest") -> None:
        named = [{**d, "annotations": {"org.opencontainers.image.ref.name": tag}} for d in descriptors]
        (self.root / "index.json").write_text(
            json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": named})
        )


def make_layout(root: Path, layers: Sequence[Iterable[Member]], *, how: Sequence[str] | str = "gzip") -> Layout:
    """An OCI layout of one image with these layers, tagged latest."""
    layout = Layout(root)
    layout.write_index([layout.add_image([tar_bytes(members) for members in layers], how=how)])
    return layout
