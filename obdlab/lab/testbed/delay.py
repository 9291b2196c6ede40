"""Round-trip time without the kernel's netem: a bridge in user space holds every frame for half of it.

Two AF_PACKET sockets, one per link. With PACKET_VNET_HDR (packet(7), linux/virtio_net.h) the bridge gets and sends
frames in the kernel's form, up to 64 KiB and without checksums. So both sides keep their offloads, and a thousand
frames per second carry 500 Mbit/s. The delay counts from the kernel's arrival stamp, not from the read. The process
asks for real-time priority, since it must keep time beside a busy container start.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import time
from collections import deque

_ETH_P_ALL = 3
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_PACKET_QDISC_BYPASS = 20
_PACKET_IGNORE_OUTGOING = 23
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_SO_TIMESTAMPNS = 35
_PR_SET_TIMERSLACK = 29
_BUFFER_SIZE = 64 << 20
_FRAME_SIZE = 10 + 18 + 65536
_BATCH = 64
_TIMESPEC = struct.Struct("@qq")
# A frame due within this time is sent at once: so short a sleep would end too late.
_EARLY_NS = 20_000

READY = "delay bridge ready"


def serve(first: str, second: str, one_way_s: float) -> None:
    """Pass frames between two interfaces of this namespace; hold each for ``one_way_s``. Runs until killed."""
    keeps_time = _ask_for_punctuality()
    ends = (_open(first), _open(second))
    print(f"{READY} (real-time priority: {'yes' if keeps_time else 'no'})", flush=True)
    one_way_ns = round(one_way_s * 1e9)
    # Each queue is in order of time, as all frames are held equally long.
    queues: tuple[deque[tuple[int, bytes]], ...] = (deque(), deque())
    while True:
        readable, _, _ = select.select(ends, (), (), _wait_s(queues))
        for source in readable:
            _receive(source, queues[ends.index(source)], one_way_ns)
        for queue, target in zip(queues, reversed(ends), strict=True):
            _send_due(queue, target)


def command(first: str, second: str, one_way_s: float) -> list[str]:
    """Return the Python interpreter's arguments that run :func:`serve`."""
    return ["-c", f"from obdlab.lab.testbed.delay import serve; serve({first!r}, {second!r}, {one_way_s!r})"]


def _open(interface: str) -> socket.socket:
    # The socket is bound before it gets a protocol; otherwise it would receive other interfaces' frames in between.
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    for option in (_PACKET_VNET_HDR, _PACKET_QDISC_BYPASS, _PACKET_IGNORE_OUTGOING):
        end.setsockopt(_SOL_PACKET, option, 1)
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_SIZE)
    end.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    end.bind((interface, _ETH_P_ALL))
    end.setblocking(False)
    return end


def _ask_for_punctuality() -> bool:
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    except OSError:
        return False
    return True


def _wait_s(queues: tuple[deque[tuple[int, bytes]], ...]) -> float | None:
    due = [queue[0][0] for queue in queues if queue]
    return max(0, min(due) - time.clock_gettime_ns(time.CLOCK_REALTIME)) / 1e9 if due else None


def _receive(source: socket.socket, queue: deque[tuple[int, bytes]], one_way_ns: int) -> None:
    for _ in range(_BATCH):
        try:
            frame, ancillary, _, _ = source.recvmsg(_FRAME_SIZE, 64)
        except BlockingIOError:
            return
        seconds, nanoseconds = _TIMESPEC.unpack_from(ancillary[0][2])
        queue.append((seconds * 1_000_000_000 + nanoseconds + one_way_ns, frame))


def _send_due(queue: deque[tuple[int, bytes]], target: socket.socket) -> None:
    horizon = time.clock_gettime_ns(time.CLOCK_REALTIME) + _EARLY_NS
    while queue and queue[0][0] <= horizon:
        try:
            target.send(queue[0][1])
        except BlockingIOError:
            return
        except OSError:
            pass  # the link refused the frame: it is lost, as on any link
        queue.popleft()
