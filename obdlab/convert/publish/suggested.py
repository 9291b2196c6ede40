"""A hot layer for an image that was never started: of the reads that its own configuration makes likely."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.convert.publish.extend import manifest_of
from obdlab.convert.publish.hot_and_traces import add_hot_layer, opened
from obdlab.traces.likely import suggest

if TYPE_CHECKING:
    from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
    from obdlab.convert.progress import Progress
    from obdlab.formats import oci
    from obdlab.registry.client import RegistryClient
    from obdlab.settings.settings import Settings
    from obdlab.traces.profile import Profile


@dataclass(frozen=True, slots=True)
class SuggestedLayer:
    """A hot layer that was added: the new manifest, the layer's size, its files and the bytes of its trace."""

    manifest: oci.Descriptor
    size: int
    files: int
    bytes_suggested: int


def add_suggested_layer(
    source: ImageSource,
    destination: ImageDestination,
    settings: Settings,
    profile: Profile | None,
    *,
    client: RegistryClient | None = None,
    platform: oci.Platform | None = None,
    work_dir: Path = Path("/var/tmp"),
    progress: Progress | None = None,
) -> SuggestedLayer | None:
    """Store ``source`` at ``destination`` with a hot layer of its likely reads; return None if none are known.

    Blocks that are read on the way stay below ``work_dir`` until the end. Raises FormatError and CorruptBlobError for
    an image that cannot be read or extended.
    """
    manifest = manifest_of(source, platform)
    document = source.config(manifest).document
    with tempfile.TemporaryDirectory(prefix="obdlab-suggest-", dir=work_dir) as directory:
        place = Path(directory)
        settings = replace(settings, cache_dir=place / "cache")
        (place / "layers").mkdir()
        with opened(source, manifest, settings, client, place / "layers", progress) as disk:
            found = suggest(disk, document, profile)
        if not found.files:
            return None
        added, size = add_hot_layer(
            source,
            destination,
            found.trace.to_bytes(),
            settings,
            client=client,
            platform=platform,
            work_dir=place,
            progress=progress,
            trace_name="suggested trace",
        )
    return SuggestedLayer(added, size, len(found.files), found.trace.size)
