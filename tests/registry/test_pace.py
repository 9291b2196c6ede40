"""An answer that drips is broken off and asked for again; a link that is slow for everybody still delivers."""

from __future__ import annotations

import random
import time
from contextlib import closing

import pytest

from obdlab.registry import tries
from obdlab.registry.client import RegistryClient
from obdlab.registry.tries import LARGEST
from tests.registry import faulty
from tests.registry.faulty import faulty_registry

DATA = random.Random(6).randbytes(LARGEST + (1 << 20))
DIGEST = faulty.digest_of(DATA)
LONG_S = 120.0


@pytest.fixture(autouse=True)
def _short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "WINDOW_S", 0.5)


@pytest.mark.parametrize("fault", [faulty.drip, faulty.drip_headers])
@pytest.mark.parametrize("length", [1000, LARGEST + 1])
def test_a_drip_costs_a_window(fault: faulty.Fault, length: int) -> None:
    with (
        faulty_registry() as registry,
        closing(RegistryClient(request_timeout_s=LONG_S, deadline_s=LONG_S, hedge_share=0)) as client,
    ):
        registry.add_blob(DATA)
        registry.next(fault, fault)
        started = time.monotonic()
        assert client.read_range(registry.repository(), DIGEST, 7, length) == DATA[7 : 7 + length]
        # Half of the deadline for each of the two, without a least pace; the rest for a machine that is busy.
        assert time.monotonic() - started < LONG_S / 3
        assert len(registry.requests) == 3


def test_a_link_that_is_slow_for_all_delivers() -> None:
    with faulty_registry() as registry, closing(RegistryClient(deadline_s=LONG_S, hedge_share=0)) as client:
        registry.add_blob(DATA)
        registry.always(faulty.dripping(0.01))
        assert client.read_range(registry.repository(), DIGEST, 0, 100) == DATA[:100]
        assert len(registry.requests) == 4


def test_a_window_begins_with_what_comes() -> None:
    kept = tries.WindowPace()
    assert kept.end is None  # the beginning of an answer is the silence's affair
    kept.received(1)
    first = kept.end
    kept.received(tries.LEAST_IN_WINDOW - 1)
    assert kept.end == first
    kept.received(1)
    assert first is not None
    assert kept.end is not None
    assert kept.end > first
