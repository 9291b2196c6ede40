"""Troubles that are no answers: servers that die or hang, lost packets, certificates, tokens that run out."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from obdlab.image.config import ImageConfig
from tests.outage.lab import LAYERS, Lab, push
from tests.outage.proxy import outage_proxy
from tests.outage.tokens import make_key
from tests.registry import faulty
from tests.registry.server import RegistryServer, running_registry

_TOKEN_LIFE_S = 1.0


@dataclass
class Situation:
    """An image in a registry that gets into trouble. ``happened`` tells, once ``begin`` was called, that it did."""

    config: ImageConfig
    begin: Callable[[], None]
    end: Callable[[], None]
    happened: Callable[[], object]


Making = Callable[[Lab, Path, pytest.MonkeyPatch], AbstractContextManager[Situation]]


class OwnRegistry:
    """A registry without a proxy that can die, hang and come back on its port."""

    def __init__(self, directory: Path, opened: ExitStack) -> None:
        self._directory = directory
        self._opened = opened
        self.server = self._start(0)
        self.config = push(self.server.host, "outage/own", LAYERS)

    @property
    def port(self) -> int:
        return int(self.server.host.rpartition(":")[2])

    def kill(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.server.pid, os.WEXITED | os.WNOWAIT)

    def start(self) -> None:
        self.server = self._start(self.port)

    def _start(self, port: int) -> RegistryServer:
        return self._opened.enter_context(running_registry(self._directory, port=port))


@contextmanager
def expired_token(lab: Lab, _directory: Path, _patch: pytest.MonkeyPatch) -> Iterator[Situation]:
    """The registry refuses a token that was to be good for long."""
    lab.tokens.life_s = _TOKEN_LIFE_S
    issued = 0

    def begin() -> None:
        nonlocal issued
        time.sleep(_TOKEN_LIFE_S + 0.1)
        lab.tokens.life_s = 300.0
        issued = lab.tokens.issued

    yield Situation(lab.config, begin, lab.reset, lambda: lab.tokens.issued > issued)


@contextmanager
def _token_server_with(lab: Lab, fault: faulty.Fault) -> Iterator[Situation]:
    happened = []

    def counted(answer: faulty.Answer) -> None:
        happened.append(1)
        fault(answer)

    with expired_token(lab, Path(), pytest.MonkeyPatch()) as expired:

        def begin() -> None:
            expired.begin()
            lab.tokens.fault = counted

        yield Situation(lab.config, begin, lab.reset, lambda: happened)


def token_server_failing(lab: Lab, _directory: Path, _patch: pytest.MonkeyPatch) -> AbstractContextManager[Situation]:
    return _token_server_with(lab, faulty.status(503))


def token_server_silent(lab: Lab, _directory: Path, _patch: pytest.MonkeyPatch) -> AbstractContextManager[Situation]:
    return _token_server_with(lab, faulty.silence)


@contextmanager
def restarted(_lab: Lab, directory: Path, _patch: pytest.MonkeyPatch) -> Iterator[Situation]:
    with ExitStack() as opened:
        registry = OwnRegistry(directory / "own", opened)
        before = 0

        def begin() -> None:
            nonlocal before
            registry.kill()
            before = len(registry.server.requests())
            registry.start()

        yield Situation(registry.config, begin, lambda: None, lambda: len(registry.server.requests()) > before)


@contextmanager
def gone(_lab: Lab, directory: Path, _patch: pytest.MonkeyPatch) -> Iterator[Situation]:
    with ExitStack() as opened:
        registry = OwnRegistry(directory / "own", opened)
        yield Situation(
            registry.config,
            registry.kill,
            registry.start,
            lambda: not Path(f"/proc/{registry.server.pid}/exe").exists(),
        )


@contextmanager
def hanging(_lab: Lab, directory: Path, _patch: pytest.MonkeyPatch) -> Iterator[Situation]:
    with ExitStack() as opened:
        registry = OwnRegistry(directory / "own", opened)
        process = Path(f"/proc/{registry.server.pid}/stat")

        def resume() -> None:
            os.kill(registry.server.pid, signal.SIGCONT)

        opened.callback(resume)
        yield Situation(
            registry.config,
            lambda: os.kill(registry.server.pid, signal.SIGSTOP),
            resume,
            lambda: " T " in process.read_text(),
        )


@contextmanager
def packets_dropped(_lab: Lab, directory: Path, _patch: pytest.MonkeyPatch) -> Iterator[Situation]:
    """A listener whose queue is full: the kernel drops what wants to connect."""
    with ExitStack() as opened:
        registry = OwnRegistry(directory / "own", opened)
        plug = opened.enter_context(ExitStack())

        def begin() -> None:
            registry.kill()
            plug.enter_context(full_listener(registry.port))

        def end() -> None:
            plug.close()
            registry.start()

        yield Situation(registry.config, begin, end, lambda: not connects(registry.port))


@contextmanager
def full_listener(port: int) -> Iterator[None]:
    """Listen on a loopback port, with the queue full and nobody who accepts."""
    with ExitStack() as opened:
        listener = opened.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        for _ in range(3):  # until none comes about any more
            filler = opened.enter_context(socket.socket())
            filler.settimeout(0.2)
            try:
                filler.connect(("127.0.0.1", port))
            except TimeoutError:
                break
        yield


def connects(port: int) -> bool:
    """Whether a connection to a loopback port comes about."""
    with socket.socket() as probe:
        probe.settimeout(0.3)
        try:
            probe.connect(("127.0.0.1", port))
        except TimeoutError:
            return False
        return True


@contextmanager
def _tls(directory: Path, patch: pytest.MonkeyPatch, name: str, trusted: bool) -> Iterator[Situation]:
    good, bad = directory / "good", directory / "bad"
    make_key(good.with_suffix(".key"), good.with_suffix(".crt"), "/CN=good", "-addext", "subjectAltName=IP:127.0.0.1")
    make_key(bad.with_suffix(".key"), bad.with_suffix(".crt"), "/CN=bad", "-addext", f"subjectAltName={name}")
    bundle = directory / "bundle.pem"
    bundle.write_text(good.with_suffix(".crt").read_text() + (bad.with_suffix(".crt").read_text() if trusted else ""))
    patch.setenv("SSL_CERT_FILE", str(bundle))

    def context(files: Path) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(files.with_suffix(".crt"), files.with_suffix(".key"))
        return made

    with running_registry(directory / "own") as registry, outage_proxy(registry.host, tls=context(good)) as proxy:
        pushed = push(registry.host, "outage/tls", LAYERS)
        config = ImageConfig(f"https://{proxy.host}/v2/outage/tls/blobs", lowers=pushed.lowers)

        def present(certificate: ssl.SSLContext) -> None:
            proxy.tls = certificate
            proxy.cut()

        yield Situation(
            config, lambda: present(context(bad)), lambda: present(context(good)), lambda: proxy.handshakes_failed
        )


def wrong_name(_lab: Lab, directory: Path, patch: pytest.MonkeyPatch) -> AbstractContextManager[Situation]:
    return _tls(directory, patch, "DNS:elsewhere.test", trusted=True)


def unknown_authority(_lab: Lab, directory: Path, patch: pytest.MonkeyPatch) -> AbstractContextManager[Situation]:
    return _tls(directory, patch, "IP:127.0.0.1", trusted=False)


#: How each row of the table comes about.
MAKING: dict[str, Making] = {
    "a token that the registry takes no longer": expired_token,
    "503 from the token server when a new token is needed": token_server_failing,
    "no answer from the token server when a new token is needed": token_server_silent,
    "the registry is restarted": restarted,
    "the registry is gone: connections refused": gone,
    "the registry hangs: connections accepted, no answer": hanging,
    "packets are dropped: no connection comes about": packets_dropped,
    "TLS with a certificate for another name": wrong_name,
    "TLS with a certificate of an unknown authority": unknown_authority,
}
