"""A device host whose "images" are random bytes as a small JSON asks: ``python -m tests.service.hosting DIR``."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from obdlab.blob import Blob, MemoryBlob
from obdlab.errors import SourceError
from obdlab.service import host as hosts
from obdlab.service.host import Host
from tests.devices.blobs import MemoryWritable, Troubled

MIB = 1 << 20


def content_of(what: dict[str, Any]) -> bytes:
    return random.Random(what.get("seed", 0)).randbytes(what.get("size", MIB))


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
    if what.get("writable"):
        return MemoryWritable(what.get("size", MIB))
    if "trouble_at" in what:
        return Troubled(content_of(what), at=what["trouble_at"])
    return MemoryBlob(content_of(what))


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    hosts.IDLE_CHECK_S = 0.2
    host = Host(Path(sys.argv[1]), open_blob)
    print(host.bind(), flush=True)
    host.run()


if __name__ == "__main__":
    main()
