"""obdlab with one recorded start: its trace as an acceleration layer, or the blocks it read as a hot layer."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.publish.hot_and_traces import add_acceleration_layer, add_hot_layer
from obdlab.devices.usage import STARTS_END_S
from obdlab.formats import oci
from obdlab.image.from_manifest import config_from_manifest
from obdlab.lab.baselines.adapter import is_published
from obdlab.lab.baselines.file import running_on
from obdlab.lab.baselines.lazy import Lazy
from obdlab.lab.testbed.process import LabError, wait_until
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from obdlab.system import mount

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
    from obdlab.image.config import ImageConfig
    from obdlab.lab.baselines.adapter import Source
    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.registry.client import RegistryClient

_TRACE_TIMEOUT_S = 30.0
_MOST_CONFIG = 4 << 20


class Prefetch(Lazy):
    """obdlab's snapshotter with the trace of one start, recorded when the image is published."""

    name: ClassVar[str] = "obdlab-prefetch"
    title: ClassVar[str] = "obdlab with a trace"
    recorded: ClassVar[bool] = True

    def tag(self, source: Source) -> str:
        """Return the tag of the converted image with its trace."""
        return f"{super().tag(source)}-trace3{_recorded_as(source)}"

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Convert the image, start it once to record its reads, and add the acceleration or hot layer on top."""
        plain = Reference.parse(f"{reference.rpartition(':')[0]}:{Lazy.tag(self, source)}")
        if not is_published(client, str(plain)):
            super().publish(host, source, client, str(plain))
        manifest = oci.Manifest.parse(client.get_manifest(plain).data)
        repository = client.repository(plain)
        config = client.read_blob(repository, manifest.config.digest, manifest.config.size, _MOST_CONFIG)
        place = host.files_dir / "recording"
        place.mkdir()
        try:
            trace = place / "trace"
            trace.touch()
            image = replace(config_from_manifest(manifest, repository), record_trace_path=str(trace))
            _record(host, place, image, config, source)
            data = trace.read_bytes()
            if not data:
                raise LabError("recording: the trace is empty (see the device server's log)")
            settings = Settings(cache_dir=place / "cache")
            with (
                closing(open_source(str(plain), client)) as converted,
                closing(open_destination(reference, client)) as target,
            ):
                self._add(converted, target, data, settings, client)
        finally:
            shutil.rmtree(place)

    def _add(
        self, image: ImageSource, target: ImageDestination, trace: bytes, settings: Settings, client: RegistryClient
    ) -> None:
        add_acceleration_layer(image, target, trace, settings, client=client)


class Hot(Prefetch):
    """obdlab's snapshotter with a hot layer of the blocks that one start read, recorded at publication."""

    name: ClassVar[str] = "obdlab-hot"
    title: ClassVar[str] = "obdlab with a hot layer"
    registry_share: ClassVar[float] = 1.5  # includes the converted image
    start_share: ClassVar[float] = 0.2

    def tag(self, source: Source) -> str:
        """Return the tag of the converted image with its hot layer."""
        return f"{Lazy.tag(self, source)}-hot5{_recorded_as(source)}"

    def _add(
        self, image: ImageSource, target: ImageDestination, trace: bytes, settings: Settings, client: RegistryClient
    ) -> None:
        add_hot_layer(image, target, trace, settings, client=client)


# The kernel's readahead around page faults is in a trace as well, so the tag names it unless it is the default.
def _recorded_as(source: Source) -> str:
    return "" if source.readahead_kib == Settings().device_readahead_kib else f"-ra{source.readahead_kib}"


def _record(host: OwnContainerd, place: Path, image: ImageConfig, config: bytes, source: Source) -> None:
    image.save(place / "config.v1.json")
    (place / "lower").mkdir()
    device = host.devices.attach(place / "config.v1.json", "recording", served=True)
    try:
        host.devices.mount(device, place / "lower")
        try:
            with running_on(host, place, config, f"record-{source.recipe.name}", source.recipe.probe):
                pass  # the container is ready: the trace has every read of the start
        finally:
            mount.unmount(place / "lower")
    finally:
        host.devices.detach(device.device_id, patience_s=STARTS_END_S)
    wait_until((place / "trace.ok").exists, "writing of the trace", _TRACE_TIMEOUT_S)
