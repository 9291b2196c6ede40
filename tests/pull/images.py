"""Small real images, made in memory and pushed to a real registry."""

from __future__ import annotations

import gzip
import io
import tarfile
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.formats.oci import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    Platform,
    digest_of,
    to_json,
)
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obdlab.registry.client import RegistryClient
    from tests.registry.server import RegistryServer

BUSYBOX = Path("/bin/busybox")
#: Overlaybd layers made by the original tools.
GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"


@dataclass(frozen=True)
class Layer:
    """A layer as it goes to the registry, and the diff ID its config names."""

    data: bytes
    diff_id: str
    media_type: str = OCI_LAYER_GZIP
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(self.media_type, digest_of(self.data), len(self.data), self.annotations)


def layer(files: Mapping[str, bytes], *, mode: int = 0o644) -> Layer:
    """A gzip layer with these files."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), mode
            archive.addfile(member, io.BytesIO(data))
    plain = tar.getvalue()
    return Layer(gzip.compress(plain, 1, mtime=0), digest_of(plain))


@cache
def shell_layer() -> Layer:
    """A layer with a static shell, so that the image can run."""
    return layer({"bin/sh": BUSYBOX.read_bytes()}, mode=0o755)


def config_of(layers: list[Layer], platform: Platform | None = None) -> bytes:
    """The image config for these layers."""
    platform = platform or host_platform()
    return to_json(
        {
            "architecture": platform.architecture,
            "os": platform.os,
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [],
        }
    )


def push_image(
    registry: RegistryClient, text: str, layers: list[Layer], *, config: bytes | None = None
) -> tuple[Reference, Manifest]:
    """Push an image and return its reference and manifest."""
    reference = Reference.parse(text)
    repository = registry.repository(reference)
    config = config or config_of(layers)
    for data in [*(item.data for item in layers), config]:
        registry.push_blob(repository, digest_of(data), len(data), partial(io.BytesIO, data))
    manifest = Manifest(
        Descriptor(OCI_CONFIG, digest_of(config), len(config)), tuple(item.descriptor for item in layers)
    )
    registry.put_manifest(reference, OCI_MANIFEST, manifest.to_bytes())
    return reference, manifest


def push_index(registry: RegistryClient, text: str, images: Mapping[Platform, Manifest]) -> tuple[Reference, Index]:
    """Push an index over manifests that the repository has by digest already."""
    entries = []
    for platform, manifest in images.items():
        data = manifest.to_bytes()
        entries.append(replace(Descriptor(OCI_MANIFEST, digest_of(data), len(data)), platform=platform))
    index = Index(tuple(entries))
    reference = Reference.parse(text)
    registry.put_manifest(reference, OCI_INDEX, index.to_bytes())
    return reference, index


def stored_blob(server: RegistryServer, digest: str) -> Path:
    """Where the registry keeps a blob."""
    algorithm, hexadecimal = digest.split(":")
    path = server.storage / "docker/registry/v2/blobs" / algorithm / hexadecimal[:2] / hexadecimal / "data"
    assert path.exists()
    return path


def lose_blob(server: RegistryServer, reference: Reference, digest: str) -> None:
    """Make the registry lose a blob (it takes no manifest over blobs it never had)."""
    algorithm, hexadecimal = digest.split(":")
    repository = server.storage / "docker/registry/v2/repositories" / reference.repository
    (repository / "_layers" / algorithm / hexadecimal / "link").unlink()
    stored_blob(server, digest).unlink()
