"""Images in OCI layout directories ("OCI image layout"); the builder writes them, adapters push them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from obdlab.formats import oci
from obdlab.lab.testbed.process import LabError
from obdlab.pull.resolve import resolve
from obdlab.registry.platform import host_platform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from obdlab.registry.client import RegistryClient
    from obdlab.registry.reference import Reference, Repository

_CHUNK = 1 << 20
_REF_NAME = "org.opencontainers.image.ref.name"


class OciLayout:
    """A layout directory with one image (the first one if it holds several)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def manifest_data(self) -> bytes:
        """The manifest's stored bytes. Raises FormatError or OSError."""
        index = oci.Index.parse((self.directory / "index.json").read_bytes(), f"{self.directory}/index.json")
        if not index.manifests:
            raise LabError(f"{self.directory}/index.json: holds no image")
        return self.blob_path(index.manifests[0].digest).read_bytes()

    @property
    def digest(self) -> str:
        """The digest of the manifest, which is the image's identity. Raises FormatError or OSError."""
        return oci.digest_of(self.manifest_data)

    @property
    def manifest(self) -> oci.Manifest:
        """The parsed manifest. Raises FormatError or OSError."""
        return oci.Manifest.parse(self.manifest_data, f"{self.directory}: manifest")

    def blob_path(self, digest: str) -> Path:
        """Return the path of a blob. Raises FormatError for a malformed digest."""
        return self.directory / "blobs" / oci.check_digest(digest).replace(":", "/")

    def add_document(self, media_type: str, data: bytes) -> oci.Descriptor:
        """Store a small blob; return its descriptor."""
        digest = oci.digest_of(data)
        path = self.blob_path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return oci.Descriptor(media_type, digest, len(data))

    def finish(
        self, config: oci.Descriptor, layers: Iterable[oci.Descriptor], name: str, platform: oci.Platform
    ) -> None:
        """Write manifest and index for blobs that are stored already."""
        manifest = oci.Manifest(config, tuple(layers))
        self.name_manifest(self.add_document(oci.OCI_MANIFEST, manifest.to_bytes()), name, platform)

    def name_manifest(self, manifest: oci.Descriptor, name: str, platform: oci.Platform) -> None:
        """Make a stored manifest the layout's image. The index is written last and completes the layout."""
        named = oci.Descriptor(
            manifest.media_type, manifest.digest, manifest.size, annotations={_REF_NAME: name}, platform=platform
        )
        (self.directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        (self.directory / "index.json").write_bytes(oci.Index((named,)).to_bytes())


def push_layout(directory: Path, client: RegistryClient, reference: Reference) -> str:
    """Store a layout's image in a registry and return the manifest's digest. Raises FormatError, SourceError."""
    layout = OciLayout(directory)
    manifest = layout.manifest
    repository = client.repository(reference)
    for descriptor in (manifest.config, *manifest.layers):
        _push_blob(client, repository, descriptor, layout)
    return client.put_manifest(reference, manifest.media_type, layout.manifest_data)


def fetch_layout(
    client: RegistryClient, reference: Reference, directory: Path, name: str, progress: Callable[[str], None]
) -> None:
    """Copy this platform's image from a registry into a new layout directory. Raises FormatError, SourceError."""
    platform = host_platform()
    image = resolve(client, reference, platform)
    layout = OciLayout(directory)
    layout.add_document(image.parsed_manifest.config.media_type, image.config)
    for number, layer in enumerate(image.layers, 1):
        progress(f"{name}: fetching layer {number}/{len(image.layers)} ({layer.size / 1e6:.1f} MB)")
        with (
            layout.blob_path(layer.digest).open("wb") as target,
            client.stream_blob(image.repository, layer.digest, layer.size) as stream,
        ):
            shutil.copyfileobj(stream, target, _CHUNK)
    layout.name_manifest(layout.add_document(image.manifest.media_type, image.manifest.data), name, platform)


def copy_layout(source: Path, target: Path) -> None:
    """Copy a layout to a directory that is not there yet, or empty. Raises LabError if it holds something else."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not (target / "oci-layout").is_file():
        raise LabError(f"{target}: wanted a new or empty directory, or an OCI layout to replace")
    # The copy is written beside the target first, so that a failed copy leaves the target's content.
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        shutil.copytree(source, fresh)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _push_blob(client: RegistryClient, repository: Repository, descriptor: oci.Descriptor, layout: OciLayout) -> None:
    path = layout.blob_path(descriptor.digest)
    client.push_blob(repository, descriptor.digest, descriptor.size, lambda: path.open("rb"))
