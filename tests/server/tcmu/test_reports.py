"""Reports of servers to the daemon, which need no kernel with TCMU."""

from __future__ import annotations

import os
import select

import pytest

from obdlab.devices.tcmu.uio import DeviceBusyError, UioName
from obdlab.errors import SourceError, of_code
from obdlab.server.tcmu.daemon import TcmuDaemon, _Server
from obdlab.server.tcmu.server import Reporter
from obdlab.system.pauses import backoff_s


def reported(error: Exception | None) -> _Server:
    """What a daemon knows of a server after its report, which arrives in two parts."""
    daemon = TcmuDaemon.__new__(TcmuDaemon)
    daemon._poll = select.poll()
    reader, writer = os.pipe()
    name = UioName.parse("tcm-user/1/device/overlaybd//images/config.v1.json")
    assert name is not None
    server = _Server(1, name, -1, os.getpid(), reader, 0.0, None, 0)
    daemon._poll.register(reader, select.POLLIN)
    line_reader, line_writer = os.pipe()
    report = Reporter(line_writer)
    if error is None:
        report.ready()
    else:
        report.failed(error)
    line = os.read(line_reader, 65536)
    os.close(line_reader)
    os.write(writer, line[:5])
    daemon._on_report(server)
    assert server.ready_at is server.failed is None
    os.write(writer, line[5:])
    os.close(writer)
    daemon._on_report(server)
    daemon._on_report(server)  # the end
    assert server.reader == -1
    return server


def test_a_server_that_is_ready() -> None:
    server = reported(None)
    assert server.ready_at is not None
    assert server.failed is None


@pytest.mark.parametrize(
    ("error", "text", "busy"),
    [
        (DeviceBusyError("uio1: served by another process"), "uio1: served by another process", True),
        (SourceError("no layer"), "no layer", False),
        (KeyError("a bug"), "KeyError: 'a bug'", False),
    ],
)
def test_a_server_that_failed(error: Exception, text: str, busy: bool) -> None:
    failed = reported(error).failed
    assert failed is not None
    assert failed.error == text
    assert issubclass(of_code(failed.code), DeviceBusyError) is busy


def test_a_killed_daemon_is_no_reason_to_end() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    Reporter(writer).ready()


def test_pauses_double_up_to_the_longest() -> None:
    assert [backoff_s(failures, 0.05, 30.0) for failures in (0, 1, 2, 9, 10, 10_000)] == [
        *(0.05, 0.1, 0.2),
        *(25.6, 30.0, 30.0),
    ]
