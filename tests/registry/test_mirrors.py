"""Mirrors: asked first and in order, passed over when they fail, never with another host's credentials."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.errors import RegistryError
from obdlab.registry.mirrors import HostsError, Mirror, Mirrors, parse_hosts
from obdlab.registry.reference import Reference, Repository
from obdlab.registry.remoteblob import RemoteBlob
from obdlab.registry.standing import Standing
from tests.registry import faulty
from tests.registry.faulty import FaultyRegistry, faulty_registry

DATA = random.Random(4).randbytes(200_000)
DIGEST = faulty.digest_of(DATA)
MANIFEST = b'{"schemaVersion":2}'
HOST = "registry.invalid"  # nobody answers there: what is read comes from a mirror
TAGGED = Reference.parse(f"{HOST}/some/image:tag")


@pytest.fixture
def first() -> Iterator[FaultyRegistry]:
    yield from _registry()


@pytest.fixture
def second() -> Iterator[FaultyRegistry]:
    yield from _registry()


def _registry(**options: object) -> Iterator[FaultyRegistry]:
    with faulty_registry(**options) as registry:
        registry.add_blob(DATA)
        registry.add_manifest("tag", MANIFEST)
        yield registry


def mirror(registry: FaultyRegistry, **options: object) -> Mirror:
    return Mirror.parse(f"http://{registry.host}", **options)  # type: ignore[arg-type]


def client_of(host: str, *mirrors: Mirror, credentials: Credentials | None = None) -> RegistryClient:
    return RegistryClient(credentials, request_timeout_s=20, deadline_s=60, mirrors=Mirrors({host: mirrors}))


def read(client: RegistryClient, repository: Repository, offset: int) -> None:
    assert client.read_range(repository, DIGEST, offset, 1000) == DATA[offset : offset + 1000]


def test_mirrors_are_asked_in_order(first: FaultyRegistry, second: FaultyRegistry) -> None:
    repository = Repository(HOST, "some/image")
    with closing(client_of(HOST, mirror(first), mirror(second))) as client:
        read(client, repository, 0)
        assert client.get_manifest(TAGGED).data == MANIFEST
        assert client.blob_size(repository, DIGEST) == len(DATA)
        with client.stream_blob(repository, DIGEST, len(DATA)) as stream:
            assert stream.readall() == DATA
    assert len(first.requests) == 4
    assert all(request.path.endswith(f"?ns={HOST}") for request in first.requests)
    assert second.requests == []


@pytest.mark.parametrize(
    "fault", [faulty.status(500), faulty.status(401), faulty.close_at_once, faulty.short_body(5)]
)
def test_a_mirror_that_fails_is_passed_over(
    fault: faulty.Fault, first: FaultyRegistry, second: FaultyRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    first.always(fault)
    repository = second.repository()
    caplog.set_level(logging.WARNING, "obdlab.registry")
    with closing(client_of(second.host, mirror(first))) as client:
        for offset in range(0, 10_000, 1000):
            read(client, repository, offset)
    assert len(first.requests) == 1
    assert len(second.requests) == 10
    assert [f"mirror http://{first.host}/v2: passed over for 5 s" in text for text in caplog.messages] == [True]


def test_a_mirror_without_the_blob_is_asked_for_others(first: FaultyRegistry, second: FaultyRegistry) -> None:
    other = random.Random(5).randbytes(5000)
    second.add_blob(other)
    repository = second.repository()
    with closing(client_of(second.host, mirror(first))) as client:
        for _ in range(3):
            assert client.read_range(repository, faulty.digest_of(other), 0, 100) == other[:100]
        assert len(first.requests) == 1
        read(client, repository, 0)
    assert (len(first.requests), len(second.requests)) == (2, 3)


def test_a_mirror_with_wrong_content(first: FaultyRegistry, second: FaultyRegistry) -> None:
    repository = second.repository()
    pinned = Reference(second.host, "some/image", None, faulty.digest_of(MANIFEST))
    first.always(faulty.wrong_bytes)
    with closing(client_of(second.host, mirror(first))) as client:
        assert client.get_manifest(pinned).data == MANIFEST
        # A range cannot be checked here. Who finds it wrong evicts it, and gets it from the registry.
        blob = RemoteBlob(client, repository, DIGEST, len(DATA))
        assert blob.read_at(0, 1000) != DATA[:1000]
        blob.evict(0, 1000)
        assert blob.read_at(0, 1000) == DATA[:1000]


def test_a_stream_goes_on_at_the_registry(first: FaultyRegistry, second: FaultyRegistry) -> None:
    first.always(faulty.reset(70_000))
    with (
        closing(client_of(second.host, mirror(first))) as client,
        client.stream_blob(second.repository(), DIGEST, len(DATA)) as stream,
    ):
        assert stream.readall() == DATA
    assert len(first.requests) == 1


def test_tags_are_asked_only_of_mirrors_that_resolve(first: FaultyRegistry, second: FaultyRegistry) -> None:
    tagged = Reference.parse(f"{second.host}/some/image:tag")
    with closing(client_of(second.host, mirror(first, resolves=False))) as client:
        client.get_manifest(tagged)
        assert first.requests == []
        client.get_manifest(tagged.with_digest(faulty.digest_of(MANIFEST)))
        assert len(first.requests) == 1


def test_pushes_go_to_the_registry(first: FaultyRegistry, second: FaultyRegistry) -> None:
    with closing(client_of(second.host, mirror(first))) as client:
        client.put_manifest(Reference.parse(f"{second.host}/some/image:new"), "application/json", MANIFEST)
    assert first.requests == []
    assert "new" in second.manifests


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_credentials_stay_with_their_host(auth: str) -> None:
    with faulty_registry(auth=auth) as stranger, faulty_registry(auth=auth) as registry:
        registry.add_blob(DATA)
        stranger.add_blob(DATA)
        credentials = Credentials({registry.host: (registry.user, registry.password)})
        with closing(client_of(registry.host, mirror(stranger), credentials=credentials)) as client:
            read(client, registry.repository(), 0)
        assert [request.authorization for request in stranger.requests if request.authorization] == []
        own = Credentials({stranger.host: (stranger.user, stranger.password)})
        with closing(client_of(HOST, mirror(stranger), credentials=own)) as client:
            read(client, Repository(HOST, "some/image"), 0)


def test_hosts_files(tmp_path: Path, first: FaultyRegistry) -> None:
    directory = tmp_path / "docker.io"
    directory.mkdir()
    text = f'server = "https://x"\n[host."http://{first.host}"]\ncapabilities = ["pull", "resolve"]\n'
    (directory / "hosts.toml").write_text(text)
    with closing(RegistryClient(mirrors=Mirrors(hosts_dir=tmp_path))) as client:
        read(client, Reference.parse("redis").repo, 0)
    assert first.requests[0].path == f"/v2/library/redis/blobs/{DIGEST}?ns=docker.io"
    mirrors = Mirrors(hosts_dir=tmp_path)
    assert mirrors.of(Repository("other.example:5000", "x")) == ()
    for place in ("_default", "other.example_5000_", "other.example:5000"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "hosts.toml").write_text(f'[host."https://{place.replace("_", "-")}/a"]')
        found = Mirrors(hosts_dir=tmp_path).of(Repository("other.example:5000", "x"))
        assert [mirror.base for mirror in found] == [f"https://{place.replace('_', '-')}/a/v2"]
    (directory / "hosts.toml").write_text("[host")
    with (
        closing(RegistryClient(mirrors=Mirrors(hosts_dir=tmp_path))) as client,
        pytest.raises(HostsError, match=r"docker\.io/hosts\.toml: not TOML"),
    ):
        read(client, Reference.parse("redis").repo, 0)


def test_what_hosts_files_say() -> None:
    text = """
        [host."https://one.example"]
        [host."two.example:5000"]
        capabilities = ["pull"]
        [host."two.example:5000".header]
        X-Dragonfly-Registry = ["https://docker.io"]
        X-Other = "text"
        [host."https://only-push.example"]
        capabilities = ["push"]
        [host."http://three.example/v2/hub"]
        override_path = true
    """
    assert parse_hosts(text.encode(), "hosts.toml") == (
        Mirror("https://one.example/v2"),
        Mirror(
            "https://two.example:5000/v2",
            resolves=False,
            headers={"X-Dragonfly-Registry": "https://docker.io", "X-Other": "text"},
        ),
        Mirror("http://three.example/v2/hub"),
    )


@pytest.mark.parametrize(
    "text",
    [
        'host = "x"',
        '[host]\n"https://x" = 1',
        '[host."ftp://x"]',
        '[host."https://u:p@x"]',
        '[host."https://x:70000"]',
        '[host."https://x?y"]',
        '[host."https://x"]\ncapabilities = "pull"',
        '[host."https://x"]\nheader = "a: b"',
        '[host."https://x".header]\nA = 1',
        '[host."https://x".header]\nA = "b\\r\\nC: d"',
        "a = [" * 5000,
    ],
)
def test_damaged_hosts_files(text: str) -> None:
    with pytest.raises(HostsError, match=r"hosts\.toml"):
        parse_hosts(text.encode(), "hosts.toml")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    for whole in (text, f'[host."{text}"]', f'[host."https://x"]\n{text}', f'[host."https://x".header]\n{text}'):
        try:
            parse_hosts(whole.encode(errors="surrogatepass"), "hosts.toml")
        except HostsError:
            continue


def test_all_mirrors_down_and_the_registry_too(first: FaultyRegistry) -> None:
    first.always(faulty.status(500))
    with first_client(first) as client, pytest.raises(RegistryError) as caught:
        client.read_range(Repository("127.0.0.1:1", "x", plain_http=True), DIGEST, 0, 10)
    assert "127.0.0.1:1" in str(caught.value)


def first_client(first: FaultyRegistry) -> closing[RegistryClient]:
    return closing(
        RegistryClient(request_timeout_s=1, deadline_s=0.3, mirrors=Mirrors({"127.0.0.1:1": [mirror(first)]}))
    )


def test_pauses_grow_and_end() -> None:
    standing = Standing("helper", first_pause_s=1e-4)
    pauses = []
    for _ in range(30):
        while not standing.usable():
            pass
        standing.failed("on purpose")
        pauses.append(standing._pause_s)
        if pauses[-1] > 0.05:
            break
    assert pauses == sorted(pauses)
    standing.worked()
    assert standing.usable()
    assert standing._pause_s == 1e-4
