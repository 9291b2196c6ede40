"""The original's HTTP interface for live snapshots, spoken to over a socket."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from obdlab.errors import DeviceError, SourceError
from obdlab.service import snapshotapi
from obdlab.service.snapshotapi import SnapshotApi, UnknownDeviceError


class Served:
    """A server whose devices are "disk" and, failing, "broken"."""

    def __init__(self, address: str = "http://127.0.0.1:0") -> None:
        self.taken: list[tuple[str, str]] = []
        self.server = SnapshotApi(address, self._take)
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._thread.start()

    def _take(self, dev_id: str, config: str) -> None:
        if dev_id == "broken":
            raise SourceError("no room")
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


def ask(connection: http.client.HTTPConnection, verb: str, path: str, **more: object) -> tuple[int, object]:
    connection.request(verb, path, **more)  # type: ignore[arg-type]
    answer = connection.getresponse()
    body = answer.read()
    assert answer.getheader("Content-Length") is not None
    return answer.status, json.loads(body) if body else None


def test_codes_and_messages_on_one_connection(served: Served) -> None:
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
            {"success": False, "message": "Failed to create snapshot", "reason": "no room"},
        )
        assert ask(connection, "GET", "/other?dev_id=disk&config=x")[0] == 404
        assert ask(connection, "HEAD", "/snapshot?dev_id=disk&config=x") == (200, None)
        assert ask(connection, "POST", "/snapshot?dev_id=disk&config=y", body=b"b" * 1000)[0] == 200
    finally:
        connection.close()
    assert served.taken[1:] == [("disk", "x"), ("disk", "y")]


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
            assert connection.recv(12) == b"HTTP/1.1 404"
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
        SnapshotApi(address, lambda dev_id, config: None)


def test_a_name_and_a_taken_address(served: Served) -> None:
    other = Served("localhost:0")
    assert other.server.url.startswith("http://")
    other.close()
    with pytest.raises(DeviceError, match="cannot listen there"):
        SnapshotApi(f"http://127.0.0.1:{served.port}", lambda dev_id, config: None)
