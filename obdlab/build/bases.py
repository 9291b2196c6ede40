"""The image that a FROM names: its manifest and settings, and its layers where they are, in the registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.convert.base import check_extensible
from obdlab.convert.endpoints.registryimages import RegistrySource
from obdlab.convert.layer import LayerBuilder, LayerOptions
from obdlab.errors import ObdlabError
from obdlab.image.from_manifest import config_from_manifest
from obdlab.layers.lsmt import open_layer
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from obdlab.build.dockerfile import Instruction
    from obdlab.build.layerstore import LayerBlob, LayerStore
    from obdlab.formats import oci
    from obdlab.image.config import LowerConfig
    from obdlab.registry.client import RegistryClient

# As layers of a conversion have them, by their chain ID.
_SCRATCH_UUID = "5C4A7C40-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class BaseImage:
    """An overlaybd image in a registry, of which nothing but manifest and configuration has been fetched."""

    source: RegistrySource
    digest: str
    manifest: oci.Manifest
    config: oci.Config
    lowers: tuple[LowerConfig, ...]
    repo_blob_url: str

    def top_uuid(self) -> str:
        """Return the UUID of the topmost layer, which is read in place. Raises SourceError or FormatError."""
        with self.source.open_blob(self.manifest.layers[-1]) as blob, open_layer(blob) as layer:
            return layer.uuid


def open_base(name: str, instruction: Instruction, client: RegistryClient, platform: oci.Platform) -> BaseImage:
    """Return the image ``name`` as a base. Raises BuildError, also for an image on which none can be built."""
    try:
        reference = Reference.parse(name)
        source = RegistrySource(reference, client)
        descriptor, manifest = source.find(platform, overlaybd=True)
        found = config_from_manifest(manifest, client.repository(reference), name=name)
        check_extensible(manifest, name)
        config = source.config(manifest)
    except ObdlabError as error:
        raise instruction.error(str(error)) from error
    if (config.platform.os, config.platform.architecture) != (platform.os, platform.architecture):
        got = f"{config.platform.os}/{config.platform.architecture}"
        raise instruction.error(
            f"{name}: image is of another platform (got {got}, wanted {platform.os}/{platform.architecture})"
        )
    return BaseImage(source, descriptor.digest, manifest, config, found.lowers, found.repo_blob_url)


def empty_layer(kept: LayerStore, work: Path, virtual_size: int) -> LayerBlob:
    """Return the layer under "scratch": an empty ext4 on a disk of ``virtual_size`` bytes. Raises SourceError."""
    options = LayerOptions(virtual_size=virtual_size)
    key = f"scratch-{options.digest()}"
    found = kept.find(key)
    if found is not None:
        return found
    directory = work / "scratch"
    directory.mkdir()
    with LayerBuilder(directory, options, large=False) as builder:
        built = builder.build([], uuid=_SCRATCH_UUID, parent_uuid=None).result()
    assert built.path is not None
    return kept.add(key, built.path, built.digest)
