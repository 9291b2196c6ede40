"""Database servers of the test's own, as users that are not root."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests import capabilities

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _program(name: str, *patterns: str) -> str:
    found = shutil.which(name)
    if found is None:
        found = next((str(path) for pattern in patterns for path in sorted(Path("/").glob(pattern))), None)
    capabilities.require("root")
    if found is None:
        capabilities.missing("tools", f"not installed: {name}")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _as(user: str) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]


@contextmanager
def _running(user: str, command: list[str], log: Path, ready: Callable[[], bool]) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen([*_as(user), *command], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def _directory_of(user: str) -> Iterator[Path]:
    # pytest's own directories are root's alone.
    with tempfile.TemporaryDirectory(prefix="obdlab-test-") as name:
        shutil.chown(name, user, user)
        yield Path(name)


@contextmanager
def postgresql() -> Iterator[str]:
    """Run a PostgreSQL; give its URL."""
    server = Path(_program("postgres", "usr/lib/postgresql/*/bin/postgres")).resolve()
    port = _free_port()
    with _directory_of("postgres") as root:
        data = root / "data"
        initdb = [*_as("postgres"), str(server.with_name("initdb")), "-D", str(data), "-U", "lab", "-A", "trust"]
        subprocess.run(initdb, check=True, timeout=180, stdout=subprocess.DEVNULL)
        command = [str(server), "-D", str(data), "-p", str(port), "-k", str(root), "-h", "127.0.0.1"]
        probe = [str(server.with_name("pg_isready")), "-q", "-h", "127.0.0.1", "-p", str(port), "-d", "postgres"]

        def ready() -> bool:
            return subprocess.run([*probe, "-U", "lab"], timeout=30, check=False).returncode == 0

        with _running("postgres", command, root / "log", ready):
            yield f"postgresql://lab@127.0.0.1:{port}/postgres"


@contextmanager
def mariadb() -> Iterator[str]:
    """Run a MariaDB, which speaks MySQL's protocol and SQL; give its URL."""
    server, install = _program("mariadbd", "usr/sbin/mariadbd"), _program("mariadb-install-db")
    client = _program("mariadb")
    port = _free_port()
    with _directory_of("mysql") as root:
        places = [f"--datadir={root / 'data'}", "--no-defaults"]
        made = [*_as("mysql"), install, places[1], places[0], "--auth-root-authentication-method=normal"]
        subprocess.run(made, check=True, timeout=180, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        local = [f"--socket={root / 'socket'}"]
        command = [server, places[1], places[0], *local, f"--port={port}", "--bind-address=127.0.0.1"]
        setup = (
            "CREATE DATABASE lab; CREATE USER lab@localhost IDENTIFIED BY 'pass'; GRANT ALL ON lab.* TO lab@localhost"
        )
        say = [client, "--no-defaults", *local, "-u", "root", "-e", setup]

        def ready() -> bool:
            made = subprocess.run(say, capture_output=True, timeout=30, check=False)
            return made.returncode == 0

        with _running("mysql", command, root / "log", ready):
            yield f"mysql://lab:pass@127.0.0.1:{port}/lab"
