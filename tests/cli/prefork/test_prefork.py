"""A pull by a fork of a ready process is the command it would have been: words, files, signals and ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from obdlab.cli.common import DEFAULT_RUN_DIR
from obdlab.cli.prefork import asking
from obdlab.server.rundir import PULL_SOCKET_NAME
from obdlab.system.processes import children_of

OBDLAB = [sys.executable, "-m", "obdlab"]
WAIT_S = 60.0
#: Fails late in a pull's imports, without a containerd.
PULL = ("image", "pull", "127.0.0.1:1/x:1", "--address", "/nonexistent")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    run_dir = tmp_path_factory.mktemp("run", numbered=True)
    with subprocess.Popen(
        [sys.executable, "-m", "obdlab.cli.prefork.forkserver", str(run_dir)], stdin=subprocess.PIPE
    ) as process:
        try:
            wait_for((run_dir / asking.SOCKET).exists)
            yield run_dir, process.pid
            assert process.poll() is None
        finally:
            process.terminate()


@pytest.fixture
def run_dir(server: tuple[Path, int]) -> Path:
    return server[0]


def environment(run_dir: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "OBDLAB_RUN_DIR": str(run_dir), **more}


def run(run_dir: Path, *words: str, cwd: Path | None = None, **more: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*OBDLAB, *words],
        env=environment(run_dir, **more),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@contextmanager
def hanging(run_dir: Path, server_pid: int, containerd: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield a caller whose pull waits, and its fork."""
    words = [*OBDLAB, "image", "pull", "--address", containerd, "127.0.0.1:1/x:1"]
    wait_for(lambda: not children_of(server_pid))  # of tests before
    with subprocess.Popen(words, env=environment(run_dir), stderr=subprocess.PIPE, text=True) as caller:
        try:
            wait_for(lambda: len(children_of(server_pid)) == 1)
            (fork,) = children_of(server_pid)
            # Its second thread listens to the caller: the command has begun.
            wait_for(lambda: len(os.listdir(f"/proc/{fork}/task")) > 1)
            yield caller, fork
        finally:
            caller.kill()


@pytest.fixture
def silent_containerd(tmp_path: Path) -> Iterator[str]:
    # A call to it hangs: it takes connections and never answers.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "ctd.sock"))
        listener.listen()
        yield str(tmp_path / "ctd.sock")


@pytest.mark.parametrize(
    "words",
    [
        PULL,
        (*PULL, "--json"),
        ("rpull", *PULL[2:]),
        ("image", "pull"),
        ("image", "pull", "a b"),
        ("image", "pull", "--no-such-option", "x"),
        ("image", "pull", "--platform", "x", "y"),
    ],
)
def test_output_and_status_are_those_of_the_command(run_dir: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert run(run_dir, *words) == run(tmp_path, *words)
    assert run(run_dir, *words)[0] != 0


def test_a_fork_runs_it(server: tuple[Path, int], silent_containerd: str) -> None:
    run_dir, pid = server
    with hanging(run_dir, pid, silent_containerd) as (caller, fork):
        assert Path(f"/proc/{fork}/cmdline").read_bytes() == Path(f"/proc/{pid}/cmdline").read_bytes()
        assert os.readlink(f"/proc/{fork}/cwd") == os.getcwd()
        assert "grpc" not in Path(f"/proc/{caller.pid}/maps").read_text()
    wait_for(lambda: not children_of(pid))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_command(server: tuple[Path, int], silent_containerd: str, number: signal.Signals) -> None:
    run_dir, pid = server
    with hanging(run_dir, pid, silent_containerd) as (caller, _):
        caller.send_signal(number)
        _, text = caller.communicate(timeout=WAIT_S)
        assert (caller.returncode, "interrupted" in text) == (130, True), text
    wait_for(lambda: not children_of(pid))


def test_a_signal_while_the_fork_begins_is_handed_on(tmp_path: Path) -> None:
    with socket.create_server(str(tmp_path / asking.SOCKET), family=socket.AF_UNIX) as listener:
        listener.settimeout(WAIT_S)
        with (
            subprocess.Popen([*OBDLAB, *PULL], env=environment(tmp_path)) as caller,
            listener.accept()[0] as connection,
        ):
            connection.settimeout(WAIT_S)
            connection.send(asking.READY)
            assert len(connection.recv(asking.LENGTH.size)) == asking.LENGTH.size
            caller.send_signal(signal.SIGTERM)
            connection.send(asking.BEGUN)
            received = connection.recv(asking.MOST_REQUEST)
            while not received.endswith(bytes([signal.SIGTERM])):
                part = connection.recv(asking.MOST_REQUEST)
                assert part, "the caller ended"
                received += part
            connection.send(asking.STATUS.pack(130))
            assert caller.wait(WAIT_S) == 130


def test_a_killed_caller_takes_its_command_along(server: tuple[Path, int], silent_containerd: str) -> None:
    run_dir, pid = server
    with hanging(run_dir, pid, silent_containerd) as (caller, _):
        caller.kill()
        wait_for(lambda: not children_of(pid))


def test_a_killed_command_is_an_error(server: tuple[Path, int], silent_containerd: str) -> None:
    run_dir, pid = server
    with hanging(run_dir, pid, silent_containerd) as (caller, fork):
        os.kill(fork, signal.SIGKILL)
        _, text = caller.communicate(timeout=WAIT_S)
        assert (caller.returncode, text) == (
            1,
            "obdlab: the process that pulled was killed; the same command goes on\n",
        )


def test_directory_and_environment_are_the_callers(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    status, _, text = run(run_dir, *PULL, "--credentials", "bad.json", cwd=tmp_path)
    assert (status, "bad.json" in text) == (1, True)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"no_such_key": 1}))
    status, _, text = run(run_dir, *PULL, OBDLAB_SETTINGS=str(settings))
    assert (status, "no_such_key" in text) == (1, True)


def test_what_libraries_read_once_is_not_handed_over(server: tuple[Path, int], silent_containerd: str) -> None:
    run_dir, pid = server
    words = [*OBDLAB, "image", "pull", "--address", silent_containerd, "127.0.0.1:1/x:1"]
    with subprocess.Popen(words, env=environment(run_dir, GRPC_VERBOSITY="ERROR"), stderr=subprocess.PIPE) as caller:
        try:
            wait_for(lambda: "cygrpc" in Path(f"/proc/{caller.pid}/maps").read_text())
            assert children_of(pid) == []
        finally:
            caller.kill()


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00{}", b"\x09\x00\x00\x00{"])
def test_a_malformed_request_harms_nobody(server: tuple[Path, int], content: bytes) -> None:
    run_dir, pid = server
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(run_dir / asking.SOCKET))
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            assert connection.makefile("rb").read() in (asking.READY, asking.READY + asking.REFUSED)
    wait_for(lambda: not children_of(pid))
    assert run(run_dir, *PULL)[0] == 1


def test_a_dead_server_is_no_matter(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / asking.SOCKET))
    assert run(tmp_path, *PULL)[0] == 1  # nothing listens
    assert "containerd" in run(tmp_path / "missing", *PULL)[2]


def test_a_hanging_server_is_waited_for_a_moment(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / asking.SOCKET))
        listener.listen()
        assert "containerd" in run(tmp_path, *PULL)[2]


def test_the_server_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import subprocess as s,sys,time;p=s.Popen(sys.argv[1:],stdin=-1);print(p.pid,flush=True);time.sleep(600)"
    )
    words = [sys.executable, "-c", script, sys.executable, "-m", "obdlab.cli.prefork.forkserver", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_for((tmp_path / asking.SOCKET).exists)
        parent.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_the_server_of_a_parent_that_is_gone_already_ends(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "obdlab.cli.prefork.forkserver", str(tmp_path)]
    assert subprocess.run(words, stdin=subprocess.DEVNULL, timeout=WAIT_S, check=False).returncode == 0


def test_the_place_is_that_of_all_commands() -> None:
    assert Path(asking._DEFAULT_RUN_DIR, asking.SOCKET) == DEFAULT_RUN_DIR / PULL_SOCKET_NAME


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("image pull x", True),
        ("rpull x", True),
        ("image pull -h", False),
        ("image pull-blob x", False),
        ("-v image pull x", False),
        ("", False),
    ],
)
def test_pulls(words: str, expected: bool) -> None:
    assert asking.is_pull(words.split()) is expected
