"""Reading blobs through a P2P proxy: every URL form, and past it as soon as it fails."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from obdlab.image.open import open_image
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.mirrors import Mirror, Mirrors
from obdlab.registry.p2p import P2PAddressError, P2PProxy, parse_address
from obdlab.registry.reference import Reference
from obdlab.registry.remoteblob import RemoteBlob
from obdlab.settings.settings import Settings
from tests.image.test_open_remote import EXT4, EXT4_SHA256, push, sha256_of
from tests.registry import faulty
from tests.registry.faulty import FaultyRegistry, faulty_registry
from tests.registry.proxy import Proxy, running_proxy
from tests.registry.server import RegistryServer

DATA = random.Random(3).randbytes(200_000)
DIGEST = faulty.digest_of(DATA)
WAIT_S = 60.0


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with faulty_registry() as registry:
        registry.add_blob(DATA)
        yield registry


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with running_proxy() as proxy:
        yield proxy


def client_of(registry: FaultyRegistry, address: str, deadline_s: float = 60.0) -> RegistryClient:
    credentials = Credentials({registry.host: (registry.user, registry.password)})
    return RegistryClient(credentials, request_timeout_s=20, deadline_s=deadline_s, p2p=P2PProxy(address))


def read(client: RegistryClient, registry: FaultyRegistry, offset: int) -> None:
    assert client.read_range(registry.repository(), DIGEST, offset, 1000) == DATA[offset : offset + 1000]


@pytest.mark.parametrize("form", ["prefix", "prefix with a slash", "http-proxy"])
@pytest.mark.parametrize("auth", ["", "basic", "bearer"])
def test_blobs_come_through_the_proxy(form: str, auth: str, proxy: Proxy) -> None:
    address = {"http-proxy": f"http-proxy://127.0.0.1:{proxy.port}"}.get(form, proxy.address)
    with faulty_registry(auth=auth) as registry:
        registry.add_blob(DATA)
        registry.add_manifest("tag", b'{"schemaVersion":2}')
        with closing(client_of(registry, address + "/" * (form == "prefix with a slash"))) as client:
            for offset in (0, 5000, 70_000):
                read(client, registry, offset)
            url = f"{registry.repository().blobs_url}/{DIGEST}"
            assert [target for target, _ in proxy.asked] == [url] * 3
            # The registry serves the blob itself, so that the proxy must show who asks.
            assert all(bool(header) == bool(auth) for _, header in proxy.asked)
            # One question by ourselves tells how to get the blob; its content came through the proxy.
            direct = [request for request in registry.blob_requests() if request.range == "bytes=0-0"]
            assert len(direct) == (1 if not auth else 2)
            # What is no content of blobs goes to the registry.
            client.get_manifest(Reference.parse(f"{registry.host}/some/image:tag"))
            assert client.blob_size(registry.repository(), DIGEST) == len(DATA)
            assert len(proxy.asked) == 3


def test_storage_gets_no_authorization(proxy: Proxy) -> None:
    with faulty_registry() as storage, faulty_registry(auth="bearer") as registry:
        storage.add_blob(DATA)
        registry.add_blob(DATA)
        registry.always(faulty.redirect(f"http://{storage.host}/storage/{{digest}}"))
        with closing(client_of(registry, proxy.address)) as client:
            read(client, registry, 10)
            read(client, registry, 2000)
        assert proxy.asked == [(f"http://{storage.host}/storage/{DIGEST}", None)] * 2


def test_a_token_that_expires_on_the_way(proxy: Proxy) -> None:
    with faulty_registry(auth="bearer") as registry:
        registry.add_blob(DATA)
        with closing(client_of(registry, proxy.address)) as client:
            read(client, registry, 0)
            registry.revoke_tokens()
            read(client, registry, 1000)  # past the proxy, with a new token
            read(client, registry, 2000)
        assert len(proxy.asked) == 3, "a refused token is no failure of the proxy"


@pytest.mark.parametrize("failure", [500, 503, "silence"])
def test_a_proxy_that_fails_is_passed_over(failure: int | str, registry: FaultyRegistry, proxy: Proxy) -> None:
    proxy.fails_with = failure
    with closing(client_of(registry, proxy.address, deadline_s=2 if failure == "silence" else 60)) as client:
        for offset in (0, 1000, 2000):
            read(client, registry, offset)
        assert 1 <= len(proxy.asked) < 3
        proxy.fails_with = 0
        before = len(proxy.asked)
        end = time.monotonic() + WAIT_S
        while len(proxy.asked) == before and time.monotonic() < end:
            read(client, registry, 0)
            time.sleep(0.05)
        assert len(proxy.asked) > before, "it is not asked again once it is well"


def test_a_proxy_that_is_down_costs_nothing_and_comes_back(registry: FaultyRegistry) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with closing(client_of(registry, f"http://127.0.0.1:{port}/accelerator")) as client:
        read(client, registry, 0)
        read(client, registry, 1000)
        with running_proxy(port) as proxy:
            end = time.monotonic() + WAIT_S
            while not proxy.asked and time.monotonic() < end:
                read(client, registry, 0)
                time.sleep(0.05)
            assert proxy.asked
        for offset in range(0, 20_000, 1000):
            read(client, registry, offset)


def test_a_proxy_that_lies_is_left_out_for_the_blob(registry: FaultyRegistry, proxy: Proxy) -> None:
    proxy.fails_with = "lies"
    with closing(client_of(registry, proxy.address)) as client:
        blob = RemoteBlob(client, registry.repository(), DIGEST, len(DATA))
        assert blob.read_at(0, 1000) != DATA[:1000]
        blob.evict(0, 1000)  # as whoever checks does
        assert blob.read_at(0, 1000) == DATA[:1000]


@pytest.mark.registry
@pytest.mark.parametrize("trouble", [0, "lies", 503])
def test_an_image_through_the_proxy_and_the_cache(
    trouble: int | str, proxy: Proxy, registry_server: RegistryServer, tmp_path: Path
) -> None:
    config = push(registry_server, "p2p/image", EXT4)
    proxy.fails_with = trouble
    settings = Settings(cache_dir=tmp_path, read_deadline_s=60, p2p_address=proxy.address)
    with open_image(config, settings) as image:
        assert sha256_of(image) == EXT4_SHA256
        asked = len(proxy.asked)
        assert asked > 0
        assert sha256_of(image) == EXT4_SHA256
        assert len(proxy.asked) == asked, "what is cached is not asked for again"


def test_a_registry_that_is_down_is_not_the_proxys_fault(registry: FaultyRegistry, proxy: Proxy) -> None:
    with closing(client_of(registry, proxy.address)) as client:
        registry.next(faulty.status(503))
        read(client, registry, 0)
        assert len(proxy.asked) == 1


def test_dragonflys_registry_mirror(registry: FaultyRegistry, proxy: Proxy) -> None:
    mirror = Mirror.parse(
        f"http://127.0.0.1:{proxy.port}", headers={"X-Dragonfly-Registry": f"http://{registry.host}"}
    )
    with closing(RegistryClient(mirrors=Mirrors({registry.host: [mirror]}))) as client:
        read(client, registry, 100)
    path = f"/v2/some/image/blobs/{DIGEST}?ns={registry.host.replace(':', '%3A')}"
    assert proxy.asked == [(f"http://{registry.host}{path}", None)]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost:9731",
        "ftp://x",
        "http://",
        "http://x:0/",
        "http://x:99999",
        "http://u:p@x/",
        "http://x/?a",
        "http-proxy://x/path",
        "http://x /",
        "http://[::1",
    ],
)
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(P2PAddressError, match="P2P address"):
        P2PProxy(address)


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        ("http://a.example/x", ("a.example", 80)),
        ("https://a.example/x/", ("a.example", 443)),
        ("http-proxy://a.example", ("a.example", 80)),
        ("http-proxy://a.example:65001/", ("a.example", 65001)),
        ("https://[::1]:1/", ("::1", 1)),
    ],
)
def test_where_a_proxy_listens(address: str, endpoint: tuple[str, int]) -> None:
    assert parse_address(address)[2] == endpoint


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("http://p2p.example:65001", True),
        ("http-proxy://192.0.2.1:65001", True),
        ("https://p2p.example", False),
        ("https://127.0.0.1", False),
        ("http://127.0.0.1:65001/x", False),
        ("http-proxy://localhost:65001", False),
    ],
)
def test_tokens_without_tls_are_warned_of(address: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    P2PProxy(address)
    assert ("without TLS" in caplog.text) is warned


def test_a_proxy_that_is_down_is_not_asked(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        proxy = P2PProxy(f"http://127.0.0.1:{probe.getsockname()[1]}")
        assert not proxy.usable("http://registry.example/blob")
    assert "cannot be reached" in caplog.text
    assert "Connection refused" in caplog.text


def test_a_silent_resolver_does_not_hold_the_first_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def silent(*_: object, **__: object) -> None:
        answered.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    proxy = P2PProxy("http://p2p.example")
    began = time.monotonic()
    assert not proxy.usable("http://registry.example/blob")
    assert not proxy.usable("http://registry.example/blob")
    assert time.monotonic() - began < 20
    answered.set()
    end = time.monotonic() + WAIT_S
    while proxy._checking and time.monotonic() < end:
        time.sleep(0.01)
    assert not proxy.usable("http://registry.example/blob")


def test_a_proxy_with_a_name_that_dns_cannot_have_is_not_asked() -> None:
    assert not P2PProxy(f"http://{'a' * 64}.example").usable("http://registry.example/blob")
