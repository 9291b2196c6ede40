"""Replayed starts: what goes out together, how long a program's own time lasts, and bytes that are wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from obdlab.lab.testbed.process import LabError
from obdlab.lab.testbed.startreplay import Replayer, Start
from obdlab.peers.simulator import Step, Workload

#: Two layers; the second step's blocks are of both.
WORKLOAD = Workload((Step(0.05, (0,)), Step(0.1, (1, 2))), (20_000, 30_000, 50_000), (0, 0, 1))


@contextmanager
def serving(start: Start, flip: int = -1) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Serve a start's blobs by their digests; of the request numbered ``flip`` one bit is wrong."""
    blobs = {layer.digest: layer.data for layer in start.layers}
    asked: list[tuple[str, str]] = []
    both = threading.Barrier(2)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            number = len(asked)
            asked.append((self.path, self.headers["Range"]))
            if number:  # the second step's are answered once both are there
                both.wait(30)
            begin, end = (int(each) for each in self.headers["Range"].removeprefix("bytes=").split("-"))
            data = bytearray(blobs[self.path.removeprefix("/")][begin : end + 1])
            if number == flip:
                data[7] ^= 1
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_blocks_of_a_step_go_out_together_and_the_programs_time_is_stretched() -> None:
    start = Start(WORKLOAD, "seed")
    first, second = (layer.digest for layer in start.layers)
    with serving(start) as (address, asked):
        began = time.monotonic()
        took = Replayer(start, address, lambda digest: f"/{digest}").run(0.1, 2.0)
        assert 2 * (0.1 + 0.15) <= took <= time.monotonic() - began
    assert asked[0] == (f"/{first}", "bytes=0-19999")
    assert set(asked[1:]) == {(f"/{first}", "bytes=20000-49999"), (f"/{second}", "bytes=0-49999")}


@pytest.mark.parametrize("flip", [0, 2])
def test_wrong_bytes_are_no_result(flip: int) -> None:
    start = Start(WORKLOAD, "seed")
    with serving(start, flip) as (address, _), pytest.raises(LabError, match=r"wrong bytes \(status 206"):
        Replayer(start, address, lambda digest: f"/{digest}").run(0.0, 0.0)


def test_an_agent_that_is_gone_is_named() -> None:
    start = Start(WORKLOAD, "seed")
    with serving(start) as (address, _):
        pass
    with pytest.raises(LabError, match="a read failed"):
        Replayer(start, address, lambda digest: f"/{digest}").run(0.0, 0.0)
