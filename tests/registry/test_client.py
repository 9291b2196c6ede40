"""The client against a real registry."""

from __future__ import annotations

import io
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.cache.admin import entries
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.space import CacheSpace
from obdlab.errors import CorruptBlobError, FormatError, OutOfRangeError
from obdlab.formats.oci import DOCKER_MANIFEST, OCI_CONFIG, OCI_MANIFEST, Descriptor, Manifest, digest_of
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Reference, Repository
from obdlab.registry.remoteblob import RemoteBlob
from tests import capabilities
from tests.registry.server import PASSWORD, USER, RegistryServer, running_registry

pytestmark = pytest.mark.registry

DATA = os.urandom(1_500_000)
DIGEST = digest_of(DATA)
CONFIG = b"{}"


@pytest.fixture
def client() -> Iterator[RegistryClient]:
    client = RegistryClient(deadline_s=10)
    yield client
    client.close()


@pytest.fixture(scope="session")
def pushed(registry_server: RegistryServer) -> Repository:
    """A repository with a nested name that holds DATA."""
    repository = Repository(registry_server.host, "tests/client/nested-name_x", plain_http=True)
    push(RegistryClient(), repository, DATA)
    return repository


def push(client: RegistryClient, repository: Repository, data: bytes) -> bool:
    return client.push_blob(repository, digest_of(data), len(data), lambda: io.BytesIO(data))


def manifest_of(data: bytes, media_type: str = OCI_MANIFEST) -> bytes:
    layer = Descriptor("application/octet-stream", digest_of(data), len(data))
    config = Descriptor(OCI_CONFIG, digest_of(CONFIG), len(CONFIG))
    return Manifest(config, (layer,), media_type).to_bytes()


@settings(max_examples=50, deadline=None)
@given(offset=st.integers(0, len(DATA)), length=st.integers(0, 200_000))
def test_ranges(client: RegistryClient, pushed: Repository, offset: int, length: int) -> None:
    length = min(length, len(DATA) - offset)
    assert client.read_range(pushed, DIGEST, offset, length) == DATA[offset : offset + length]


def test_range_beyond_the_end(client: RegistryClient, pushed: Repository) -> None:
    for offset, length in [(len(DATA), 1), (len(DATA) - 5, 10)]:
        with pytest.raises(RegistryError) as caught:
            client.read_range(pushed, DIGEST, offset, length)
        assert f"{pushed}@{DIGEST}" in str(caught.value)
        assert f"at offset {offset}" in str(caught.value)


def test_blobs(client: RegistryClient, pushed: Repository) -> None:
    assert client.blob_size(pushed, DIGEST) == len(DATA)
    with pytest.raises(RegistryError) as caught:
        client.blob_size(pushed, digest_of(b"nobody has this"))
    assert caught.value.status == 404
    assert client.read_blob(pushed, DIGEST, len(DATA), 2_000_000) == DATA
    with pytest.raises(RegistryError, match="too large"):
        client.read_blob(pushed, DIGEST, len(DATA), 1_000_000)
    with client.stream_blob(pushed, DIGEST, len(DATA)) as stream:
        assert stream.read(100) == DATA[:100]
        buffered = io.BufferedReader(stream)
        assert buffered.read(1000) == DATA[100:1100]
    assert stream.closed


def test_malformed_digests_are_not_sent(client: RegistryClient, pushed: Repository) -> None:
    with pytest.raises(FormatError):
        client.blob_size(pushed, "sha256:../../manifests/x")
    with pytest.raises(FormatError):
        client.read_range(pushed, "../x", 0, 1)
    with pytest.raises(FormatError):
        RemoteBlob(client, pushed, "../x", 1)


def test_push_once_and_mount(client: RegistryClient, pushed: Repository, registry_server: RegistryServer) -> None:
    data = os.urandom(100_000)
    digest = digest_of(data)
    assert push(client, pushed, data)
    assert not push(client, pushed, data)
    elsewhere = Repository(pushed.host, "tests/client/elsewhere", plain_http=True)

    def must_not_be_read() -> io.BytesIO:
        raise AssertionError("a mounted blob was uploaded")

    assert client.push_blob(elsewhere, digest, len(data), must_not_be_read, mount_from=pushed)
    assert client.read_range(elsewhere, digest, 5, 10) == data[5:15]
    # Nothing to mount: the content goes over the wire.
    other = digest_of(b"other")
    assert client.push_blob(elsewhere, other, 5, lambda: io.BytesIO(b"other"), mount_from=pushed)
    assert client.push_blob(elsewhere, digest_of(b""), 0, lambda: io.BytesIO(b""))
    assert client.blob_size(elsewhere, digest_of(b"")) == 0


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_manifests(client: RegistryClient, pushed: Repository, media_type: str) -> None:
    push(client, pushed, CONFIG)
    data = manifest_of(DATA, media_type)
    tagged = Reference.parse(f"{pushed}:{media_type.split('.')[1]}")
    digest = client.put_manifest(tagged, media_type, data)
    assert digest == digest_of(data)
    for reference in (tagged, tagged.with_digest(digest), Reference.parse(f"{pushed}@{digest}")):
        fetched = client.get_manifest(reference)
        assert (fetched.media_type, fetched.digest, fetched.data) == (media_type, digest, data)
    assert client.put_manifest(Reference.parse(f"{pushed}@{digest}"), media_type, data) == digest
    with pytest.raises(CorruptBlobError):
        client.put_manifest(tagged.with_digest(digest_of(b"x")), media_type, data)
    with pytest.raises(RegistryError) as caught:
        client.get_manifest(Reference.parse(f"{pushed}:no-such-tag"))
    assert caught.value.status == 404
    assert "no-such-tag" in str(caught.value)


def test_manifest_the_registry_refuses(client: RegistryClient, pushed: Repository) -> None:
    with pytest.raises(RegistryError, match="MANIFEST") as caught:
        client.put_manifest(Reference.parse(f"{pushed}:bad"), OCI_MANIFEST, manifest_of(b"not pushed"))
    assert caught.value.status == 400


def test_password(tmp_path: Path) -> None:
    with running_registry(tmp_path, htpasswd=True) as server:
        repository = Repository(server.host, "private/x", plain_http=True)
        client = RegistryClient(Credentials({f"{server.host}/private": (USER, PASSWORD)}))
        assert push(client, repository, DATA)
        assert client.read_range(repository, DIGEST, 10, 10) == DATA[10:20]
        client.close()
        stranger = RegistryClient(deadline_s=5)
        with pytest.raises(RegistryError, match="user and password") as caught:
            stranger.read_range(repository, DIGEST, 10, 10)
        assert caught.value.status == 401
        stranger.close()


def test_remote_blob_through_the_cache(client: RegistryClient, pushed: Repository, tmp_path: Path) -> None:
    def remote() -> RemoteBlob:
        return RemoteBlob(client, pushed, DIGEST, len(DATA), deadline_s=5)

    with remote() as bare:
        assert bare.read_at(len(DATA) - 3, 3) == DATA[-3:]
        assert bare.read_at(7, 0) == b""
        with pytest.raises(OutOfRangeError):
            bare.read_at(len(DATA), 1)
    with BlockCache(tmp_path).open(remote(), DIGEST) as blob:
        pieces = [blob.read_at(start, min(9000, len(DATA) - start)) for start in range(0, len(DATA), 9000)]
        assert b"".join(pieces) == DATA
    # What was fetched ahead is handed over before it is stored.
    deadline = time.monotonic() + 30
    while [entry.cached_bytes for entry in entries(CacheSpace(tmp_path))] != [len(DATA)]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    unreachable = Repository("127.0.0.1:1", "nobody", plain_http=True)
    with BlockCache(tmp_path).open(RemoteBlob(client, unreachable, DIGEST, len(DATA)), DIGEST) as blob:
        assert blob.read_at(0, len(DATA)) == DATA


def test_scheme_by_host() -> None:
    client = RegistryClient(plain_http_hosts={"intern.example", "other.example:5000"})
    plain = {
        "localhost:5000/x": True,
        "127.9.9.9/x": True,
        "intern.example/x": True,
        "intern.example:80/x": True,
        "other.example:5000/x": True,
        "other.example/x": False,
        "redis": False,
    }
    assert {text: client.repository(Reference.parse(text)).plain_http for text in plain} == plain


# -- TLS -------------------------------------------------------------------------------------------------------------


class _OneBlob(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        body = DATA[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(DATA)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class _QuietServer(HTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A server with a certificate for localhost that nobody trusts: (port, certificate)."""
    capabilities.require_tools("openssl")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = _QuietServer(("127.0.0.1", 0), _OneBlob)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_address[1], certificate
    server.shutdown()
    thread.join()
    server.server_close()


def test_tls_with_a_trusted_certificate(tls_server: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    port, certificate = tls_server
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    client = RegistryClient(deadline_s=5)
    assert client.read_range(Repository(f"localhost:{port}", "x"), DIGEST, 1000, 50_000) == DATA[1000:51_000]
    client.close()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_tls_refuses_who_cannot_prove_it(
    tls_server: tuple[int, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    port, certificate = tls_server
    if name != "localhost":  # trusted, but for another name
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    client = RegistryClient(deadline_s=5)
    with pytest.raises(RegistryError, match="certificate") as caught:
        client.read_range(Repository(f"{name}:{port}", "x"), DIGEST, 0, 10)
    assert not caught.value.temporary
    client.close()
