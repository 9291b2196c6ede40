"""The image configuration of an overlaybd image in a registry, made from its manifest alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from obdlab.command import command
from obdlab.errors import FormatError, ObdlabError
from obdlab.formats import oci
from obdlab.formats.hashtree import TreeReference
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.turboblob import file_system_of, lower_of, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from obdlab.registry.client import RegistryClient
    from obdlab.registry.reference import Reference, Repository

    #: Returns the directory with the files of a turboOCI layer's blob.
    Unpacked = Callable[[oci.Descriptor], Path]


#: Type of the artifact whose subject is an image and whose only layer is a trace of the image's start.
TRACE_ARTIFACT = "application/vnd.obdlab.trace.v1"
#: The annotation that shows the newest of several artifacts.
CREATED = "org.opencontainers.image.created"


logger = logging.getLogger(__name__)


class NotOverlaybdError(ObdlabError, code="not-overlaybd"):
    """The image's layers are ordinary tars, or of a kind that this package cannot serve."""


def fetch_config(
    client: RegistryClient,
    reference: Reference,
    platform: oci.Platform,
    *,
    traces: bool = False,
    place: Path | None = None,
) -> ImageConfig:
    """Fetch an image's manifest (of an index, the one for ``platform``) and return the configuration to attach.

    ``traces`` also asks the registry for a trace that refers to the image. The small blobs of turboOCI layers are
    unpacked below the directory ``place``, to which the configuration then refers. Raises NotOverlaybdError if the
    image was not converted, RegistryError or FormatError if it cannot be fetched, and the errors of
    :meth:`obdlab.registry.client.RegistryClient.require_signature`.
    """
    fetched = client.get_manifest(reference)
    digests = [fetched.digest]
    document = oci.parse_manifest(fetched.data, str(reference))
    if isinstance(document, oci.Index):
        reference = reference.with_digest(document.select(platform).digest)
        fetched = client.get_manifest(reference)
        digests.append(fetched.digest)
        document = oci.Manifest.parse(fetched.data, str(reference))
    client.require_signature(reference, *digests)
    repository = client.repository(reference)
    unpacked = None if place is None else partial(_fetch_turbo, client, repository, place)
    config = config_from_manifest(document, repository, name=str(reference), unpacked=unpacked)
    if not traces or config.acceleration_layer:
        return config
    return replace(config, trace=find_trace(client, reference, fetched.digest))


def find_trace(client: RegistryClient, reference: Reference, digest: str) -> LowerConfig:
    """Return the blob of the newest trace that refers to the manifest ``digest``; an empty one if there is no trace.

    Logs a warning if the registry cannot list referrers: an image starts without a trace, too.
    """
    try:
        found = client.referrers(client.repository(reference), digest, TRACE_ARTIFACT)
        if not found:
            return LowerConfig()
        newest = max(found, key=lambda artifact: artifact.annotations.get(CREATED, ""))
        artifact = oci.Manifest.parse(client.get_manifest(reference.with_digest(newest.digest)).data)
        layer = artifact.layers[0] if artifact.layers else None
    except ObdlabError as error:
        logger.warning("%s: cannot ask for traces of it: %s", reference, error)
        return LowerConfig()
    if layer is None or layer.media_type != TRACE_ARTIFACT:
        logger.warning("%s: artifact %s has no trace", reference, newest.digest)
        return LowerConfig()
    return LowerConfig(digest=layer.digest, size=layer.size, hot=layer.annotations.get(oci.HOT_LAYER) == "yes")


def _fetch_turbo(client: RegistryClient, repository: Repository, place: Path, layer: oci.Descriptor) -> Path:
    directory = place / layer.digest.removeprefix("sha256:")
    if not directory.exists():
        with client.stream_blob(repository, layer.digest, layer.size) as stream:
            unpack(stream, directory, blob=f"{repository}@{layer.digest}")
    return directory


def config_from_manifest(
    manifest: oci.Manifest, repository: Repository, *, name: str = "image", unpacked: Unpacked | None = None
) -> ImageConfig:
    """Return the configuration of an overlaybd image whose blobs are all in ``repository``.

    The annotations that mark overlaybd layers must agree with their descriptors, since the registry and the
    manifest's digest vouch for the descriptors. Raises NotOverlaybdError or FormatError.
    """
    return replace(stored_config(manifest, name, unpacked), repo_blob_url=repository.blobs_url)


def stored_config(manifest: oci.Manifest, name: str, unpacked: Unpacked | None = None) -> ImageConfig:
    """Return the configuration of an overlaybd image, which does not say where its blobs are.

    ``unpacked(layer)`` returns the directory with the files of a turboOCI layer's blob; without it such layers are
    refused. Raises as :func:`config_from_manifest`.
    """
    if not manifest.layers:
        raise NotOverlaybdError(f"{name}: not an overlaybd image (it has no layers)")
    plain = [layer.digest for layer in manifest.layers if not layer.is_overlaybd]
    if plain:
        raise NotOverlaybdError(
            f"{name}: not an overlaybd image (layer {plain[0]} is an ordinary one); "
            f"convert it first: {command('image', 'convert', name, 'NEW')}"
        )
    lowers = _lowers(manifest.layers, name, unpacked)
    accelerated = manifest.layers[-1].annotations.get(oci.ACCELERATION_LAYER) == "yes"
    return ImageConfig(lowers=lowers, acceleration_layer=accelerated)


def check_native(layer: oci.Descriptor, name: str) -> None:
    """Raise NotOverlaybdError, naming the remedy, if a layer is a turboOCI layer. ``name`` is the image's."""
    if layer.turbo_target is not None:
        raise NotOverlaybdError(
            f"{name}: layer {layer.digest} is a turboOCI layer, an index to layer {layer.turbo_target[:71]} of the "
            "original image, which this command cannot use. Name the original image, or convert it: "
            "obdlab image convert ORIGINAL NEW"
        )


def _lowers(layers: Sequence[oci.Descriptor], name: str, unpacked: Unpacked | None) -> tuple[LowerConfig, ...]:
    turbo = {number: layer for number, layer in enumerate(layers) if layer.turbo_target is not None}
    if unpacked is None:
        for layer in turbo.values():
            check_native(layer, name)
    lowers = {number: _lower(layer, name) for number, layer in enumerate(layers)}
    if turbo and unpacked is not None:
        places = {number: unpacked(layer) for number, layer in turbo.items()}
        file_system = file_system_of(list(places.values()), name)
        lowers |= {number: lower_of(layer, places[number], file_system) for number, layer in turbo.items()}
    return tuple(lowers.values())


def _lower(layer: oci.Descriptor, name: str) -> LowerConfig:
    digest = layer.annotations[oci.BLOB_DIGEST]
    size = layer.annotations.get(oci.BLOB_SIZE, str(layer.size))
    if digest != layer.digest or size != str(layer.size):
        raise FormatError(
            "overlaybd annotations contradict the descriptor",
            blob=f"{name}: layer {layer.digest}",
            got=f"{digest} of {size} bytes",
            wanted=f"{layer.size} bytes",
        )
    tree = layer.annotations.get(oci.HASH_TREE, "")
    if tree:
        TreeReference.parse(tree, f"{name}: hash tree of layer {layer.digest}")
    return LowerConfig(digest=layer.digest, size=layer.size, hash_tree=tree)
