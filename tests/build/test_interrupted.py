"""Builds that end early: by signals, by a kill, by a registry or disk that fails. Nothing of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.server.killing import until

if TYPE_CHECKING:
    from tests.build.building import Bench

pytestmark = [pytest.mark.kernel, pytest.mark.registry, pytest.mark.tools("runc")]

#: In the command lines of the containers' processes, and of no others.
_MARK = "4242.4242"


def started(bench: Bench, name: str) -> subprocess.Popen[str]:
    """Start a build, and wait until its second step runs in a container."""
    base = bench.base(name)
    bench.context(f"FROM {base}\nRUN head -c 1000000 /dev/urandom >/first\nRUN trap '' TERM INT; sleep {_MARK}\n")
    build = subprocess.Popen(
        bench.command(*bench.build_words(f"{bench.host}/{name}-new:1")),
        env=bench.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until(lambda: build.poll() is not None or sleepers(), timeout_s=60)
        assert build.poll() is None, build.communicate()
    except BaseException:
        build.kill()
        build.communicate()
        raise
    return build


def sleepers() -> list[int]:
    """Return the containers' processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if _MARK.encode() in words and b"runc" not in words[0]:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(bench: Bench, number: signal.Signals) -> None:
    build = started(bench, "interrupted/signal")
    if number == signal.SIGHUP:  # at which Python's own helper for semaphores would complain
        os.kill(build.pid, number)
    else:
        os.killpg(build.pid, number)  # as a terminal sends it, to all of its programs
    _, errors = build.communicate(timeout=60)
    assert build.returncode != 0
    assert "Traceback" not in errors
    assert sleepers() == []
    assert bench.leftovers() == []  # and again at the end of the test, with the cleanup's report
    assert "device build" not in bench.obdlab("cleanup").stdout


def test_a_killed_build_leaves_no_container_and_cleanup_takes_the_rest(bench: Bench) -> None:
    build = started(bench, "interrupted/kill")
    assert "a build goes on" in bench.obdlab("cleanup").stdout
    build.kill()
    build.communicate()
    until(lambda: not sleepers(), timeout_s=30)
    # Its mounts were in a namespace of its own, which ends with it: the device gets free.
    end = time.monotonic() + 30
    while (done := bench.obdlab("cleanup")).returncode and time.monotonic() < end:
        time.sleep(0.5)
    assert (done.returncode, "removed device build-" in done.stdout) == (0, True), done.stdout
    # Large files of it go when the next build begins.
    bench.context("FROM scratch\nCOPY Dockerfile /\n")
    bench.build(f"{bench.host}/interrupted/next:1")
    assert bench.leftovers() == []


def test_cleanup_by_force_ends_a_build(bench: Bench) -> None:
    build = started(bench, "interrupted/force")
    done = bench.obdlab("cleanup", "--force")
    _, errors = build.communicate(timeout=60)
    assert "Traceback" not in errors
    assert "removed build build-" in done.stdout
    assert (sleepers(), bench.leftovers()) == ([], [])


def test_a_registry_that_lacks_a_blob(bench: Bench, tmp_path: Path) -> None:
    from tests.registry.server import running_registry

    with running_registry(tmp_path / "registry") as registry:
        own = type(bench)(bench.place, registry.host)
        base = own.base("lacking/base", {"large": os.urandom(3 << 20)})
        for blob in (registry.storage / "docker/registry/v2/blobs/sha256").glob("*/*/data"):
            if blob.stat().st_size > 1 << 20:
                blob.write_bytes(b"")
        own.context(f"FROM {base}\nRUN cat /large >/copy")
        error = own.refused(f"{registry.host}/lacking/new:1")
    assert "Dockerfile:" in error
    assert bench.leftovers() == []
