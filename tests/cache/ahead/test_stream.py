"""A blob fetched in order by one request, and readers beside it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from obdlab.blob import Blob
from obdlab.cache.ahead.stream import StreamAhead
from obdlab.call import Call
from obdlab.errors import SourceError
from obdlab.registry.client import RegistryClient
from obdlab.registry.remoteblob import RemoteBlob
from tests.cache.origin import DATA, UNIT, Origin, open_cached, wait_until
from tests.registry.faulty import (
    Fault,
    faulty_registry,
    no_content_range,
    other_range,
    reset,
    short_body,
    status,
    whole_blob,
)


class Streamed(Origin):
    """An origin that can be read as it comes; it counts requests, and may fail at a byte, once."""

    def __init__(self, break_at: int | None = None, data: bytes = DATA) -> None:
        super().__init__(data)
        self.content = data
        self.opened: list[tuple[int, int]] = []
        self.lengths: list[int] = []
        self.break_at = break_at
        self.go_on = threading.Event()
        self.go_on.set()

    def stream(self, offset: int, length: int, call: Call | None = None) -> Comes:
        self.opened.append((offset, length))
        return Comes(self, offset)


class Comes:
    def __init__(self, origin: Streamed, offset: int) -> None:
        self._origin = origin
        self.position = offset
        self.closed = False

    def read(self, length: int, call: Call | None = None) -> bytes:
        assert self._origin.go_on.wait(60)
        self._origin.lengths.append(length)
        end = self.position + length
        if self._origin.break_at is not None and end > self._origin.break_at:
            self._origin.break_at = None
            raise SourceError("broke off", temporary=True)
        data = self._origin.content[self.position : end]
        assert len(data) == length
        self.position = end
        return data

    def close(self) -> None:
        self.closed = True


def stream(blob: Blob) -> StreamAhead:
    made = StreamAhead("hot", blob)  # type: ignore[arg-type]
    made.start()
    return made


def test_one_request_brings_all_of_it(tmp_path: Path) -> None:
    origin = Streamed()
    with open_cached(tmp_path, origin) as blob:
        assert blob.read_at(0, 10) == DATA[:10]
        assert stream(blob).wait(60)
        assert origin.opened == [(UNIT, len(DATA) - UNIT)]
        assert blob.read_at(0, len(DATA)) == DATA
        assert origin.reads == [(0, UNIT)]
        assert blob.statistics()["prefetch_bytes"] == len(DATA) - UNIT
        assert blob.statistics()["prefetch_used_bytes"] == len(DATA) - UNIT
        assert stream(blob).wait(60)
        assert len(origin.opened) == 1


def test_the_first_piece_is_small_and_the_next_are_not(tmp_path: Path) -> None:
    origin = Streamed()
    with open_cached(tmp_path, origin) as blob:
        assert stream(blob).wait(60)
    first, *others, last = origin.lengths
    assert 16 << 10 <= first <= 32 << 10
    assert len(others) > 0
    assert all(64 << 10 <= length <= 256 << 10 for length in others)
    assert first + sum(others) + last == len(DATA)


def test_one_request_goes_on_over_what_is_cached(tmp_path: Path) -> None:
    origin = Streamed()
    with open_cached(tmp_path, origin) as blob:
        blob.read_at(12 * UNIT, 9 * UNIT)
        assert stream(blob).wait(60)
        assert origin.opened == [(0, len(DATA))]
        assert blob.statistics()["prefetch_bytes"] == len(DATA) - 9 * UNIT
        assert blob.read_at(0, len(DATA)) == DATA


def test_two_that_stream_the_same_blob_take_turns(tmp_path: Path) -> None:
    # Each has the files open for itself, as two processes have.
    class Slow(Streamed):
        def stream(self, offset: int, length: int, call: Call | None = None) -> Comes:
            time.sleep(0.01)
            return super().stream(offset, length, call)

    origins = [Slow(data=DATA * 5), Slow(data=DATA * 5)]
    with open_cached(tmp_path, origins[0]) as first, open_cached(tmp_path, origins[1]) as second:
        origins[0].go_on.clear()
        leader = stream(first)
        wait_until(lambda: len(origins[0].opened) == 1)
        follower = stream(second)
        assert not follower.wait(0.1)
        origins[0].go_on.set()
        assert leader.wait(60)
        assert follower.wait(60)
        assert origins[1].opened == []
        assert origins[1].reads == []
        assert sum(origins[0].lengths) == len(DATA * 5)
        assert second.read_at(0, len(DATA)) == DATA


def test_what_follows_goes_on_when_the_other_ends(tmp_path: Path) -> None:
    origins = [Streamed(data=DATA * 5), Streamed(data=DATA * 5)]
    with open_cached(tmp_path, origins[0]) as first, open_cached(tmp_path, origins[1]) as second:
        origins[0].go_on.clear()
        leader = stream(first)
        wait_until(lambda: len(origins[0].opened) == 1)
        follower = stream(second)
        leader.stop()
        origins[0].go_on.set()
        assert follower.wait(60)
        assert sum(origins[0].lengths) + sum(origins[1].lengths) == len(DATA * 5)
        assert second.read_at(0, len(DATA)) == DATA


def test_after_a_break_the_rest_is_asked_for(tmp_path: Path) -> None:
    origin = Streamed(break_at=20 * UNIT)
    with open_cached(tmp_path, origin) as blob:
        assert stream(blob).wait(60)
        assert len(origin.opened) == 2
        assert origin.opened[0] == (0, len(DATA))
        assert blob.read_at(0, len(DATA)) == DATA
        assert origin.reads == []


def test_a_reader_waits_for_what_is_about_to_come(tmp_path: Path) -> None:
    origin = Streamed()
    origin.go_on.clear()
    with open_cached(tmp_path, origin) as blob:
        running = stream(blob)
        wait_until(lambda: len(origin.opened) > 0)
        got: list[bytes] = []
        near = threading.Thread(target=lambda: got.append(blob.read_at(0, 5)))
        near.start()
        near.join(0.2)
        assert near.is_alive()
        origin.go_on.set()
        near.join(60)
        assert got == [DATA[:5]]
        assert running.wait(60)
        assert origin.reads == []


def test_a_reader_far_ahead_takes_only_what_it_needs(tmp_path: Path) -> None:
    origin = Streamed(data=DATA * 10)
    origin.go_on.clear()
    with open_cached(tmp_path, origin, extent=8 * UNIT) as blob:
        blob.opened(120.0)
        running = stream(blob)
        wait_until(lambda: len(origin.opened) > 0)
        assert blob.read_at(350 * UNIT, 10) == origin.content[350 * UNIT :][:10]
        assert origin.reads == [(350 * UNIT, UNIT)]
        origin.go_on.set()
        assert running.wait(60)
        blob.evict(0, 16 * UNIT)
        blob.read_at(3 * UNIT, 10)  # an extent again
        assert origin.reads[1:] == [(0, 8 * UNIT)]


def test_closing_ends_it(tmp_path: Path) -> None:
    origin = Streamed()
    origin.go_on.clear()
    blob = open_cached(tmp_path, origin)
    running = stream(blob)
    wait_until(lambda: len(origin.opened) > 0)
    blob.close()
    origin.go_on.set()
    assert running.wait(60)
    wait_until(lambda: origin.closed == 1)


def test_it_is_given_up_after_several_failures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Streamed):
        def stream(self, offset: int, length: int, call: Call | None = None) -> Comes:
            self.opened.append((offset, length))
            raise SourceError("refused", temporary=True)

    origin = Failing()
    with open_cached(tmp_path, origin) as blob:
        assert stream(blob).wait(60)
        assert len(origin.opened) == 3
        assert "streaming failed" in caplog.text
        assert blob.read_at(0, len(DATA)) == DATA


@pytest.mark.parametrize(
    "fault", [short_body(50 * UNIT), reset(50 * UNIT), status(503), other_range, no_content_range, whole_blob]
)
def test_real_answers_that_are_not_what_was_asked_for(tmp_path: Path, fault: Fault) -> None:
    data = DATA * 4
    with faulty_registry() as registry:
        client = RegistryClient()
        registry.next(None, fault)
        digest = registry.add_blob(data)
        with open_cached(tmp_path, RemoteBlob(client, registry.repository(), digest, len(data))) as blob:
            assert blob.read_at(0, UNIT) == data[:UNIT]
            assert stream(blob).wait(60)
            assert blob.read_at(0, len(data)) == data
            assert blob.statistics()["demand_bytes"] == UNIT
            assert len(registry.requests) == (2 if fault is whole_blob else 3)
        client.close()


def test_the_end_of_a_large_one_comes_by_a_request_of_its_own(tmp_path: Path) -> None:
    data = DATA * (1 + (6 << 20) // len(DATA))
    tail = 512 << 10
    with faulty_registry() as registry:
        client = RegistryClient()
        digest = registry.add_blob(data)
        with open_cached(tmp_path, RemoteBlob(client, registry.repository(), digest, len(data))) as blob:
            running = StreamAhead("hot", blob, left=100_000)  # type: ignore[arg-type]
            running.start()
            assert running.wait(60)
            assert blob.read_at(0, len(data)) == data
            assert blob.statistics()["demand_bytes"] == 0
            end = (len(data) - 100_000) // UNIT * UNIT
            asked = {str(request.range) for request in registry.requests}
            begin = end - tail
            assert asked == {f"bytes=0-{begin - 1}", f"bytes={begin}-{end - 1}", f"bytes={end}-{len(data) - 1}"}
        client.close()
