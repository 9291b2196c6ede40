"""gRPC's health protocol, as a client sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue, UInt32Value

from obdlab.snapshotter import grpchealth
from obdlab.snapshotter.grpchealth import Health

# As the protocol numbers them (grpc.health.v1.HealthCheckResponse.ServingStatus).
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


class Served:
    """A server with one health service, and calls of it."""

    def __init__(self, address: str) -> None:
        self.well = True
        self.health = Health(frozenset({"known"}), lambda: self.well)
        self.server = grpc.server(ThreadPoolExecutor(12))
        self.health.add_to(self.server)
        self.server.add_insecure_port(address)
        self.server.start()
        self.channel = grpc.insecure_channel(address, [("grpc.default_authority", "localhost")])
        forms = StringValue.SerializeToString, UInt32Value.FromString
        self._check = self.channel.unary_unary(f"/{grpchealth.SERVICE}/Check", *forms)
        self._watch = self.channel.unary_stream(f"/{grpchealth.SERVICE}/Watch", *forms)

    def check(self, service: str = "") -> int:
        return int(self._check(StringValue(value=service), timeout=60).value)

    def watch(self, service: str = "") -> Iterator[int]:
        return (int(answer.value) for answer in self._watch(StringValue(value=service), timeout=120))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(grpchealth, "_LOOK_S", 0.05)
    served = Served(f"unix:{tmp_path}/sock")
    yield served
    served.channel.close()
    served.health.stop()
    served.server.stop(0).wait(60)


def test_a_check_says_how_it_is_now(served: Served) -> None:
    for service in ("", "known"):
        served.well = True
        assert served.check(service) == SERVING
        served.well = False
        assert served.check(service) == NOT_SERVING


def test_after_the_end_no_service_is_well(served: Served) -> None:
    served.health.stop()
    assert served.well
    assert served.check() == NOT_SERVING


def test_an_unknown_service_has_no_state(served: Served) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        served.check("other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    states = served.watch("other")
    assert next(states) == SERVICE_UNKNOWN
    served.health.stop()
    assert list(states) == []


@pytest.mark.parametrize("well", [True, False])
def test_a_watch_reports_changes_and_ends_with_not_serving(served: Served, well: bool) -> None:
    states = served.watch("known")
    assert next(states) == SERVING
    served.well = False
    assert next(states) == NOT_SERVING
    if well:
        served.well = True
        assert next(states) == SERVING
    served.health.stop()
    assert list(states) == ([NOT_SERVING] if well else [])


def test_few_may_watch(served: Served) -> None:
    watches: list[Callable[[], int]] = []
    for _ in range(8):
        states = served.watch()
        assert next(states) == SERVING
        watches.append(states.__next__)
    with pytest.raises(grpc.RpcError) as caught:
        next(served.watch())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert served.check() == SERVING
