"""Credentials and signed URLs: each goes to the host that it is for, and none into a log or an error."""

from __future__ import annotations

import base64
import gc
import io
import itertools
import logging
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from obdlab.formats.oci import OCI_MANIFEST, digest_of
from obdlab.registry import dial
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials, CredentialsService
from obdlab.registry.errors import RegistryError
from obdlab.registry.failures import from_exception
from obdlab.registry.mirrors import Mirror, Mirrors
from obdlab.registry.p2p import P2PProxy
from obdlab.registry.redirects import origin, redirected
from obdlab.registry.reference import Reference, Repository
from obdlab.registry.transport import Transport
from tests.cache.origin import wait_until
from tests.registry.proxy import running_proxy

DATA = bytes(range(256)) * 40
DIGEST = digest_of(DATA)
MANIFEST = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}'
USER, PASSWORD, TOKEN = "user", "pass-of-the-registry", "token-of-the-registry"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
SIGNATURE = "X-Amz-Signature=a1b2c3d4e5f6"

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Asked:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


@dataclass
class Host:
    """A server that answers as ``answer`` says, and remembers what it was asked."""

    answer: Callable[[Asked], Answer]
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    name: str = "127.0.0.1"

    @property
    def host(self) -> str:
        return f"{self.name}:{self.port}"

    @property
    def repository(self) -> Repository:
        return Repository(self.host, "some/image", plain_http=True)


@contextmanager
def running(answer: Callable[[Asked], Answer], name: str = "127.0.0.1") -> Iterator[Host]:
    host = Host(answer, name=name)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {key.lower(): value for key, value in self.headers.items()}
            host.asked.append(Asked(self.command, self.path, headers, body))
            status, headers, body = host.answer(host.asked[-1])
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 - looked for by name

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    host.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def content(asked: Asked) -> Answer:
    """Blobs and manifests."""
    if "/manifests/" in asked.path:
        return 200, {"Content-Type": OCI_MANIFEST}, MANIFEST
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers.get("range", ""))
    if match is None:
        return 200, {}, DATA
    first, last = int(match[1]), int(match[2])
    return 206, {"Content-Range": f"bytes {first}-{last}/{len(DATA)}"}, DATA[first : last + 1]


def storage(asked: Asked) -> Answer:
    """What stands behind a registry: takes uploads, gives content, and asks nobody who he is."""
    if asked.method == "POST":
        return 202, {"Location": asked.path + "x"}, b""
    if asked.method == "PATCH":
        return 202, {"Location": asked.path, "Range": f"0-{len(asked.body) - 1}"}, b""
    if asked.method == "PUT":
        return 201, {}, b""
    if asked.method == "DELETE":
        return 204, {}, b""
    return content(asked)


def guarded(answer: Callable[[Asked], Answer], kind: str) -> Callable[[Asked], Answer]:
    """A registry that wants a password or token before it answers."""

    def answer_friends(asked: Asked) -> Answer:
        host = asked.headers["host"]
        if asked.path.startswith("/token"):
            return (200, {}, b'{"token": "%s"}' % TOKEN.encode()) if asked.authorization == BASIC else (401, {}, b"")
        wanted = BASIC if kind == "basic" else f"Bearer {TOKEN}"
        if asked.authorization == wanted:
            return answer(asked)
        challenge = 'Basic realm="x"' if kind == "basic" else f'Bearer realm="http://{host}/token"'
        return 401, {"WWW-Authenticate": challenge}, b""

    return answer_friends


def client_of(registry: Host, **options: object) -> RegistryClient:
    credentials = Credentials({registry.host: (USER, PASSWORD)})
    return RegistryClient(credentials, request_timeout_s=10, deadline_s=20, hedge_share=0, **options)  # type: ignore[arg-type]


def read_all(client: RegistryClient, repository: Repository) -> None:
    assert client.read_range(repository, DIGEST, 10, 100) == DATA[10:110]
    assert client.read_range(repository, DIGEST, 0, 5) == DATA[:5]  # by the remembered place
    assert client.blob_size(repository, DIGEST) == len(DATA)
    assert client.read_blob(repository, DIGEST, len(DATA), len(DATA)) == DATA
    with client.open_range(repository, DIGEST, 7, 9) as stream:
        assert stream.read(9) == DATA[7:16]
    reference = Reference(repository.host, repository.name, None, digest_of(MANIFEST))
    assert client.get_manifest(reference).data == MANIFEST


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_storage_gets_no_credentials_of_pulls(kind: str, status: int) -> None:
    with running(storage) as elsewhere:

        def redirecting(asked: Asked) -> Answer:
            return status, {"Location": f"http://{elsewhere.host}{asked.path}?{SIGNATURE}"}, b""

        with running(guarded(redirecting, kind)) as registry, closing(client_of(registry)) as client:
            read_all(client, registry.repository)
            assert any(asked.authorization for asked in registry.asked)
        assert elsewhere.asked
        assert not [asked for asked in elsewhere.asked if asked.authorization]


# In both orders of their names: another host is one that differs, not one that comes later.
@pytest.mark.parametrize(("name", "other"), [("127.0.0.1", "localhost"), ("localhost", "127.0.0.1")])
@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_storage_gets_no_credentials_of_uploads(kind: str, name: str, other: str) -> None:
    patches = itertools.count()

    def storage_that_breaks(asked: Asked) -> Answer:
        if asked.method == "PATCH" and next(patches) == 0:
            return 503, {}, b""
        if asked.method == "GET":
            return 204, {"Range": "0-0"}, b""  # how far the upload is
        return storage(asked)

    with running(storage_that_breaks, other) as elsewhere:

        def registry_answer(asked: Asked) -> Answer:
            if asked.method == "POST":
                return 202, {"Location": f"http://{elsewhere.host}/upload?{SIGNATURE}"}, b""
            return 404, {}, b""

        with running(guarded(registry_answer, kind), name) as registry, closing(client_of(registry)) as client:
            assert client.push_blob(registry.repository, DIGEST, len(DATA), lambda: io.BytesIO(DATA))
            with client.push_stream(registry.repository) as sink:
                sink.write(DATA)
            sink = client.push_stream(registry.repository)
            sink.write(DATA)
            wait_until(lambda: len([each for each in registry.asked if each.authorization]) >= 3)
            sink.abort()
            assert not client.mount_blob(registry.repository, DIGEST, "other")
            posts = [asked for asked in registry.asked if asked.method == "POST" and asked.authorization]
            assert len(posts) == 4
        assert {asked.method for asked in elsewhere.asked} == {"PUT", "PATCH", "GET", "DELETE"}
        assert not [asked for asked in elsewhere.asked if asked.authorization]


def test_another_port_is_another_host() -> None:
    with running(guarded(storage, "basic")) as elsewhere:

        def redirecting(asked: Asked) -> Answer:
            return 307, {"Location": f"http://{elsewhere.host}{asked.path}"}, b""

        with (
            running(guarded(redirecting, "basic")) as registry,
            closing(client_of(registry)) as client,
            pytest.raises(RegistryError, match="401"),
        ):
            client.read_range(registry.repository, DIGEST, 0, 5)
        assert not [asked for asked in elsewhere.asked if asked.authorization]


def test_a_mirror_gets_its_own_headers_and_storage_behind_it_none() -> None:
    secret = {"X-Secret": "of-the-mirror", "Authorization": "Basic b2YtdGhlLW1pcnJvcg=="}

    with running(storage) as elsewhere:

        def redirecting(asked: Asked) -> Answer:
            assert asked.headers.get("x-secret") == "of-the-mirror"
            return 307, {"Location": f"http://{elsewhere.host}{asked.path}"}, b""

        with running(redirecting) as mirror, running(guarded(content, "basic")) as registry:
            mirrors = Mirrors({registry.host: (Mirror.parse(f"http://{mirror.host}", headers=secret),)})
            with closing(client_of(registry, mirrors=mirrors)) as client:
                read_all(client, registry.repository)
            assert mirror.asked
            assert not [asked for asked in mirror.asked if asked.authorization not in (None, secret["Authorization"])]
            assert not registry.asked
        assert elsewhere.asked
        assert not [asked for asked in elsewhere.asked if asked.authorization or "x-secret" in asked.headers]


def test_a_proxy_hands_nothing_of_a_mirror_to_its_storage() -> None:
    with running(storage) as elsewhere, running_proxy() as proxy:

        def redirecting(asked: Asked) -> Answer:
            return 307, {"Location": f"http://{elsewhere.host}{asked.path}"}, b""

        with running(redirecting) as mirror, running(content) as registry:
            mirrors = Mirrors({registry.host: (Mirror.parse(f"http://{mirror.host}", headers={"X-Secret": "x"}),)})
            with closing(client_of(registry, mirrors=mirrors, p2p=P2PProxy(proxy.address))) as client:
                assert client.read_range(registry.repository, DIGEST, 10, 100) == DATA[10:110]
            assert not registry.asked
        assert elsewhere.asked
        assert not [asked for asked in elsewhere.asked if asked.authorization or "x-secret" in asked.headers]


# -- where redirects lead --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/shadow",
        "ftp://elsewhere.example/x",
        "gopher://elsewhere.example/x",
        "http://elsewhere.example/x",
        "https://user:password@elsewhere.example/x",
        "https://elsewhere.example\\@registry.example/x",
        "https://elsewhere.example/a b",
        "https://elsewhere.example:0/",
        "https://elsewhere.example:99999/",
        "",
    ],
)
def test_redirects_that_lead_nowhere(location: str) -> None:
    with pytest.raises(RegistryError, match=r"without a usable Location|TLS to plain HTTP"):
        redirected("https://registry.example/v2/x/blobs/y", location, "reading blob")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0.0.0.0",
        "localhost",
        "x.localhost",
        "169.254.169.254",
        "[::1]",
        "[::]",
        "[::ffff:169.254.169.254]",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "100.100.100.200",
        "LOCALHOST",
    ],
)
def test_a_registry_elsewhere_does_not_send_us_to_this_machine(host: str) -> None:
    for scheme in ("http", "https"):
        with pytest.raises(RegistryError, match="address of this machine"):
            redirected(f"{scheme}://registry.example/v2/x/blobs/y", f"{scheme}://{host}:8080/x", "reading blob")
    assert redirected("http://127.0.0.1:5000/v2/", f"http://{host}/x", "x") == f"http://{host}/x"


def test_nor_does_its_token_server(monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = dial._lookup
    monkeypatch.setattr(
        dial, "_lookup", lambda host, *rest: lookup(host.replace("registry.example", "127.0.0.1"), *rest)
    )
    realms = [
        "http://169.254.169.254/latest",
        "http://127.0.0.1:{port}/token",
        "http://registry.example\\\\@127.0.0.1/x",
    ]
    for realm in realms:
        with running(content) as registry:
            challenge = f'Bearer realm="{realm.replace("{port}", str(registry.port))}"'
            registry.answer = lambda _, challenge=challenge: (401, {"WWW-Authenticate": challenge}, b"")  # type: ignore[misc]
            host = f"registry.example:{registry.port}"
            client = RegistryClient(Credentials({host: (USER, PASSWORD)}), plain_http_hosts={host}, deadline_s=10)
            with closing(client), pytest.raises(RegistryError, match=r"address of this machine|malformed realm"):
                client.read_range(Repository(host, "x", plain_http=True), DIGEST, 0, 5)
            assert [asked.path for asked in registry.asked] == [f"/v2/x/blobs/{DIGEST}"]


def test_one_host_however_it_is_written() -> None:
    assert origin("https://Registry.example/v2/") == origin("https://registry.example:443/x")
    assert origin("http://registry.example:80/") == origin("http://registry.example")
    for other in ("http://registry.example", "https://registry.example:444", "https://x.registry.example"):
        assert origin("https://registry.example") != origin(other)


def test_the_environment_names_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(content) as registry, running(content) as proxy, closing(client_of(registry)) as client:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://{proxy.host}")
            monkeypatch.setenv(name.upper(), f"http://{proxy.host}")
        assert client.read_range(registry.repository, DIGEST, 0, 5) == DATA[:5]
        assert not proxy.asked


# -- what logs and errors show ---------------------------------------------------------------------------------------


def test_signed_urls_are_in_no_log_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    texts = []
    answers: list[Answer] = [
        (206, {"Content-Range": f"bytes 0-4/{len(DATA)}", "X-Bad\x01": "x"}, DATA[:5]),
        (403, {}, b'{"errors":[{"code":"X","message":"refused https://s.example/x?' + SIGNATURE.encode() + b'"}]}'),
        (206, {"Content-Range": "bytes 9-9/9"}, b"x"),
        (307, {"Location": f"/next\x7f?{SIGNATURE}"}, b""),
    ]
    for answer in answers:
        with running(lambda _, answer=answer: answer) as elsewhere:  # type: ignore[misc]
            for target in (f"http://{elsewhere.host}/x?{SIGNATURE}", f"http://127.0.0.1:1/x?{SIGNATURE}"):
                with running(lambda _, target=target: (307, {"Location": target}, b"")) as registry:  # type: ignore[misc]
                    client = RegistryClient(request_timeout_s=5, deadline_s=0.3, hedge_share=0)
                    with closing(client), suppress(RegistryError):
                        try:
                            client.read_range(registry.repository, DIGEST, 0, 5)
                        except RegistryError as error:
                            texts += [str(error), "".join(traceback.format_exception_only(error))]
                            raise
    assert caplog.records, "nothing was logged"
    assert len(texts) >= 2 * len(answers) - 2
    assert SIGNATURE.partition("=")[2] not in caplog.text + "".join(texts)


def test_passwords_and_tokens_are_in_no_log_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for kind in ("basic", "bearer"):
        with running(guarded(lambda _: (403, {}, b""), kind)) as registry, closing(client_of(registry)) as client:
            with pytest.raises(RegistryError) as caught:
                client.read_range(registry.repository, DIGEST, 0, 5)
            for secret in (PASSWORD, TOKEN, BASIC.partition(" ")[2]):
                assert secret not in caplog.text + str(caught.value)


def test_the_tokens_in_use_are_in_no_repr() -> None:
    for kind in ("basic", "bearer"):
        with running(guarded(content, kind)) as registry, closing(client_of(registry)) as client:
            assert client.read_range(registry.repository, DIGEST, 0, 5) == DATA[:5]
            kept = [each for each in gc.get_objects() if type(each).__module__ == "obdlab.registry.auth"]
            assert any(getattr(each, "header", None) for each in kept)
            for secret in (PASSWORD, TOKEN, BASIC.partition(" ")[2]):
                assert secret not in "".join(map(repr, kept))


def test_the_address_of_a_credentials_service_is_shown_without_its_key(caplog: pytest.LogCaptureFixture) -> None:
    with running(lambda _: (500, {}, b"")) as host:
        transport = Transport(silence_s=5, user_agent="tests")
        service = CredentialsService(f"http://{host.host}/?key=s3cr3t", transport, timeout_s=5)
        found = service.look_up(host.repository, "https://x/v2")
        transport.close()
    assert host.asked[0].path.startswith("/?key=s3cr3t")
    assert "s3cr3t" not in caplog.text + found.trouble + repr(service)


def test_errors_of_libraries_are_shown_without_what_they_quote() -> None:
    for text in (f"Failed to parse: https://s.example/x?{SIGNATURE}", f"control characters. '/x?{SIGNATURE}' (found"):
        shown = str(from_exception(ValueError(text), "reading"))
        assert "a1b2c3" not in shown
        assert "/x?…" in shown
