"""Resolving a reference to the documents of one image: index (if there is one), manifest, config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.formats.oci import (
    MAX_CONFIG_SIZE,
    Config,
    Index,
    Manifest,
    chain_ids,
    parse_manifest,
)
from obdlab.pull.errors import PullError

if TYPE_CHECKING:
    from obdlab.formats.oci import Descriptor, Platform
    from obdlab.registry.client import Fetched, RegistryClient
    from obdlab.registry.reference import Reference, Repository


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """An image for one platform, with its documents checked against each other.

    ``chain_ids`` are the snapshot names of ``manifest.layers``, bottom first, one per layer.
    """

    reference: Reference
    repository: Repository
    index: Fetched | None
    parsed_index: Index | None
    manifest: Fetched
    parsed_manifest: Manifest
    config: bytes
    diff_ids: tuple[str, ...]
    chain_ids: tuple[str, ...]

    @property
    def top(self) -> Fetched:
        """The document of the reference: the index, or the manifest if there is no index."""
        return self.index or self.manifest

    @property
    def name(self) -> str:
        """The image's reference, as text."""
        return str(self.reference)

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        """Descriptors of the layers, bottom first."""
        return self.parsed_manifest.layers

    @property
    def metadata_size(self) -> int:
        """Bytes of all documents together."""
        return len(self.manifest.data) + len(self.config) + (len(self.index.data) if self.index else 0)


def resolve(registry: RegistryClient, reference: Reference, platform: Platform) -> ResolvedImage:
    """Fetch the documents of the image that ``reference`` names, for ``platform``.

    Raises FormatError or PullError if they are not a valid image, SourceError if the registry fails, and the errors
    of :meth:`obdlab.registry.client.RegistryClient.require_signature`.
    """
    repository = registry.repository(reference)
    index: Fetched | None = None
    parsed_index: Index | None = None
    manifest = registry.get_manifest(reference)
    parsed = parse_manifest(manifest.data, str(reference))
    if isinstance(parsed, Index):
        index, parsed_index = manifest, parsed
        chosen = reference.with_digest(parsed.select(platform).digest)
        manifest = registry.get_manifest(chosen)
        parsed = parse_manifest(manifest.data, str(chosen))
    if not isinstance(parsed, Manifest):
        raise PullError(f"{reference}: an index inside an index")
    registry.require_signature(reference, *([index.digest] if index else []), manifest.digest)
    descriptor = parsed.config
    data = registry.read_blob(repository, descriptor.digest, descriptor.size, MAX_CONFIG_SIZE)
    config = Config.parse(data, f"{reference}: config {descriptor.digest}")
    _check(reference, parsed, config, platform)
    return ResolvedImage(
        reference=reference,
        repository=repository,
        index=index,
        parsed_index=parsed_index,
        manifest=manifest,
        parsed_manifest=parsed,
        config=data,
        diff_ids=config.diff_ids,
        chain_ids=chain_ids(config.diff_ids),
    )


def _check(reference: Reference, manifest: Manifest, config: Config, platform: Platform) -> None:
    got = config.platform
    if (got.os, got.architecture) != (platform.os, platform.architecture):
        raise PullError(
            f"{reference}: not for this platform "
            f"(got {got.os}/{got.architecture}, wanted {platform.os}/{platform.architecture})"
        )
    if not manifest.layers:
        raise PullError(f"{reference}: an image without layers")
    if len(manifest.layers) != len(config.diff_ids):
        raise PullError(
            f"{reference}: manifest and config disagree "
            f"(got {len(manifest.layers)} layers, wanted {len(config.diff_ids)} as in diff_ids)"
        )
