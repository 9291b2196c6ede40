"""NBD servers against each other on the same file, interleaved: `obdlab serve nbd`, nbdkit's Python and file plugins.

The client is fio's nbd engine on a unix socket. The Python plugin reads the file by pread, as ours does, so that what
differs is the server around it; nbdkit's file plugin is the C server that a Python one cannot reach. Needs the Debian
packages nbdkit and nbdkit-plugin-python.

python -m tests.benchmarks.nbd [--seconds 2] [--rounds 5] [--layer]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from obdlab.blob import Blob
from obdlab.contrib.nbd.export import NbdExport
from obdlab.contrib.nbd.server import NbdServer
from obdlab.image.open import open_stack
from tests.benchmarks.device import JOBS, FileBlob
from tests.benchmarks.tcmu import SIZE, layer_file

MIB = 1 << 20
_START_S = 60.0

PLUGIN = """
import os, nbdkit
API_VERSION = 2
fd = -1
def config(key, value):
    global fd
    fd = os.open(value, os.O_RDONLY)
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def open(readonly): return 1
def get_size(h): return os.fstat(fd).st_size
def pread(h, buf, offset, flags): os.preadv(fd, [buf], offset)
"""


class Server(NamedTuple):
    """Where it listens, and its process."""

    sock: Path
    pid: int


@contextmanager
def ours(path: Path, sock: Path, *, layer: bool = False) -> Iterator[int]:
    """Our server, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        blob: Blob = open_stack([path]) if layer else FileBlob(path)
        NbdServer(NbdExport(blob, "", read_only=True), sock).start()
        time.sleep(3600)
        os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


@contextmanager
def nbdkit(sock: Path, *plugin: str | Path) -> Iterator[int]:
    """nbdkit with a plugin."""
    process = subprocess.Popen(["nbdkit", "--foreground", "--readonly", "--unix", str(sock), *map(str, plugin)])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def processor_s(pid: int) -> float:
    """What a process has taken so far, user and system."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def fio(server: Server, unit: str, options: list[str], seconds: float) -> tuple[float, float]:
    """One run; IOPS or MiB/s, and the server's processor time for a request in microseconds."""
    command = ["fio", "--name=job", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={server.sock}", f"--size={SIZE}"]
    command += ["--time_based", f"--runtime={seconds}", "--output-format=json", *options]
    before = processor_s(server.pid)
    done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    read = json.loads(done[done.index("{") :])["jobs"][0]["read"]
    rate = float(read["iops"] if unit == "IOPS" else read["bw_bytes"] / MIB)
    return rate, (processor_s(server.pid) - before) / read["total_ios"] * 1e6


def main() -> None:
    """Serve, measure, print medians and the ratio to the Python plugin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layer", action="store_true", help="also ours over a ZFile layer of LZ4 blocks of 4 KiB")
    args = parser.parse_args()
    if shutil.which("nbdkit") is None:
        print("nbdkit is not installed: apt-get install nbdkit nbdkit-plugin-python")
        return
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        servers = start(Path(name), running, with_layer=args.layer)
        print(f"{'':26}" + "".join(f"{each:>16}" for each in servers) + "   ours / python (median)")
        for job, (unit, options) in JOBS.items():
            rounds = [
                {each: fio(server, unit, options, args.seconds) for each, server in servers.items()}
                for _ in range(args.rounds)
            ]
            ratio = statistics.median(each["ours"][0] / each["python"][0] for each in rounds)
            cells = ""
            for one in servers:
                rate, cost = (statistics.median(each[one][at] for each in rounds) for at in (0, 1))
                cells += f"{rate:8.0f}{cost:5.0f} us"
            print(f"{job:26}{cells} {unit:5} {ratio:.2f}", flush=True)


def start(directory: Path, running: ExitStack, *, with_layer: bool) -> dict[str, Server]:
    """Start all servers on the same content."""
    layer, raw, plugin = layer_file(directory), directory / "raw", directory / "plugin.py"
    plugin.write_text(PLUGIN)
    made: dict[str, Callable[[Path], AbstractContextManager[int]]] = {
        "ours": lambda sock: ours(raw, sock),
        "python": lambda sock: nbdkit(sock, "python", plugin, f"file={raw}"),
        "file": lambda sock: nbdkit(sock, "file", raw),
    }
    if with_layer:
        made["layer"] = lambda sock: ours(layer, sock, layer=True)
    servers = {}
    for name, make in made.items():
        sock = directory / f"{name}.sock"
        servers[name] = Server(sock, running.enter_context(make(sock)))
        deadline = time.monotonic() + _START_S
        while not sock.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} does not listen")
            time.sleep(0.05)
    return servers


if __name__ == "__main__":
    main()
