"""Names and addresses that fail, or do not answer at all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from obdlab.call import Call
from obdlab.registry import dial
from obdlab.registry.client import RegistryClient
from obdlab.registry.dial import Dialer, _favour, _interleaved
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Repository
from tests.registry.faulty import faulty_registry

DATA = bytes(1000)
_REAL = socket.getaddrinfo


@contextmanager
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def black_hole() -> Iterator[tuple[str, int]]:
    """An address of loopback where nobody answers a SYN: the queue of its listener is full."""
    with ExitStack() as opened:
        server = opened.enter_context(socket.socket())
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.9.9.9", 0))
        server.listen(0)
        for _ in range(3):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield server.getsockname()


class Names:
    """A resolver of tests: what it says of a name, or does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []
        monkeypatch.setattr(socket, "getaddrinfo", self._resolve)

    def _resolve(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("flags") == socket.AI_NUMERICHOST or host not in self.answers:
            return _REAL(host, port, *args, **kwargs)
        self.asked.append(host)
        answer = self.answers[host]
        if callable(answer):
            answer = answer()
        if isinstance(answer, BaseException):
            raise answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in answer]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


def soon(seconds: float = 30.0) -> Call:
    return Call(time.monotonic() + seconds)


def test_the_second_address_is_tried_while_the_first_is_silent(names: Names) -> None:
    with black_hole() as hole, listener() as port:
        names.answers["twofold.example"] = [hole, ("127.0.0.1", port)]
        dialer = Dialer()
        for _ in range(2):
            with dialer.dial("twofold.example", port, soon()) as connection:
                assert connection.getpeername() == ("127.0.0.1", port)
                assert connection.gettimeout() is None
        # What worked is tried first from then on.
        assert dialer.resolve("twofold.example", port, soon())[0][1] == ("127.0.0.1", port)


def test_the_next_address_is_tried_at_once_when_one_refuses(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "ATTEMPT_DELAY_S", 1e6)
    with listener() as port:
        names.answers["twofold.example"] = [("127.0.0.2", port), ("127.0.0.1", port)]
        with Dialer().dial("twofold.example", port, soon()) as connection:
            assert connection.getpeername() == ("127.0.0.1", port)


def test_all_that_failed_is_told(names: Names) -> None:
    with listener() as port:
        pass
    names.answers["h.example"] = [("127.0.0.1", port), ("127.0.0.2", port)]
    with pytest.raises(
        ConnectionError, match=r"^127\.0\.0\.1: Connection refused; 127\.0\.0\.2: Connection refused$"
    ):
        Dialer().dial("h.example", port, soon())
    with black_hole() as hole, pytest.raises(TimeoutError, match=r"^no answer in time from 127\.9\.9\.9$"):
        Dialer().dial(hole[0], hole[1], soon(0.2))


def test_no_descriptor_is_left(names: Names) -> None:
    def open_files() -> int:
        import os

        return len(os.listdir("/proc/self/fd"))

    with black_hole() as hole, listener() as port:
        before = open_files()
        names.answers["twofold.example"] = [hole, ("127.0.0.2", port), ("127.0.0.1", port)]
        Dialer().dial("twofold.example", port, soon()).close()
        with pytest.raises(TimeoutError):
            Dialer().dial(hole[0], hole[1], soon(0.05))
        assert open_files() == before


def test_a_silent_resolver_keeps_nobody_beyond_the_deadline(names: Names) -> None:
    silent = threading.Event()
    names.answers["silent.example"] = lambda: [silent.wait(60)] and OSError("too late")
    dialer = Dialer()
    before = threading.active_count()
    for _ in range(5):
        with pytest.raises(TimeoutError, match=r"no answer from the resolver in time for silent\.example"):
            dialer.dial("silent.example", 80, soon(0.05))
    assert names.asked == ["silent.example"]  # one thread waits, not one for each caller
    assert threading.active_count() <= before + 1
    silent.set()


def test_what_was_resolved_serves_while_the_resolver_is_down(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "_PATIENCE_S", 0.05)
    silent = threading.Event()
    with listener() as port:
        dialer = Dialer()
        names.answers["h.example"] = [("127.0.0.1", port)]
        dialer.dial("h.example", port, soon()).close()
        for failure in (
            socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
            lambda: [silent.wait(60)] and OSError("too late"),
        ):
            names.answers["h.example"] = failure
            dialer.dial("h.example", port, soon()).close()
        silent.set()
        while dialer._queries:
            time.sleep(0.01)
        names.answers["h.example"] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with pytest.raises(socket.gaierror, match="Name or service not known"):
            dialer.dial("h.example", port, soon())


@pytest.mark.parametrize("host", ["x" * 70 + ".example", "a..b", "\ud800"])
def test_what_is_no_name(host: str) -> None:
    with pytest.raises(OSError, match=r"not a host name|not known|No address"):
        Dialer().dial(host, 80, soon())


def test_the_address_that_worked_is_first_if_the_name_still_has_it() -> None:
    addresses = [(socket.AF_INET, (f"10.0.0.{n}", 1)) for n in range(4)]
    for number, address in enumerate(addresses):
        others = addresses[:number] + addresses[number + 1 :]
        assert _favour(addresses, [address, *others]) == [address, *others]
        assert _favour(others, [address]) == others
    assert _favour(addresses, None) == addresses


def test_families_take_turns() -> None:
    four = [(socket.AF_INET, (f"10.0.0.{n}", 1)) for n in range(3)]
    six = [(socket.AF_INET6, (f"fd00::{n}", 1, 0, 0)) for n in range(2)]
    assert _interleaved([*six, *four]) == [six[0], four[0], six[1], four[1], four[2]]
    assert _interleaved([]) == []


def test_a_client_reads_through_all_that(names: Names) -> None:
    silent = threading.Event()
    with faulty_registry() as registry, black_hole() as hole:
        digest = registry.add_blob(DATA)
        repository = Repository(f"registry.example:{registry.port}", "some/image", plain_http=True)
        client = RegistryClient(request_timeout_s=20, deadline_s=30)
        names.answers["registry.example"] = [hole, ("127.0.0.1", registry.port)]
        assert client.read_range(repository, digest, 0, 10) == bytes(10)
        client.close()
        client = RegistryClient(deadline_s=0.3)
        names.answers["registry.example"] = lambda: [silent.wait(60)] and OSError("too late")
        with pytest.raises(RegistryError, match="no answer") as caught:
            client.read_range(repository, digest, 0, 10)
        assert caught.value.temporary
        names.answers["registry.example"] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        silent.set()
        client.close()
        client = RegistryClient(deadline_s=20)
        with pytest.raises(RegistryError, match=r"cannot resolve registry\.example .*Name or service not known"):
            client.blob_size(repository, digest)
        client.close()
