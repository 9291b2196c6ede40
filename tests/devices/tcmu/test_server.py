"""Answers and counters of a server over a simulated ring, and its end."""

from __future__ import annotations

import select
import time

from obdlab.blob import MemoryBlob
from obdlab.devices.tcmu.disk import ScsiDisk
from obdlab.devices.tcmu.server import TcmuServer
from tests.devices.blobs import Gated, MemoryWritable
from tests.devices.tcmu.simulated import KernelRing, read_10, read_16, served, write_10

DATA = bytes(range(256)) * 64


def test_a_read_into_a_larger_buffer_reports_its_length_and_clears_the_rest() -> None:
    with served(MemoryBlob(DATA)) as (kernel, _):
        answer = kernel.do(read_10(1, 8), room=8192)
        assert (answer.status, answer.read_length) == (0, 4096)
        assert answer.data == DATA[512:4608] + bytes(4096)


def test_a_read_into_a_smaller_buffer_changes_nothing_behind_it() -> None:
    with served(MemoryBlob(DATA)) as (kernel, _):
        first = kernel.put(read_10(0, 8), room=512)
        second = kernel.put(write_10(0, 1), b"w" * 512)
        ((begin, _),), _ = kernel.outstanding[first]
        kernel.publish()
        answer = kernel.wait([first, second])[first]
        assert (answer.status, answer.data) == (0, DATA[:512])
        assert kernel.memory[begin + 512 : begin + 4096] == bytes(3584)


def test_a_failed_command_has_no_length() -> None:
    with served(MemoryBlob(DATA)) as (kernel, _):
        answer = kernel.do(read_16(1 << 40, 1), room=512)
        assert (answer.status, answer.sense, answer.read_length) == (2, (5, 0x2100), None)


def test_no_command_is_under_way_once_all_are_answered() -> None:
    with served(MemoryWritable(8192)) as (kernel, server):
        for command, data in ((write_10(0, 1), b"x" * 512), (bytes(6), b"")):  # TEST UNIT READY
            assert kernel.do(command, data).status == 0
            deadline = time.monotonic() + 30
            while server.statistics().under_way_s and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.statistics().under_way_s == ()


def test_refused_transfers_count_as_errors_and_probes_do_not() -> None:
    with served(MemoryWritable(8192)) as (kernel, server):
        assert kernel.do(bytes((0x12, 1, 0xFE, 0, 96, 0)), room=96).sense == (5, 0x2400)  # no such page
        counters = server.statistics()
        assert (counters.errors, counters.last_error) == (0, "")
        assert kernel.do(write_10(1, 8), bytes(512)).sense == (5, 0x2400)  # less data than blocks
        counters = server.statistics()
        assert (counters.errors, counters.writes) == (1, 0)
        assert counters.last_error.startswith("write of 4096 bytes at offset 512: ")


def test_a_server_ends_with_its_device() -> None:
    kernel = KernelRing()
    disk = ScsiDisk(MemoryBlob(DATA), serial="0123456789abcdef", description="d")
    server = TcmuServer(kernel.memory, kernel.event, disk, name="simulated")
    server.start()
    kernel.put(read_10(0, 8), room=4096)
    kernel.publish()
    assert select.select([kernel.kernel], [], [], 30)[0]
    kernel.kernel.close()  # with the answer unread, so that the server's next wait fails
    assert server.wait(30)
    kernel.close()


def test_a_ring_is_drained_once_all_is_answered() -> None:
    blob = Gated(DATA, at=4096)
    with served(blob) as (kernel, server):
        assert server.drained(0)
        slow = kernel.put(read_10(8, 8), room=4096)
        kernel.publish()
        assert blob.waiting.acquire(timeout=30)
        assert not server.drained(0.05)
        blob.gate.set()
        assert kernel.wait([slow])[slow].data == DATA[4096:8192]
        assert server.drained(30)
