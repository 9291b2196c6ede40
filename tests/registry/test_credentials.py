"""Credentials that change while images are read, and the programs and services that hand them out."""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.image.registryaccess import credential_source, open_client
from obdlab.registry import credentials as module
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import CredentialsError, CredentialsFile, _helper_answer, _service_credentials
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Repository
from obdlab.settings.settings import Settings
from tests import capabilities
from tests.outage.tokens import token_server
from tests.registry.faulty import FaultyRegistry, faulty_registry
from tests.registry.https import Authority
from tests.registry.server import PASSWORD, USER, running_registry

DATA = bytes(range(256)) * 16
DEADLINE_S = 30.0
_BUSY_S = 120.0
SECRET = "hunter2-secret"


def auths(host: str, user: str, password: str) -> dict[str, object]:
    return {"auths": {host: {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}}}


def write(path: Path, document: object) -> None:
    # As careful programs do it: whole or not at all.
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(document))
    temporary.replace(path)


@contextmanager
def client_of(**settings: Any) -> Iterator[RegistryClient]:
    client = open_client(Settings(read_deadline_s=DEADLINE_S, **settings))
    try:
        yield client
    finally:
        client.close()


def read(client: RegistryClient, registry: FaultyRegistry, start: int = 0) -> bytes:
    (digest,) = registry.blobs
    return client.read_range(registry.repository(), digest, start, 10)


def refusal(client: RegistryClient, registry: FaultyRegistry) -> str:
    with pytest.raises(RegistryError) as caught:
        read(client, registry)
    assert caught.value.status == 401
    assert not caught.value.temporary
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_the_real_registry_with_a_password_that_comes_later(tmp_path: Path) -> None:
    capabilities.require("registry")
    path = tmp_path / "config.json"
    with running_registry(tmp_path / "registry", htpasswd=True) as server, client_of(credentials_path=path) as client:
        repository = Repository(server.host, "some/image", plain_http=True)
        digest = "sha256:" + "0" * 64
        with pytest.raises(RegistryError, match=r"none are configured; .*config\.json: cannot read credentials"):
            client.blob_size(repository, digest)
        write(path, auths(server.host, USER, "wrong"))
        with pytest.raises(RegistryError, match="refuses the credentials"):
            client.blob_size(repository, digest)
        write(path, auths(server.host, USER, PASSWORD))
        with pytest.raises(RegistryError, match="404"):
            client.blob_size(repository, digest)


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_password_that_changes_in_mid_stream(tmp_path: Path, auth: str) -> None:
    path = tmp_path / "config.json"
    with faulty_registry(auth=auth) as registry, client_of(credentials_path=path) as client:
        registry.add_blob(DATA)
        for number in range(5):
            registry.password = f"password {number}"
            registry.revoke_tokens()
            write(path, auths(registry.host, registry.user, registry.password))
            assert read(client, registry, number) == DATA[number : number + 10]


def test_a_file_that_is_gone_or_half_written_leaves_what_was_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    path = tmp_path / "config.json"
    write(path, auths("h", "u", SECRET))
    source, repository = CredentialsFile(path), Repository("h", "a/b")
    assert source.look_up(repository, "").pair == ("u", SECRET)
    path.write_text(path.read_text()[:-5])
    assert source.look_up(repository, "") == (("u", SECRET), f"{path}: not JSON")
    path.unlink()
    assert source.look_up(repository, "").pair == ("u", SECRET)
    write(path, auths("h", "u", "other"))
    assert source.look_up(repository, "") == (("u", "other"), "")
    assert "going on with what was known before" in caplog.text
    assert SECRET not in caplog.text + repr(source)


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    path = tmp_path / "config.json"
    write(path, auths("h", "u", "p"))
    source, repository = CredentialsFile(path), Repository("h", "a/b")
    before = source.look_up(repository, "").pair
    os.utime(path.parent)  # what is beside it may change
    state = path.stat()
    path.write_text(path.read_text().replace("auths", "AUTHS"))  # same size
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert source.look_up(repository, "").pair == before
    assert source.look_up(repository, "", refused=before).pair is None


def helper(directory: Path, name: str, script: str) -> None:
    program = directory / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_helper_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "_HELPER_TIMEOUT_S", 0.5)
    answer = json.dumps({"ServerURL": "x", "Username": "user", "Secret": "pass:word"})
    helper(tmp_path, "good", f"read host; echo $host >> {tmp_path}/asked; echo '{answer}'")
    helper(tmp_path, "none", "echo 'credentials not found in native keychain'; exit 1")
    helper(tmp_path, "broken", f"echo {SECRET}; echo {SECRET} >&2; exit 3")
    helper(tmp_path, "silent", "exec sleep 60")
    helper(tmp_path, "garbage", f"echo {SECRET}")
    helper(tmp_path, "token", """echo '{"Username": "<token>", "Secret": "x"}'""")
    path = tmp_path / "config.json"
    with faulty_registry(auth="basic") as registry, client_of(credentials_path=path) as client:
        registry.add_blob(DATA)
        for name, trouble in (
            ("broken", "docker-credential-broken: failed with status 3"),
            ("silent", "docker-credential-silent: no answer in time"),
            ("garbage", "docker-credential-garbage: not JSON"),
            ("token", "identity token, which is not supported"),
            ("absent", "docker-credential-absent: no such program"),
        ):
            write(path, {"credHelpers": {registry.host: name}, "credsStore": "good"})
            assert trouble in refusal(client, registry)
        write(path, {"credsStore": "none"})
        assert refusal(client, registry).endswith("none are configured at offset 0")
        write(path, {"credHelpers": {"other.example": "broken"}, "credsStore": "good"})
        assert read(client, registry) == DATA[:10]
        assert (tmp_path / "asked").read_text().split() == [registry.host]


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "x" * 100, 7])
def test_no_helper_is_run_by_a_strange_name(name: object) -> None:
    found = module.Credentials.parse(json.dumps({"credsStore": name, "credHelpers": {"h": name}}).encode())
    assert found.helpers == {}


@dataclass
class Service:
    """What hands out credentials, as overlaybd asks for them."""

    answer: Callable[[], bytes] = lambda: b""
    status: int = 200
    asked: list[str] = field(default_factory=list)
    agents: list[str] = field(default_factory=list)
    silent: threading.Event | None = None


@contextmanager
def credentials_service(
    service: Service, *, context: ssl.SSLContext | None = None, path: Path | None = None
) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            service.asked.append(self.path)
            service.agents.append(self.headers["User-Agent"])
            if service.silent is not None:
                service.silent.wait(60)
                return
            body = service.answer()
            self.send_response(service.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "client"

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            pass

    class UnixServer(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    server: socketserver.BaseServer
    if path is None:
        server = Server(("127.0.0.1", 0), Handler)
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    else:
        server = UnixServer(str(path), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield str(path) if path else f"127.0.0.1:{server.server_address[1]}"  # type: ignore[str-bytes-safe]
    finally:
        if service.silent is not None:
            service.silent.set()
        server.shutdown()
        thread.join()
        server.server_close()


def good_answer(registry: FaultyRegistry) -> bytes:
    data = auths(registry.host, registry.user, registry.password)
    return json.dumps({"traceId": "1", "success": True, "data": data}).encode()


@pytest.mark.parametrize("mode", ["http", "uds", "https"])
def test_services(tmp_path: Path, mode: str) -> None:
    context = None
    ours = Settings()
    if mode == "https":
        authority = Authority.make(tmp_path / "ca")
        cert, key = authority.sign("service")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(authority.certificate)
        client_cert, client_key = authority.sign("client")
        ours = Settings(
            credentials_client_cert=client_cert,
            credentials_client_key=client_key,
            credentials_server_ca=authority.certificate,
        )
    service = Service()
    socket_path = tmp_path / "auth.sock" if mode == "uds" else None
    with (
        faulty_registry(auth="basic") as registry,
        credentials_service(service, context=context, path=socket_path) as place,
    ):
        service.answer = lambda: good_answer(registry)
        digest = registry.add_blob(DATA)
        with client_of(
            credentials_mode=mode,
            credentials_address=place if mode == "uds" else f"{mode}://{place}/give?from=here",
            credentials_timeout_s=20.0,
            credentials_client_cert=ours.credentials_client_cert,
            credentials_client_key=ours.credentials_client_key,
            credentials_server_ca=ours.credentials_server_ca,
            user_agent="tests/1",
        ) as client:
            assert read(client, registry) == DATA[:10]
            # The URL as it is: services that exist split it at its slashes.
            asked = f"remote_url=http://{registry.host}/v2/some/image/blobs/{digest}"
            assert service.asked == [f"/auth?{asked}" if mode == "uds" else f"/give?from=here&{asked}"]
            assert service.agents == ["tests/1"]
            for _ in range(3):
                assert read(client, registry) == DATA[:10]
            registry.password = "changed"
            assert read(client, registry) == DATA[:10]
            assert len(service.asked) == 2


@pytest.mark.parametrize(
    ("status", "answer", "trouble"),
    [
        (500, SECRET.encode(), "answered 500"),
        (200, SECRET.encode(), "not JSON"),
        (200, b'{"success": false, "data": {}}', "the answer says no success"),
        (200, b'{"success": true, "data": null}', "not a JSON object"),
        (200, b"x" * (300 << 10), "answer longer than"),
        (0, b"", "no answer in time"),
        (-1, b"", "Connection refused"),
    ],
)
def test_a_service_that_fails(status: int, answer: bytes, trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    service = Service(lambda: answer, status, silent=None if status else threading.Event())
    with faulty_registry(auth="basic") as closed, faulty_registry() as open_to_all:
        closed.add_blob(DATA)
        open_to_all.add_blob(DATA)
        with credentials_service(service) as place:
            if status < 0:
                place = f"127.0.0.1:{free_port()}"
            with client_of(
                credentials_mode="http",
                credentials_address=f"http://{place}/",
                credentials_timeout_s=0.5 if status == 0 else 20.0,
            ) as client:
                assert read(client, open_to_all) == DATA[:10]
                message = refusal(client, closed)
                assert f"asking http://{place}/ for credentials" in message
                assert trouble in message
                assert trouble in caplog.text
                assert SECRET not in caplog.text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_one_challenge_and_one_token_for_many_layers(tmp_path: Path) -> None:
    capabilities.require("registry")
    capabilities.require_tools("openssl")
    with (
        token_server(tmp_path / "tokens") as tokens,
        running_registry(tmp_path / "registry", auth=tokens.registry_auth()) as server,
    ):
        write(tmp_path / "config.json", auths(server.host, "anybody", "x"))
        repository = Repository(server.host, "some/image", plain_http=True)
        with client_of(credentials_path=tmp_path / "config.json") as pusher:
            digest = _push(pusher, repository, tmp_path / "blob")
        # A challenge is logged otherwise than an answer.
        before, issued = server.log.read_text().count("error authorizing context"), tokens.issued
        with client_of(credentials_path=tmp_path / "config.json") as client, ThreadPoolExecutor(20) as threads:
            ranges = threads.map(lambda n: client.read_range(repository, digest, n, 10), range(20))
            assert list(ranges) == [DATA[n : n + 10] for n in range(20)]
        assert server.log.read_text().count("error authorizing context") - before == 1
        assert tokens.issued - issued == 1


def _push(client: RegistryClient, repository: Repository, path: Path) -> str:
    from obdlab.formats.oci import digest_of

    path.write_bytes(DATA)
    client.push_blob(repository, digest_of(DATA), len(DATA), lambda: path.open("rb"))
    return digest_of(DATA)


def test_tokens_are_renewed_in_good_time() -> None:
    with faulty_registry(auth="bearer", token_life_s=0.5) as registry:
        registry.add_blob(DATA)
        source = module.Credentials.parse(json.dumps(auths(registry.host, registry.user, registry.password)).encode())
        # A request that is asked twice, as on a busy host, could be sent without a token twice.
        client = RegistryClient(source, deadline_s=_BUSY_S, hedge_share=0.0)
        give_up = time.monotonic() + _BUSY_S
        while registry.tokens_issued < 4 and time.monotonic() < give_up:
            assert read(client, registry) == DATA[:10]
        client.close()
        assert registry.tokens_issued >= 4
        assert [request.authorization for request in registry.blob_requests()].count(None) == 1


@pytest.mark.parametrize("life_s", [0, 0.001, -5, "soon", True, None, 1e12])
def test_a_token_of_no_life_is_used_all_the_same(life_s: Any) -> None:
    with faulty_registry(auth="bearer", token_life_s=life_s) as registry:
        registry.add_blob(DATA)
        source = module.Credentials.parse(json.dumps(auths(registry.host, registry.user, registry.password)).encode())
        client = RegistryClient(source, deadline_s=DEADLINE_S)
        for _ in range(3):
            assert read(client, registry) == DATA[:10]
        client.close()
        assert registry.tokens_issued == 1


def test_no_settings_no_credentials() -> None:
    assert credential_source(Settings()) is None


@given(
    st.binary(max_size=200) | st.from_regex(r'\{"success": ?true, ?"data": ?\{"auths": ?\{.{0,40}', fullmatch=True)
)
def test_any_answer_is_read_or_refused(text: bytes | str) -> None:
    data = text.encode() if isinstance(text, str) else text
    try:
        _service_credentials(data, "asking").find("h", "x")
    except CredentialsError:
        pass
    _helper_answer(data, "helper")
