"""io_uring without ublk: a poll, and what the kernel refuses."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from obdlab.contrib.ublk.uring import Ring


@pytest.fixture
def ring() -> Iterator[Ring]:
    try:
        ring = Ring(4)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")
    yield ring
    ring.close()


def test_a_poll_is_told_once_for_each_time_it_was_asked(ring: Ring) -> None:
    wake = os.eventfd(0)
    for number in range(100):  # the ring's indices wrap around
        ring.poll(wake, number)
        ring.submit()
        assert list(ring.completions()) == []
        os.eventfd_write(wake, 1)
        ring.enter()
        assert list(ring.completions()) == [(number, 1)]
        os.eventfd_read(wake)
    os.close(wake)


def test_a_command_to_what_takes_none_is_refused(ring: Ring) -> None:
    counter = os.eventfd(0)
    ring.command(counter, 0xFFFFFFFF, b"payload", 7)
    ring.enter()
    ((user_data, result),) = ring.completions()
    os.close(counter)
    assert user_data == 7
    assert result in (-errno.EOPNOTSUPP, -errno.EINVAL, -errno.ENOTTY)


def test_more_than_there_is_room_for_is_refused(ring: Ring) -> None:
    wake = os.eventfd(0)
    for number in range(4):
        ring.poll(wake, number)
    with pytest.raises(OSError, match="no room"):
        ring.poll(wake, 4)
    os.close(wake)
