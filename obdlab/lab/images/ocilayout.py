"""OCI layout directories with one image: the builder writes them, adapters push them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from obdlab.convert.endpoints.layout import ImageLayout, is_layout
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


class OciLayout(ImageLayout):
    """A layout directory with one image (the first one if it holds several)."""

    @property
    def _entry(self) -> oci.Descriptor:
        entries = self.index().manifests
        if not entries:
            raise LabError(f"{self.root}/index.json: holds no image")
        return entries[0]

    @property
    def manifest_data(self) -> bytes:
        """The manifest's bytes, checked against its digest. Raises FormatError or SourceError."""
        return self.read_blob(self._entry, oci.MAX_MANIFEST_SIZE)

    @property
    def digest(self) -> str:
        """The digest of the manifest, which is the image's identity. Raises FormatError or SourceError."""
        return oci.digest_of(self.manifest_data)

    @property
    def manifest(self) -> oci.Manifest:
        """The parsed manifest. Raises FormatError or SourceError."""
        return oci.Manifest.parse(self.manifest_data, f"{self.root}: manifest")

    def add_document(self, media_type: str, data: bytes) -> oci.Descriptor:
        """Store a small blob; return its descriptor."""
        digest = oci.digest_of(data)
        self.add_bytes(digest, data)
        return oci.Descriptor(media_type, digest, len(data))

    def finish(
        self, config: oci.Descriptor, layers: Iterable[oci.Descriptor], name: str, platform: oci.Platform
    ) -> None:
        """Write manifest and index for blobs that are stored already."""
        manifest = oci.Manifest(config, tuple(layers))
        self.name_manifest(self.add_document(oci.OCI_MANIFEST, manifest.to_bytes()), name, platform)

    def name_manifest(self, manifest: oci.Descriptor, name: str, platform: oci.Platform) -> None:
        """Make a stored manifest the layout's image."""
        self.set_tag(name, replace(manifest, platform=platform))


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
    layout = OciLayout.create(directory)
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
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not is_layout(target):
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
