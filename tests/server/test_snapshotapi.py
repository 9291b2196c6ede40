"""The HTTP interface for live snapshots, spoken to over a socket: who may ask, for what, and in which form."""

from __future__ import annotations

import errno
import http.client
import json
import logging
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from obdlab.errors import DeviceError, SourceError
from obdlab.image.config import ImageConfig, UpperConfig
from obdlab.server import snapshotapi, wire
from obdlab.server.snapshotaccess import check_paths, read_token
from obdlab.server.snapshotapi import SnapshotApi, UnknownDeviceError

TOKEN = "t" * 32
JSON = {"Content-Type": "application/json"}
MAY = JSON | {"Authorization": f"Bearer {TOKEN}"}


class Served:
    """A server whose devices are "disk" and, failing, "broken"."""

    def __init__(self, address: str | Path = "http://127.0.0.1:0", *, open_to_all: bool = False) -> None:
        self.taken: list[tuple[str, str]] = []
        token = TOKEN if isinstance(address, str) else ""
        self.server = SnapshotApi(address, self._take, token=token, open_to_all=open_to_all)
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._thread.start()

    def _take(self, dev_id: str, config: str) -> None:
        if dev_id == "broken":
            raise SourceError("no room: got 'root:x:0:0'")
        if dev_id != "disk":
            raise UnknownDeviceError(dev_id)
        self.taken.append((dev_id, config))

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join(60)
        self.server.server_close()


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


@pytest.fixture
def original() -> Iterator[Served]:
    """One that behaves as the original's."""
    made = Served(open_to_all=True)
    yield made
    made.close()


def ask(connection: http.client.HTTPConnection, verb: str, path: str, **more: object) -> tuple[int, object]:
    connection.request(verb, path, **more)  # type: ignore[arg-type]
    answer = connection.getresponse()
    body = answer.read()
    assert answer.getheader("Content-Length") is not None
    return answer.status, json.loads(body) if body else None


def test_the_originals_codes_and_messages_on_one_connection(original: Served) -> None:
    served = original
    path = "/a config/with&odd=signs.json"
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    missing = (400, {"success": False, "message": "Missing dev_id or config in snapshot request"})
    try:
        assert ask(connection, "GET", "/snapshot") == missing
        assert ask(connection, "POST", f"/snapshot?dev_id=disk&config={quote(path)}") == (
            200,
            {"success": True, "message": "Snapshot created successfully"},
        )
        assert served.taken == [("disk", path)]
        # Nothing is remembered from the request before.
        assert ask(connection, "GET", "/snapshot?dev_id=disk") == missing
        assert ask(connection, "PUT", "/snapshot?config=x") == missing
        assert ask(connection, "DELETE", "/snapshot?dev_id=none&config=x") == (
            404,
            {"success": False, "message": "Image file not found"},
        )
        assert ask(connection, "PATCH", "/snapshot?dev_id=broken&config=x", body=b"ignored") == (
            500,
            {"success": False, "message": "Failed to create snapshot"},
        )
        assert ask(connection, "GET", "/other?dev_id=disk&config=x")[0] == 404
        assert ask(connection, "HEAD", "/snapshot?dev_id=disk&config=x") == (200, None)
        assert ask(connection, "POST", "/snapshot?dev_id=disk&config=y", body=b"b" * 1000)[0] == 200
    finally:
        connection.close()
    assert served.taken[1:] == [("disk", "x"), ("disk", "y")]


def test_a_clients_verb_cannot_control_the_terminal_that_shows_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "obdlab.server.snapshotapi")
    for verb in (b"\x1b[2J\x1b]0;t\x07\x9b1m", b"V" * 5000):
        with socket.create_connection(("127.0.0.1", served.port), 60) as connection:
            connection.sendall(verb + b" /snapshot HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while connection.recv(4096):
                pass
    logged = [record.getMessage() for record in caplog.records]
    assert [text.partition(": ")[2].partition(" ")[0] for text in logged] == [
        r"\x1b[2J\x1b]0;t\x07\x9b1m",
        "V" * 20,
    ]


def test_a_snapshot_is_asked_for_by_json_or_query(served: Served) -> None:
    done = (200, {"success": True, "message": "Snapshot created successfully"})
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    try:
        body = json.dumps({"dev_id": "disk", "config": "/a b"})
        assert ask(connection, "POST", "/snapshot", body=body, headers=MAY) == done
        assert ask(connection, "POST", "/snapshot?dev_id=disk&config=/c", headers=MAY) == done
        for text in ("[1]", "7", '{"dev_id": 5}', "{", "[" * 5000, '{"dev_id": "disk"}'):
            assert ask(connection, "POST", "/snapshot", body=text, headers=MAY)[0] == 400
        body = json.dumps({"dev_id": "broken", "config": "/etc/passwd"})
        assert ask(connection, "POST", "/snapshot", body=body, headers=MAY) == (
            500,
            {"success": False, "message": "Failed to create snapshot"},
        )
    finally:
        connection.close()
    assert served.taken == [("disk", "/a b"), ("disk", "/c")]


@pytest.mark.parametrize(
    ("verb", "headers", "status"),
    [
        ("POST", JSON, 401),
        ("POST", JSON | {"Authorization": "Bearer " + "u" * 32}, 401),
        ("POST", JSON | {"Authorization": f"Bearer {TOKEN}x"}, 401),
        ("POST", JSON | {"Authorization": f"Bearer {TOKEN[:-1]}"}, 401),
        ("POST", JSON | {"Authorization": f"Basic {TOKEN}"}, 401),
        ("POST", JSON | {"Authorization": TOKEN}, 401),
        ("POST", JSON | {"Authorization": "Bearer \xe9"}, 401),
        ("POST", JSON | {"Authorization": "Bearer "}, 401),
        ("GET", MAY, 405),
        ("PUT", MAY, 405),
        ("HEAD", MAY, 405),
        ("POST", {"Authorization": MAY["Authorization"]}, 415),
        ("POST", MAY | {"Content-Type": "text/plain"}, 415),
        ("POST", MAY | {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", MAY | {"Origin": "http://127.0.0.1"}, 403),
        ("POST", MAY | {"Host": "evil.example"}, 421),
        ("POST", MAY | {"Host": "127.0.0.1:1"}, 421),
        ("POST", MAY | {"Host": "127.0.0.1:x"}, 421),
        ("POST", MAY | {"Host": ""}, 421),
    ],
)
def test_a_request_that_a_stranger_or_a_web_page_can_make_is_refused(
    served: Served, verb: str, headers: dict[str, str], status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    try:
        got, _ = ask(connection, verb, "/snapshot?dev_id=disk&config=/x", headers=headers)
        assert got == status
        # Also for what is not there: nothing is learnt without a token.
        if status in (401, 403, 421):
            assert ask(connection, verb, "/snapshot?dev_id=none&config=/x", headers=headers)[0] == status
            assert ask(connection, verb, "/other", headers=headers)[0] == status
        name = {"Host": f"localhost:{served.port}"}
        assert ask(connection, "POST", "/snapshot?dev_id=disk&config=/y", headers=MAY | name)[0] == 200
    finally:
        connection.close()
    assert served.taken == [("disk", "/y")]


def test_tcp_without_a_token_is_refused() -> None:
    with pytest.raises(DeviceError, match="a token is needed to listen on TCP"):
        SnapshotApi("http://127.0.0.1:0", lambda dev_id, config: None)


class UnixConnection(http.client.HTTPConnection):
    """To a socket's path."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


def test_a_unix_socket_is_for_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "api.sock"
    served = Served(path)
    try:
        assert served.server.url == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for headers, status in ((JSON, 200), ({}, 415), (JSON | {"Origin": "null"}, 403)):
            connection = UnixConnection(path)
            assert ask(connection, "POST", "/snapshot?dev_id=disk&config=/x", headers=headers)[0] == status
            connection.close()
        monkeypatch.setattr(wire, "peer_of", lambda _: wire.Peer(1, 65534, 65534))
        connection = UnixConnection(path)
        assert ask(connection, "POST", "/snapshot?dev_id=disk&config=/x", headers=JSON)[0] == 403
        connection.close()
    finally:
        served.close()
    assert served.taken == [("disk", "/x")]
    assert not path.exists()


@pytest.mark.root
def test_another_users_process_cannot_reach_it(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    served = Served(path)
    try:
        tmp_path.chmod(0o755)
        tmp_path.parent.chmod(0o755)
        tmp_path.parent.parent.chmod(0o755)
        pid = os.fork()
        if pid == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os._exit(socket.socket(socket.AF_UNIX).connect_ex(str(path)))
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == errno.EACCES
    finally:
        served.close()


def test_the_token_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = read_token(path)
    assert len(token) >= 32
    assert read_token(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["token"]
    path.chmod(0o640)
    with pytest.raises(DeviceError, match="not a file for its user alone"):
        read_token(path)
    path.chmod(0o600)
    for text in (b"", b"short", b"with a blank in it", b"x" * 5000, b"\xff" * 40):
        path.write_bytes(text)
        with pytest.raises(DeviceError, match="not a token"):
            read_token(path)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeviceError, match="cannot read the token"):
        read_token(path)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(DeviceError, match="not a file for its user alone"):
        read_token(path)


def test_paths_below_the_allowed_directories(tmp_path: Path) -> None:
    home, other = (tmp_path / name for name in ("home", "other"))
    for directory in (home, other):
        directory.mkdir()
        for name in ("data", "index"):
            (directory / name).touch()

    def config(path: Path, data: Path, index: Path) -> Path:
        ImageConfig(upper=UpperConfig(data=str(data), index=str(index))).save(path)
        return path

    present = config(home / "present.json", home / "data", home / "index")
    good = config(home / "new.json", home / "data", home / "index")
    assert check_paths(present, good, []) == good
    away = config(other / "new.json", other / "data", other / "index")
    with pytest.raises(DeviceError, match=r"new\.json: not below an allowed directory"):
        check_paths(present, away, [])
    assert check_paths(present, away, [other]) == away
    (home / "link.json").symlink_to(away)
    (home / "pipe").touch()
    (home / "pipe").unlink()
    os.mkfifo(home / "pipe")
    refused = [
        home / "link.json",
        home / ".." / "other" / "new.json",
        config(home / "theirs.json", other / "data", home / "index"),
        config(home / "index.json", home / "data", Path("/etc/passwd")),
        home / "none.json",
        home / "pipe",
        home,
        Path("home/new.json"),
        Path("/proc/kmsg"),
        Path("/dev/null"),
        Path("/a\0b"),
    ]
    for path in refused:
        with pytest.raises(DeviceError):
            check_paths(present, path, [])
    with pytest.raises(DeviceError, match="not below"):
        check_paths(present, tmp_path / "homeless", [])


def test_large_requests_are_refused(served: Served) -> None:
    for head in (
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"GET /snapshot HTTP/1.1\r\n" + b"X: 1\r\n" * 200 + b"\r\n",
        b"POST /snapshot HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /snapshot HTTP/1.1\r\nContent-Length: 70000\r\n\r\n",
        b"POST /snapshot HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /snapshot?dev_id=disk&config=x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
            connection.sendall(head)
            answer = b""
            try:
                while part := connection.recv(1 << 16):
                    answer += part
            except ConnectionResetError:  # it did not read all of it
                pass
            assert not answer or (answer.startswith(b"HTTP/1.1 4") and b'"success": false' in answer)
            assert b" 200 " not in answer[:20]
    assert served.taken == []


def test_a_slow_request_is_dropped(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshotapi, "REQUEST_TIMEOUT_S", 0.2)
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        try:
            for _ in range(100):  # a byte at a time, each of them in time
                connection.sendall(b"G")
                connection.settimeout(0.1)
                try:
                    assert connection.recv(100) == b""
                    break
                except TimeoutError:
                    continue
            else:
                raise AssertionError("never dropped")
        except (ConnectionResetError, BrokenPipeError):
            pass


def test_many_connections_are_turned_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.server._free = threading.Semaphore(2)
    held = [socket.create_connection(("127.0.0.1", served.port), timeout=60) for _ in range(2)]
    try:
        for connection in held:
            connection.sendall(b"GET /x HTTP/1.1\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 421"
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as more:
            assert more.recv(100) == b""
    finally:
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    "address",
    ["https://127.0.0.1:1", "http://127.0.0.1", "http://127.0.0.1:99999", "http://:1", "http://1.2.3.4:9/x"],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(DeviceError, match="cannot listen there"):
        SnapshotApi(address, lambda dev_id, config: None, token=TOKEN)


def test_a_name_and_a_taken_address(served: Served) -> None:
    other = Served("localhost:0")
    assert other.server.url.startswith("http://")
    other.close()
    with pytest.raises(DeviceError, match="cannot listen there"):
        SnapshotApi(f"http://127.0.0.1:{served.port}", lambda dev_id, config: None, token=TOKEN)
