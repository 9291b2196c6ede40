"""What is known of the way to a registry."""

from __future__ import annotations

from contextlib import closing

import pytest

from obdlab.registry.client import RegistryClient
from obdlab.registry.link import Link
from tests.registry import faulty
from tests.registry.faulty import digest_of, faulty_registry

MIB = 1 << 20


def test_it_is_as_the_last_answers_were() -> None:
    link = Link()
    link.note(0.5, 4096, 0.001)  # too short to tell a rate
    assert (link.wait_s, link.bytes_per_wait) == (0.0, 0.0)
    for _ in range(2):
        link.note(0.020, MIB, 0.010)
    assert (link.wait_s, link.bytes_per_wait) == (0.0, 0.0)  # of too few
    link.note(0.020, MIB, 0.010)
    assert (link.wait_s, link.bytes_per_wait) == (0.020, 2 * MIB)
    link.note(3.0, MIB, 0.0)  # one odd answer
    assert (link.wait_s, link.bytes_per_wait) == (0.020, 2 * MIB)
    for _ in range(8):
        link.note(0.030, MIB, 0.1)
    assert link.wait_s == 0.030
    assert link.bytes_per_wait == pytest.approx(0.3 * MIB)


def test_a_near_mirror_does_not_speak_for_a_far_registry() -> None:
    link = Link()
    for _ in range(6):
        link.note(0.1, MIB, 0.1)
    for _ in range(2):
        link.note(0.001, MIB, 0.002)
    assert (link.wait_s, link.bytes_per_wait) == (0.1, MIB)


def test_ranges_that_are_read_are_noted() -> None:
    data = bytes(MIB)
    with faulty_registry() as registry, closing(RegistryClient()) as client:
        registry.add_blob(data)
        link = client.link(registry.repository())
        registry.always(faulty.slowly(0.05))
        for _ in range(3):
            client.read_range(registry.repository(), digest_of(data), 0, MIB // 2)
        assert link.wait_s >= 0.05
        assert link.bytes_per_wait > 0
