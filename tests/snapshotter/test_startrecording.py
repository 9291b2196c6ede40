"""First starts that are recorded by themselves, and published with their images, under a real containerd."""

from __future__ import annotations

import json
import threading
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from obdlab.formats import oci
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig
from obdlab.image.from_manifest import TRACE_ARTIFACT, find_trace
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.snapshotter.config import ConfigError, SnapshotterConfig
from obdlab.snapshotter.startrecording import RecordedStart, StartRecordings
from tests import capabilities
from tests.containerd_host import ObdlabHost, containerd_with_obdlab
from tests.registry.server import RegistryServer, registry_server
from tests.snapshotter import imagefiles
from tests.snapshotter.test_lazy_images import push_golden, run, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["registry_server"]

_SECONDS = 2
_READ = "/busybox cat /big >/dev/null"


@contextmanager
def running(directory: Path, **config: int) -> Iterator[ObdlabHost]:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    directory.mkdir()
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    with containerd_with_obdlab(directory / "host", "--config", str(path)) as host:
        yield host


def traces(image: str) -> list[str]:
    """The digests of the traces that refer to an image."""
    reference = Reference.parse(image)
    with closing(RegistryClient()) as client:
        digest = client.get_manifest(reference).digest
        return [each.digest for each in client.referrers(client.repository(reference), digest, TRACE_ARTIFACT)]


def recorded(host: ObdlabHost) -> list[Path]:
    return sorted(host.snapshotter.root.glob("snapshots/*/block/start.trace"))


@pytest.mark.containerd
def test_a_first_start_is_recorded_and_published_once(registry_server: RegistryServer, tmp_path: Path) -> None:
    image = push_golden(registry_server, "recorded")
    with running(tmp_path / "first", recordStarts=_SECONDS) as host:
        host.rpull(image)
        run(host, image, "one", _READ)
        wait_for(lambda: bool(traces(image)))
        (path,) = recorded(host)
        trace = path.read_bytes()
        assert Trace.from_bytes(trace).size > 10**6
        config = ImageConfig.load(path.with_name("config.v1.json"))
        assert config.record_trace_path == str(path)
        # The second container is no first start, and does not take the trace away that openings here replay.
        run(host, image, "two", _READ)
        assert ImageConfig.load(path.with_name("config.v1.json")) == config
        assert path.read_bytes() == trace
    reference = Reference.parse(image)
    with closing(RegistryClient()) as client:
        found = find_trace(client, reference, client.get_manifest(reference).digest)
        assert found.digest == oci.digest_of(trace)
    # Another host gets the trace with the pull, and records nothing.
    with running(tmp_path / "second", recordStarts=_SECONDS) as host:
        host.rpull(image)
        run(host, image, "one", _READ)
        assert recorded(host) == []
    assert len(traces(image)) == 1


@pytest.mark.containerd
def test_nothing_is_recorded_unless_it_is_allowed(registry_server: RegistryServer, tmp_path: Path) -> None:
    image = push_golden(registry_server, "unrecorded")
    with running(tmp_path / "host") as host:
        host.rpull(image)
        run(host, image, "one", _READ)
        assert recorded(host) == []
    assert traces(image) == []


@pytest.mark.containerd
def test_a_trace_of_an_image_that_moved_on_is_kept_here(registry_server: RegistryServer, tmp_path: Path) -> None:
    image = push_golden(registry_server, "moved")
    with running(tmp_path / "host", recordStarts=_SECONDS) as host:
        host.rpull(image)
        run(host, image, "one", _READ)
        assert push_golden(registry_server, "moved", depth=1) == image
        wait_for(lambda: "is another image now" in host.snapshotter.log.read_text())
        (path,) = recorded(host)
        assert path.stat().st_size
        run(host, image, "two", _READ)
    assert traces(image) == []


def test_a_start_goes_on_without_a_thread_to_publish_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    nothing: Any = None
    recordings = StartRecordings(nothing, 1)
    start = RecordedStart(tmp_path / "start.trace", Reference.parse("registry.test/a:b"), ())
    monkeypatch.setattr(recordings, "_prepared", lambda image: start)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with recordings.recording(nothing):
        pass
    assert "registry.test/a:b: the trace of its start is not published: can't start new thread" in caplog.text


def test_the_configuration_bounds_the_time(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert SnapshotterConfig().images.record_starts_s == 0
    path.write_text('{"recordStarts": 30}')
    assert SnapshotterConfig.load(path).images.record_starts_s == 30
    for wrong in ("-1", "3601", "true", '"30"'):
        path.write_text(f'{{"recordStarts": {wrong}}}')
        with pytest.raises(ConfigError, match="recordStarts"):
            SnapshotterConfig.load(path)
