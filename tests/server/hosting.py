"""A device host whose "images" are random bytes as a small JSON asks: ``python -m tests.server.hosting DIR``."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from obdlab.blob import Blob, MemoryBlob
from obdlab.call import Call
from obdlab.errors import SourceError
from obdlab.server import host as hosts
from obdlab.server.host import Host
from tests.devices.blobs import MemoryWritable, Troubled

MIB = 1 << 20


def content_of(what: dict[str, Any]) -> bytes:
    return random.Random(what.get("seed", 0)).randbytes(what.get("size", MIB))


class SlowToFlush(MemoryWritable):
    """Takes a second for the flush at the end, and keeps a file that says how far it is."""

    def __init__(self, size: int, flushed: Path) -> None:
        super().__init__(size)
        self._flushed = flushed

    def flush(self) -> None:
        if threading.current_thread() is threading.main_thread():  # others flush for the kernel
            self._flushed.write_text("begun")
            time.sleep(1.0)
            self._flushed.write_text("done")


class Hog(MemoryBlob):
    """Takes 64 times the memory that a server may have for every read beyond its first half."""

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        if offset >= self.size // 2:
            bytearray(64 << 30)
        return super().read_at(offset, length, call)


def refuse_to_fork_once() -> None:
    """Make the first fork fail as it does when there are too many processes."""
    fork = os.fork

    def refuse() -> int:
        os.fork = fork
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    os.fork = refuse


def open_blob(config: Path, settings: str) -> Blob:
    """Opens what the config asks for, or fails the way it asks for."""
    what = json.loads(config.read_text())
    assert json.loads(settings)["read_deadline_s"] > 0
    if "sleep_s" in what:
        time.sleep(what["sleep_s"])
    if "fail" in what:
        raise SourceError(what["fail"])
    if what.get("bug"):
        raise KeyError("a bug")
    if what.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if "flushed" in what:
        return SlowToFlush(what["size"], Path(what["flushed"]))
    if what.get("writable"):
        return MemoryWritable(what.get("size", MIB))
    if "trouble_at" in what:
        return Troubled(content_of(what), at=what["trouble_at"])
    return (Hog if what.get("hog") else MemoryBlob)(content_of(what))


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    hosts.IDLE_CHECK_S = 0.2
    host = Host(Path(sys.argv[1]), open_blob)
    print(host.bind(), flush=True)
    if "--refuse-to-fork-once" in sys.argv:
        refuse_to_fork_once()
    host.run()


if __name__ == "__main__":
    main()
