from __future__ import annotations

import json
import ssl
import urllib.request
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.errors import ObdlabError, SourceError
from obdlab.lab.images.ocilayout import OciLayout
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.process import LabError
from obdlab.lab.testbed.registry import RegistryHost, Request, Traffic, parse_duration_s, parse_log, parse_time_s
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.kernel
@pytest.mark.registry
def test_what_was_served_is_accounted_byte_for_byte(tiny_layout: Path, tmp_path: Path, state_dir: Path) -> None:
    manifest = OciLayout(tiny_layout).manifest
    with (
        ExperimentNetwork(rate_mbit=200, state_dir=state_dir) as network,
        RegistryHost(tmp_path / "registry", network) as registry,
        closing(RegistryClient()) as client,
    ):
        reference = Reference.parse(registry.push_layout(tiny_layout, "lab/tiny"))
        assert registry.preload() > sum(layer.size for layer in manifest.layers)
        repository = client.repository(reference)
        whole, part = manifest.layers[0], manifest.layers[2]
        begin, counters = registry.mark(), network.counters()
        data = client.get_manifest(reference).data
        with client.stream_blob(repository, whole.digest, whole.size) as stream:
            stream.readall()
        for offset in (0, 1000, 65536):
            client.read_range(repository, part.digest, offset, 5000)
        with pytest.raises(SourceError):
            client.read_range(repository, "sha256:" + "0" * 64, 0, 10)
        end = registry.mark()
        traffic = registry.traffic(begin, end)
        assert traffic.blobs[whole.digest].written == whole.size
        assert (traffic.blobs[whole.digest].requests, traffic.blobs[whole.digest].ranges) == (1, 0)
        assert traffic.blobs[part.digest].written == 15_000
        assert (traffic.blobs[part.digest].requests, traffic.blobs[part.digest].ranges) == (3, 3)
        assert (traffic.requests, traffic.blob_requests, traffic.manifest_requests, traffic.errors) == (6, 4, 1, 1)
        answered = traffic.blob_written + len(data)
        assert answered <= traffic.written < answered + 1000  # and the body of the 404
        assert network.counters().since(counters).received > traffic.written
        assert registry.traffic(end, registry.mark()) == Traffic(0, 0, 0, 0, {})
        assert all(request.ended_s > 0 for request in registry.requests(begin, end))


@pytest.mark.kernel
@pytest.mark.registry
def test_a_registry_that_does_not_start_tells_why(tmp_path: Path, state_dir: Path) -> None:
    with (
        ExperimentNetwork(state_dir=state_dir) as network,
        RegistryHost(tmp_path / "one", network),
        pytest.raises(LabError, match="address already in use"),
        RegistryHost(tmp_path / "two", network),
    ):
        pytest.fail("two registries at one address")


@pytest.mark.parametrize(
    ("text", "seconds"), [("1.5ms", 0.0015), ("250µs", 0.00025), ("1m2.5s", 62.5), ("1h0m0s", 3600.0), ("0s", 0.0)]
)
def test_durations_of_go(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "ms", "1.2.3s", "-1s", "1s ", "1 s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(LabError, match="not a duration"):
        parse_duration_s(text)


def test_times_with_any_number_of_decimals() -> None:
    assert parse_time_s("1970-01-01T00:01:00Z") == 60.0
    assert parse_time_s("2026-11-24T14:07:46.126758822Z") == pytest.approx(1795529266.126758822)


LINE = json.dumps(
    {
        "http.request.method": "GET",
        "http.request.uri": "/v2/a/b/blobs/sha256:" + "1" * 64,
        "http.response.duration": "2.2ms",
        "http.response.status": 206,
        "http.response.written": 5000,
        "time": "2026-11-24T14:07:47.033214128Z",
    }
)


def test_other_lines_of_the_log_are_skipped() -> None:
    text = f'goroutine 1 [running]:\n{{"level":"info","msg":"listening"}}\n[1]\n{LINE}\n{LINE[:40]}'
    (request,) = parse_log(text)
    assert (request.blob, request.written) == ("sha256:" + "1" * 64, 5000)


def _request(began_s: float, ended_s: float) -> Request:
    return Request("GET", "/v2/a/manifests/b", 200, 10, ended_s - began_s, ended_s, "test")


def test_round_trips_that_follow_one_another_are_counted() -> None:
    one_after_another = [_request(0, 1), _request(1.5, 2), _request(2, 3)]
    assert Traffic.of(one_after_another).round_trip_waits == 3
    assert Traffic.of(one_after_another).busy_s == pytest.approx(2.5)
    side_by_side = [_request(0, 2), _request(0.1, 1), _request(0.2, 1.5), _request(1.2, 1.9)]
    assert Traffic.of(side_by_side).round_trip_waits == 2
    assert Traffic.of(side_by_side).busy_s == pytest.approx(2.0)


@pytest.mark.kernel
@pytest.mark.registry
def test_the_same_images_are_served_with_tls(tiny_layout: Path, tmp_path: Path, state_dir: Path) -> None:
    with (
        ExperimentNetwork(state_dir=state_dir) as network,
        RegistryHost(tmp_path / "registry", network, tls=True) as registry,
    ):
        registry.push_layout(tiny_layout, "tiny")
        begin = registry.mark()
        context = ssl.create_default_context(cafile=str(registry.certificate))
        url = f"https://{registry.secure_host}/v2/tiny/manifests/latest"
        request = urllib.request.Request(url, headers={"Accept": "application/vnd.oci.image.manifest.v1+json"})
        with urllib.request.urlopen(request, context=context, timeout=30) as answer:
            assert answer.read() == OciLayout(tiny_layout).manifest_data
        # Both write one log.
        assert registry.traffic(begin, registry.mark()).manifest_requests == 1
        assert registry.reference("tiny", secure=True).startswith("198.18.")
        assert registry.wait_for_silence(0.2, 30.0)


@given(st.data())
def test_a_damaged_log_gives_requests_or_an_error_of_ours(data: st.DataObject) -> None:
    line = bytearray(LINE.encode())
    at = data.draw(st.integers(0, len(line) - 1))
    line[at : at + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=5))
    try:
        Traffic.of(parse_log(line.decode(errors="replace")))
    except ObdlabError as error:
        assert "got" in str(error)
