"""obdlab with a trace: what one recorded start read is fetched ahead, by an acceleration layer in the image."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from obdlab.devices import mount
from obdlab.formats import oci
from obdlab.image.from_manifest import config_from_manifest
from obdlab.lab.baselines.adapter import is_published
from obdlab.lab.baselines.file import running_on
from obdlab.lab.baselines.lazy import Lazy
from obdlab.lab.process import LabError, wait_until
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.image.config import ImageConfig
    from obdlab.lab.baselines.adapter import Source
    from obdlab.lab.containerd import OwnContainerd
    from obdlab.registry.client import RegistryClient

_TRACE_TIMEOUT_S = 30.0
_MOST_CONFIG = 4 << 20


class Prefetch(Lazy):
    """obdlab's snapshotter with the trace of one start, recorded when the image is published."""

    name: ClassVar[str] = "obdlab-prefetch"

    def tag(self, source: Source) -> str:
        """Return the tag of the converted image with its trace."""
        return f"{super().tag(source)}-trace1"

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Convert the image, start it once to record what it reads, add the trace as a layer."""
        plain = Reference.parse(f"{reference.rpartition(':')[0]}:{super().tag(source)}")
        if not is_published(client, str(plain)):
            super().publish(host, source, client, str(plain))
        manifest = oci.Manifest.parse(client.get_manifest(plain).data)
        repository = client.repository(plain)
        config = client.read_blob(repository, manifest.config.digest, manifest.config.size, _MOST_CONFIG)
        place = host.files_dir / "recording"
        place.mkdir()
        trace = place / "trace"
        trace.touch()
        image = replace(config_from_manifest(manifest, repository), record_trace_path=str(trace))
        _record(host, place, image, config, source)
        layer = _layer(trace.read_bytes())
        digest = oci.digest_of(layer)
        client.push_blob(repository, digest, len(layer), lambda: io.BytesIO(layer))
        annotations = {oci.BLOB_DIGEST: digest, oci.BLOB_SIZE: str(len(layer)), oci.ACCELERATION_LAYER: "yes"}
        added = oci.Descriptor(oci.OCI_LAYER, digest, len(layer), annotations)
        document = json.loads(config)
        document["rootfs"]["diff_ids"].append(digest)
        document.pop("history", None)
        data = oci.to_json(document)
        client.push_blob(repository, oci.digest_of(data), len(data), lambda: io.BytesIO(data))
        described = replace(manifest.config, digest=oci.digest_of(data), size=len(data))
        accelerated = replace(manifest, config=described, layers=(*manifest.layers, added))
        client.put_manifest(Reference.parse(reference), accelerated.media_type, accelerated.to_bytes())
        shutil.rmtree(place)


def _record(host: OwnContainerd, place: Path, image: ImageConfig, config: bytes, source: Source) -> None:
    image.save(place / "config.v1.json")
    (place / "lower").mkdir()
    device = host.devices.attach(place / "config.v1.json", "recording")
    try:
        host.devices.mount(device, place / "lower")
        try:
            with running_on(host, place, config, f"record-{source.recipe.name}", source.recipe.probe):
                pass  # ready: all that counts has been read
        finally:
            mount.unmount(place / "lower")
    finally:
        host.devices.detach(device.device_id)
    wait_until((place / "trace.ok").exists, "writing of the trace", _TRACE_TIMEOUT_S)


def _layer(trace: bytes) -> bytes:
    if not trace:
        raise LabError("recording: the trace is empty (see the device server's log)")
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("trace")
        member.size = len(trace)
        tar.addfile(member, io.BytesIO(trace))
    return made.getvalue()
