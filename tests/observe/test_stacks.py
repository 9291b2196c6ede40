"""Stacks at a signal: complete, where the log goes, and harmless while threads are busy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from obdlab.observe import stacks
from tests.server.killing import until

# Threads that call deeply, compile code that goes away, and threads that come and go; dumps at every signal.
BUSY = """
import json, logging, sys, threading, zlib
from pathlib import Path
from obdlab.observe import logs, stacks
logs.set_up(logs.LogOptions(format="json", file=Path(sys.argv[1]), size=1 << 20, count=2), logging.ERROR)
stacks.dump_on_signal()
ended = threading.Event()
def deep(n):
    return deep(n - 1) + 1 if n else zlib.crc32(bytes(1 << 20)) & 0
def work():
    while not ended.is_set():
        deep(100)
        exec(compile("def g(n): return [x for x in (g(n - 1) if n else range(30))]\\ng(20)", "<made>", "exec"), {})
        json.loads(json.dumps({str(n): [n] * 3 for n in range(200)}))
def spawn():
    while not ended.is_set():
        one = threading.Thread(target=deep, args=(50,))
        one.start()
        one.join()
threads = [threading.Thread(target=work, name=f"worker-{n}") for n in range(4)]
threads += [threading.Thread(target=spawn) for _ in range(2)]
for thread in threads:
    thread.start()
print("ready", flush=True)
sys.stdin.read()
ended.set()
for thread in threads:
    thread.join()
"""


def test_a_busy_process_survives_hundreds_of_dumps(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", BUSY, str(log)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 120
        for _ in range(300):
            assert process.poll() is None
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGUSR2)
            time.sleep(0.002)
        until(lambda: log.stat().st_size > 0 or (tmp_path / "log.1").exists())
        process.stdin.close()
        assert process.wait(60) == 0
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert entries[0]["message"] == stacks.TITLE
    assert {f"thread worker-{number} " in entries[0]["stack"] for number in range(4)} == {True}


def test_stacks_name_threads_and_places() -> None:
    here, go_on = threading.Event(), threading.Event()

    def waiting_somewhere() -> None:
        here.set()
        go_on.wait(60)

    thread = threading.Thread(target=waiting_somewhere, name="waits")
    thread.start()
    assert here.wait(60)
    text = stacks.stacks()
    go_on.set()
    thread.join(60)
    own = text.partition("thread waits (")[2]
    assert f"{Path(__file__).name}:" in own
    assert "waiting_somewhere" in own


def test_every_daemon_that_needs_no_rights_dumps_and_goes_on(tmp_path: Path) -> None:
    layer = Path(__file__).parents[1] / "golden" / "ext4" / "layer1.obd"
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    for name, *arguments in (
        ("serve", "exporter", "--listen", "127.0.0.1:0"),
        ("serve", "snapshot-api", "--address", "http://127.0.0.1:0"),
        ("serve", "nbd", "--socket", str(tmp_path / "nbd.sock"), str(layer)),
    ):
        log = tmp_path / f"{name}.log"
        with (
            log.open("wb") as stderr,
            subprocess.Popen(
                [sys.executable, "-m", "obdlab", name, *arguments, *places], stdout=subprocess.PIPE, stderr=stderr
            ) as process,
        ):
            try:
                assert process.stdout is not None
                assert process.stdout.readline(), log.read_text()
                for count in (1, 2):
                    os.kill(process.pid, signal.SIGUSR2)
                    until(lambda log=log, count=count: log.read_text().count(stacks.TITLE) == count)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
            finally:
                process.kill()
        assert "thread MainThread" in log.read_text()
