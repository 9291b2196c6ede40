"""Every way a registry can fail, and what a reader gets: the right bytes, or an error that says where, in time."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import pytest

from obdlab.call import Call
from obdlab.errors import CorruptBlobError
from obdlab.registry import session
from obdlab.registry.client import RegistryClient
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Reference
from tests.registry import faulty
from tests.registry.faulty import FaultyRegistry, faulty_registry
from tests.registry.reading import (
    DATA,
    DEADLINE_S,
    LENGTH,
    OFFSET,
    WANTED,
    assert_located,
    read,
    with_password,
)

PASSING_FAULTS = {
    "500": faulty.status(500),
    "503": faulty.status(503),
    "429": faulty.status(429, Retry_After="0"),
    "408": faulty.status(408),
    "short body": faulty.short_body(100),
    "empty body": faulty.short_body(0),
    "reset": faulty.reset(1000),
    "closed": faulty.close_at_once,
    "not HTTP": faulty.garbage,
    "other range": faulty.other_range,
    "no Content-Range": faulty.no_content_range,
    "longer body": faulty.longer_body,
    "longer body in chunks": faulty.chunked_longer,
}
LASTING_FAULTS = {
    **PASSING_FAULTS,
    "silence": faulty.silence,
    "drip": faulty.drip,
    "drip headers": faulty.drip_headers,
}
PERMANENT_STATUSES = [400, 403, 404, 410, 416]


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with faulty_registry() as registry:
        registry.add_blob(DATA)
        yield registry


@pytest.fixture
def client() -> Iterator[RegistryClient]:
    client = RegistryClient(request_timeout_s=5, deadline_s=20)
    yield client
    client.close()


@pytest.fixture
def impatient() -> Iterator[RegistryClient]:
    client = RegistryClient(request_timeout_s=0.3, deadline_s=DEADLINE_S)
    yield client
    client.close()


@pytest.mark.parametrize("fault", PASSING_FAULTS.values(), ids=PASSING_FAULTS.keys())
def test_read_survives_a_fault_that_passes(
    registry: FaultyRegistry, client: RegistryClient, fault: faulty.Fault
) -> None:
    registry.next(fault, fault)
    assert read(client, registry) == WANTED
    assert len(registry.requests) == 3


def test_read_survives_silence_once(registry: FaultyRegistry) -> None:
    registry.next(faulty.silence)
    client = RegistryClient(request_timeout_s=0.3, deadline_s=20)
    assert read(client, registry) == WANTED
    client.close()


@pytest.mark.parametrize("fault", LASTING_FAULTS.values(), ids=LASTING_FAULTS.keys())
def test_read_fails_clearly_and_in_time(
    registry: FaultyRegistry, impatient: RegistryClient, fault: faulty.Fault
) -> None:
    registry.always(fault)
    started = time.monotonic()
    with pytest.raises(RegistryError) as caught:
        read(impatient, registry)
    # Far from a measurement: a read without a deadline would hang for minutes.
    assert time.monotonic() - started < DEADLINE_S + 30
    assert_located(caught.value, registry)
    assert caught.value.temporary


def test_read_by_a_deadline_of_its_own(registry: FaultyRegistry) -> None:
    registry.always(faulty.drip)
    client = RegistryClient()  # 120 s of its own
    with pytest.raises(RegistryError) as caught:
        client.read_range(registry.repository(), faulty.digest_of(DATA), OFFSET, LENGTH, Call(time.monotonic() + 0.3))
    assert_located(caught.value, registry)
    client.close()


@pytest.mark.parametrize("code", PERMANENT_STATUSES)
def test_permanent_statuses_are_not_tried_again(registry: FaultyRegistry, client: RegistryClient, code: int) -> None:
    registry.always(faulty.status(code))
    with pytest.raises(RegistryError) as caught:
        read(client, registry)
    assert_located(caught.value, registry)
    assert caught.value.status == code
    assert not caught.value.temporary
    assert len(registry.requests) == 1


def test_retry_after_is_kept(registry: FaultyRegistry) -> None:
    client = RegistryClient()
    registry.next(faulty.status(429, Retry_After="1"))
    started = time.monotonic()
    assert read(client, registry) == WANTED
    assert time.monotonic() - started >= 1


def test_retry_after_beyond_the_deadline_fails_now(registry: FaultyRegistry, impatient: RegistryClient) -> None:
    registry.always(faulty.status(429, Retry_After="50"))
    with pytest.raises(RegistryError):
        read(impatient, registry)
    assert len(registry.requests) == 1


def test_nobody_there(impatient: RegistryClient) -> None:
    with faulty_registry() as registry:
        pass
    with pytest.raises(RegistryError) as caught:
        read(impatient, registry)
    assert_located(caught.value, registry)
    assert "refused" in str(caught.value)


def test_chunked_answers(registry: FaultyRegistry, client: RegistryClient) -> None:
    registry.always(faulty.chunked)
    assert read(client, registry) == WANTED
    with client.stream_blob(registry.repository(), faulty.digest_of(DATA), len(DATA)) as stream:
        assert stream.readall() == DATA


def test_registry_without_ranges(registry: FaultyRegistry, client: RegistryClient) -> None:
    registry.always(faulty.whole_blob)
    assert read(client, registry) == WANTED
    assert client.blob_size(registry.repository(), faulty.digest_of(DATA)) == len(DATA)


def test_registry_without_ranges_and_a_large_blob(registry: FaultyRegistry, client: RegistryClient) -> None:
    big = registry.add_blob(bytes(6 << 20))
    registry.always(faulty.whole_blob)
    with pytest.raises(RegistryError, match="ignores ranges") as caught:
        client.read_range(registry.repository(), big, 5 << 20, 1000)
    assert not caught.value.temporary


# -- redirects -------------------------------------------------------------------------------------------------------


def test_redirect_elsewhere_is_remembered_and_gets_no_token(client: RegistryClient) -> None:
    with faulty_registry(auth="bearer") as registry, faulty_registry() as storage:
        digest = registry.add_blob(DATA)
        storage.add_blob(DATA)
        registry.always(faulty.redirect(f"http://{storage.host}/storage/{{digest}}?signature=1"))
        client = with_password(registry)
        for _ in range(3):
            assert client.read_range(registry.repository(), digest, OFFSET, LENGTH) == WANTED
        assert len(registry.blob_requests()) == 2  # refused, redirected
        assert len(storage.requests) == 3
        assert not any(request.authorization for request in storage.requests)
        client.close()


@pytest.mark.parametrize("code", [401, 403, 404])
def test_expired_redirect_is_asked_for_anew(client: RegistryClient, registry: FaultyRegistry, code: int) -> None:
    with faulty_registry() as storage:
        storage.add_blob(DATA)
        registry.always(faulty.redirect(f"http://{storage.host}/storage/{{digest}}"))
        assert read(client, registry) == WANTED
        storage.next(faulty.status(code))
        assert read(client, registry) == WANTED
        assert len(registry.requests) == 2


def test_storage_that_dies_is_asked_for_anew(client: RegistryClient, registry: FaultyRegistry) -> None:
    with faulty_registry() as storage:
        storage.add_blob(DATA)
        registry.next(faulty.redirect(f"http://{storage.host}/storage/{{digest}}"))
        assert read(client, registry) == WANTED
        assert len(storage.requests) == 1
    assert read(client, registry) == WANTED
    assert len(registry.requests) == 2


def test_storage_that_breaks_off_is_asked_for_anew(client: RegistryClient, registry: FaultyRegistry) -> None:
    with faulty_registry() as storage:
        storage.add_blob(DATA)
        registry.next(faulty.redirect(f"http://{storage.host}/storage/{{digest}}"))
        storage.next(None, faulty.short_body(7))
        assert read(client, registry) == read(client, registry) == WANTED
        assert len(registry.requests) == 2


def test_redirect_on_the_same_host_keeps_the_token() -> None:
    with faulty_registry(auth="bearer") as registry:
        digest = registry.add_blob(DATA)
        registry.next(faulty.redirect("/v2/other/name/blobs/{digest}"))
        client = with_password(registry)
        assert client.read_range(registry.repository(), digest, OFFSET, LENGTH) == WANTED
        assert registry.requests[-1].path.startswith("/v2/other/name/")
        client.close()


def test_storage_that_is_busy_is_given_the_time_it_asks_for(client: RegistryClient, registry: FaultyRegistry) -> None:
    with faulty_registry() as storage:
        storage.add_blob(DATA)
        registry.always(faulty.redirect(f"http://{storage.host}/storage/{{digest}}"))
        assert read(client, registry) == WANTED
        for code in (429, 503):
            storage.next(faulty.status(code, Retry_After="1"))
            before = len(registry.requests)
            started = time.monotonic()
            assert read(client, registry) == WANTED
            assert time.monotonic() - started >= 1.0
            assert len(registry.requests) == before + 1


def test_places_that_have_expired_make_room(monkeypatch: pytest.MonkeyPatch, registry: FaultyRegistry) -> None:
    monkeypatch.setattr(session, "_MAX_LOCATIONS", 2)
    monkeypatch.setattr(session, "_LOCATION_LIFE_S", 1e6)
    blobs = [bytes([number]) * 100 for number in range(4)]
    with faulty_registry() as storage, closing(RegistryClient(deadline_s=60, hedge_share=0)) as client:
        for blob in blobs:
            registry.add_blob(blob)
            storage.add_blob(blob)
        registry.always(faulty.redirect(f"http://{storage.host}/storage/{{digest}}"))

        def asks(blob: bytes) -> bool:
            before = len(registry.requests)
            assert client.read_range(registry.repository(), faulty.digest_of(blob), 0, 9) == blob[:9]
            return len(registry.requests) > before

        assert [asks(blob) for blob in blobs[:3] * 2] == [True, True, True, False, False, True]
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 2e6)
        monkeypatch.setattr(session, "time", clock)
        assert [asks(blob) for blob in blobs[2:] * 2] == [True, True, False, False]


@pytest.mark.parametrize("code", [401, 403, 404, 405])
def test_a_blob_that_may_not_be_shared(registry: FaultyRegistry, client: RegistryClient, code: int) -> None:
    registry.next(faulty.status(404), faulty.status(code))
    assert not client.mount_blob(registry.repository(), faulty.digest_of(DATA), "other/image")
    registry.next(faulty.status(404), faulty.status(400))
    with pytest.raises(RegistryError, match="mounting blob"):
        client.mount_blob(registry.repository(), faulty.digest_of(DATA), "other/image")


@pytest.mark.parametrize("code", [200, 301, 302, 303, 307, 308])
def test_a_blob_in_storage_elsewhere_is_there(registry: FaultyRegistry, client: RegistryClient, code: int) -> None:
    registry.always(faulty.status(code, Location="http://127.0.0.1:1/not-asked"))
    assert client.has_blob(registry.repository(), faulty.digest_of(DATA))
    registry.always(faulty.status(404))
    assert not client.has_blob(registry.repository(), faulty.digest_of(DATA))
    assert len(registry.requests) == 2


@pytest.mark.parametrize("code", [400, 403, 405, 410, 416, 451])
def test_a_refusal_to_tell_is_not_the_blobs_absence(
    registry: FaultyRegistry, client: RegistryClient, code: int
) -> None:
    registry.always(faulty.status(code))
    with pytest.raises(RegistryError, match=f"looking for blob.*{code}"):
        client.has_blob(registry.repository(), faulty.digest_of(DATA))


@pytest.mark.parametrize("location", ["", "ftp://127.0.0.1/x", "https:///x", "//[", "http://[::1/"])
def test_redirect_to_nowhere(registry: FaultyRegistry, client: RegistryClient, location: str) -> None:
    registry.always(faulty.redirect(location))
    with pytest.raises(RegistryError, match="Location") as caught:
        read(client, registry)
    assert_located(caught.value, registry)


def test_redirect_in_a_circle(registry: FaultyRegistry, client: RegistryClient) -> None:
    registry.always(faulty.redirect("/v2/some/image/blobs/{digest}"))
    with pytest.raises(RegistryError, match="redirects"):
        read(client, registry)


# -- streams, manifests, uploads -------------------------------------------------------------------------------------


def test_stream_picks_itself_up(registry: FaultyRegistry, client: RegistryClient) -> None:
    registry.next(faulty.short_body(100_000), faulty.status(503), faulty.reset(50_000), faulty.whole_blob)
    with client.stream_blob(registry.repository(), faulty.digest_of(DATA), len(DATA)) as stream:
        assert stream.readall() == DATA


def test_stream_with_a_slow_reader(registry: FaultyRegistry) -> None:
    client = RegistryClient(deadline_s=0.5)
    with client.stream_blob(registry.repository(), faulty.digest_of(DATA), len(DATA)) as stream:
        head = stream.read(10)
        time.sleep(0.6)  # not the registry's fault
        assert head + stream.readall() == DATA
    client.close()


def test_stream_survives_a_token_that_expires_in_the_middle() -> None:
    with faulty_registry(auth="bearer") as registry:
        digest = registry.add_blob(DATA)
        registry.next(faulty.short_body(100_000))
        client = with_password(registry)
        with client.stream_blob(registry.repository(), digest, len(DATA)) as stream:
            head = stream.read(50_000)
            registry.revoke_tokens()
            assert head + stream.readall() == DATA
        assert registry.tokens_issued == 2
        client.close()


@pytest.mark.parametrize("fault", [faulty.wrong_bytes])
def test_stream_of_wrong_bytes(registry: FaultyRegistry, client: RegistryClient, fault: faulty.Fault) -> None:
    registry.always(fault)
    digest = faulty.digest_of(DATA)
    with (
        pytest.raises(CorruptBlobError, match=digest),
        client.stream_blob(registry.repository(), digest, len(DATA)) as stream,
    ):
        stream.readall()
    with (
        pytest.raises(CorruptBlobError, match=digest),
        client.stream_blob(registry.repository(), digest, len(DATA)) as stream,
    ):
        stream.read(10)  # leaving the block checks the rest


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 0])
def test_stream_of_another_size(registry: FaultyRegistry, client: RegistryClient, size: int) -> None:
    digest = faulty.digest_of(DATA)
    with (
        pytest.raises((RegistryError, CorruptBlobError), match=digest),
        client.stream_blob(registry.repository(), digest, size),
    ):
        pass


@pytest.mark.parametrize("fault", [faulty.drip, faulty.silence, faulty.status(500)], ids=["drip", "silence", "500"])
def test_stream_ends_in_time(registry: FaultyRegistry, impatient: RegistryClient, fault: faulty.Fault) -> None:
    registry.always(fault)
    with (
        pytest.raises(RegistryError) as caught,
        impatient.stream_blob(registry.repository(), faulty.digest_of(DATA), len(DATA)) as stream,
    ):
        stream.readall()
    assert registry.host in str(caught.value)


def test_a_stream_in_chunks_ends_where_the_blob_does(registry: FaultyRegistry, client: RegistryClient) -> None:
    digest = registry.add_blob(DATA)
    registry.always(faulty.chunked)
    with client.stream_blob(registry.repository(), digest, len(DATA)) as stream:
        assert stream.read() == DATA
    registry.always(faulty.chunked_longer)
    with (
        pytest.raises(CorruptBlobError, match="longer than it should be"),
        client.stream_blob(registry.repository(), digest, len(DATA)) as stream,
    ):
        stream.read()


def test_manifest_of_wrong_bytes(registry: FaultyRegistry, client: RegistryClient) -> None:
    digest = registry.add_manifest("v1", b'{"schemaVersion":2}')
    registry.always(faulty.wrong_bytes)
    for name in (f"{registry.host}/some/image:v1", f"{registry.host}/some/image@{digest}"):
        with pytest.raises(CorruptBlobError, match="wrong content"):
            client.get_manifest(Reference.parse(name))


def test_manifest_too_large(registry: FaultyRegistry, client: RegistryClient) -> None:
    registry.add_manifest("v1", bytes((4 << 20) + 1))
    with pytest.raises(RegistryError, match="longer than"):
        client.get_manifest(Reference.parse(f"{registry.host}/some/image:v1"))


@pytest.mark.parametrize("name", ["500", "429", "short body", "empty body", "reset", "closed", "not HTTP"])
def test_manifest_survives_a_fault_that_passes(registry: FaultyRegistry, client: RegistryClient, name: str) -> None:
    registry.add_manifest("v1", b'{"schemaVersion":2}')
    registry.next(PASSING_FAULTS[name])
    assert client.get_manifest(Reference.parse(f"{registry.host}/some/image:v1")).data == b'{"schemaVersion":2}'


def test_manifest_fails_after_a_few_tries(registry: FaultyRegistry) -> None:
    registry.always(faulty.status(500))
    client = RegistryClient()  # with 120 s to go, who waits at a terminal hears sooner
    with pytest.raises(RegistryError, match="after 5 tries"):
        client.get_manifest(Reference.parse(f"{registry.host}/some/image:v1"))
    client.close()


def test_who_is_not_answered_in_the_end_hears_what_was_answered_before(registry: FaultyRegistry) -> None:
    registry.add_manifest("v1", b'{"schemaVersion":2}')
    registry.always(faulty.silence)
    registry.next(faulty.status(503))
    client = RegistryClient(request_timeout_s=0.2, deadline_s=1.0)
    with pytest.raises(RegistryError, match=r"no answer in time .* before that: .*503"):
        client.get_manifest(Reference.parse(f"{registry.host}/some/image:v1"))
    client.close()


def test_push_is_started_anew_after_a_fault(registry: FaultyRegistry, client: RegistryClient) -> None:
    data = b"to be pushed" * 1000
    # HEAD, POST fails; HEAD, POST, PUT fails; then all is well.
    registry.next(None, faulty.status(500), None, None, faulty.status(503))
    assert client.push_blob(registry.repository(), faulty.digest_of(data), len(data), lambda: io.BytesIO(data))
    assert registry.blobs[faulty.digest_of(data)] == data


def test_push_of_other_content_than_promised(registry: FaultyRegistry, client: RegistryClient) -> None:
    digest = faulty.digest_of(b"this")
    with pytest.raises(RegistryError, match=digest):
        client.push_blob(registry.repository(), digest, 4, lambda: io.BytesIO(b"that"))
    assert digest not in registry.blobs


def test_closing_closes_connections_though_an_error_is_kept() -> None:
    with faulty_registry(blobs={faulty.digest_of(DATA): DATA}) as registry:
        before = len(os.listdir("/proc/self/fd"))
        client = RegistryClient()
        read(client, registry)
        registry.next(faulty.status(404))
        with pytest.raises(RegistryError) as kept:
            read(client, registry)
        assert len(os.listdir("/proc/self/fd")) > before
        client.close()
        deadline = time.monotonic() + 60  # the registry, in this process too, has its end still to close
        while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) <= before
        assert kept.value.status == 404
        assert read(client, registry) == WANTED  # it can be used again
        client.close()


def test_connections_are_kept_for_as_many_readers_as_a_device_has(caplog: pytest.LogCaptureFixture) -> None:
    readers = 64
    with faulty_registry(blobs={faulty.digest_of(DATA): DATA}) as registry:
        client = RegistryClient(hedge_share=0)
        together = threading.Barrier(readers)

        def meet(answer: faulty.Answer) -> None:
            together.wait(30)
            answer.send()

        registry.always(meet)
        with ThreadPoolExecutor(readers) as threads:
            assert set(threads.map(lambda _: read(client, registry), range(2 * readers))) == {WANTED}
        client.close()
    assert not [record for record in caplog.records if "discarding connection" in record.getMessage()]
