"""Debian's real docker-registry on a free loopback port, for the tests of every room.

``registry_server`` is a session fixture (an open registry shared by the whole run: use repository names of your own);
``running_registry`` is the context manager behind it, for tests that need a registry to themselves.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests import capabilities

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USER = "reader"
PASSWORD = "let me in"
# bcrypt of PASSWORD: the registry knows no other kind.
_HTPASSWD = "reader:$2b$05$abcdefghijklmnopqrstuu4h2R.N3/mVBA7Xh7aLzKSJDAsK61n52\n"

_STARTS = 5
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RegistryServer:
    """A running registry. ``host`` is what references begin with: ``f"{server.host}/name:tag"``."""

    host: str
    storage: Path
    log: Path
    pid: int

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def requests(self) -> list[dict[str, str]]:
        """The access log so far: one dict per answered request (method, uri, status, bytes written)."""
        entries = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if "http.response.status" in entry and str(entry.get("msg")).startswith("response completed"):
                entries.append(
                    {
                        "method": entry["http.request.method"],
                        "uri": entry["http.request.uri"],
                        "status": str(entry["http.response.status"]),
                        "written": str(entry.get("http.response.written", 0)),
                    }
                )
        return entries


@contextmanager
def running_registry(
    directory: Path,
    *,
    address: str = "127.0.0.1",
    port: int = 0,
    htpasswd: bool = False,
    auth: dict[str, object] | None = None,
    tls: tuple[Path, Path, Path] | None = None,
    enter: tuple[str, ...] = (),
) -> Iterator[RegistryServer]:
    """Run docker-registry with its storage and log under ``directory``, and stop it at the end.

    With ``htpasswd`` it asks for basic authentication (``USER``, ``PASSWORD``); ``auth`` is its section on that, if
    another is wanted. ``tls`` is its certificate, the key, and the CA that must have signed clients' certificates.
    ``port`` 0 is a free one. ``enter`` stands before the command.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for _ in range(_STARTS):  # a free port may be taken between finding and using it
        host = f"{address}:{port or _free_port(address)}"
        process, server = _start(directory, host, htpasswd, auth, enter, tls)
        if _listens(process, server) if tls else _answers(process, server):
            break
        _stop(process)
    else:
        raise RuntimeError(f"docker-registry does not start: {server.log.read_text()[-2000:]}")
    try:
        yield server
    finally:
        _stop(process)


@pytest.fixture(scope="session")
def registry_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """An open registry on loopback, started at first use and shared by the whole run."""
    capabilities.require("registry")
    with running_registry(tmp_path_factory.mktemp("registry")) as server:
        yield server


def _start(
    directory: Path,
    host: str,
    htpasswd: bool,
    auth: dict[str, object] | None,
    enter: tuple[str, ...] = (),
    tls: tuple[Path, Path, Path] | None = None,
) -> tuple[subprocess.Popen[bytes], RegistryServer]:
    storage, log = directory / "storage", directory / "registry.log"
    http: dict[str, object] = {"addr": host, "secret": "tests only"}
    if tls is not None:
        http["tls"] = {"certificate": str(tls[0]), "key": str(tls[1]), "clientcas": [str(tls[2])]}
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "info", "formatter": "json", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
        "http": http,
    }
    if htpasswd:
        (directory / "htpasswd").write_text(_HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(directory / "htpasswd")}}
    if auth is not None:
        config["auth"] = auth
    # The registry reads YAML, of which JSON is a subset.
    (directory / "config.yml").write_text(json.dumps(config))
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*enter, "docker-registry", "serve", str(directory / "config.yml")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "OTEL_TRACES_EXPORTER": "none"},
        )
    return process, RegistryServer(host, storage, log, process.pid)


def _answers(process: subprocess.Popen[bytes], server: RegistryServer) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{server.url}/v2/", timeout=60).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 401
        except OSError:
            time.sleep(0.02)
            continue
        # Somebody else's registry may have won the port.
        return process.poll() is None
    return False


def _listens(process: subprocess.Popen[bytes], server: RegistryServer) -> bool:
    address, _, port = server.host.rpartition(":")
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection((address, int(port)), timeout=60).close()
        except OSError:
            time.sleep(0.02)
            continue
        return process.poll() is None
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=60)


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
