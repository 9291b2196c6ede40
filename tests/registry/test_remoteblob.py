"""A blob in a registry: reads end in time, also those that come again."""

from __future__ import annotations

import random
import time
from contextlib import closing

import pytest

from obdlab.registry import remoteblob
from obdlab.registry.client import RegistryClient
from obdlab.registry.errors import RegistryError
from obdlab.registry.remoteblob import RemoteBlob
from tests.registry import faulty
from tests.registry.faulty import FaultyRegistry, faulty_registry

DATA = random.Random(6).randbytes(100_000)


def blob_of(registry: FaultyRegistry, client: RegistryClient) -> RemoteBlob:
    return RemoteBlob(client, registry.repository(), registry.add_blob(DATA), len(DATA))


def test_what_failed_for_want_of_time_fails_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remoteblob, "_REMEMBERED_S", 60.0)
    # So short a deadline is given up when the next pause, of a random length, would not fit: perhaps before its half.
    monkeypatch.setattr(remoteblob, "_FULL_SHARE", 0.1)
    with faulty_registry() as registry, closing(RegistryClient(deadline_s=0.5, hedge_share=0)) as client:
        blob = blob_of(registry, client)
        registry.always(faulty.status(503))
        with pytest.raises(RegistryError) as first:
            blob.read_at(10_000, 20_000)
        asked = len(registry.requests)
        for offset, length in ((10_000, 20_000), (12_288, 4096), (0, 10_001), (29_999, 1)):
            with pytest.raises(RegistryError) as again:
                blob.read_at(offset, length)
            assert again.value.what == first.value.what
            assert (again.value.temporary, again.value.status) == (True, first.value.status)
            assert f"at offset {offset}" in str(again.value)
        assert len(registry.requests) == asked
        # Beside it nothing is known, and one success says that the registry is back.
        registry.always(None)
        assert blob.read_at(0, 10_000) == DATA[:10_000]
        assert blob.read_at(10_000, 20_000) == DATA[10_000:30_000]


def test_that_is_soon_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remoteblob, "_REMEMBERED_S", 0.05)
    with faulty_registry() as registry, closing(RegistryClient(deadline_s=0.3, hedge_share=0)) as client:
        blob = blob_of(registry, client)
        registry.always(faulty.status(503))
        with pytest.raises(RegistryError):
            blob.read_at(0, 100)
        registry.always(None)
        time.sleep(0.1)
        assert blob.read_at(0, 100) == DATA[:100]


@pytest.mark.parametrize("fault", [faulty.status(404), faulty.status(429, Retry_After="60")])
def test_failures_that_came_soon_are_asked_for_again(fault: faulty.Fault) -> None:
    with faulty_registry() as registry, closing(RegistryClient(deadline_s=50)) as client:
        blob = blob_of(registry, client)
        registry.next(fault)
        with pytest.raises(RegistryError):
            blob.read_at(0, 100)
        assert blob.read_at(0, 100) == DATA[:100]


@pytest.mark.parametrize("fault", [None, faulty.whole_blob], ids=["206", "200"])
@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 50_000, 1 << 40])
def test_a_registry_that_knows_another_size_is_believed(size: int, fault: faulty.Fault | None) -> None:
    with faulty_registry() as registry, closing(RegistryClient(deadline_s=20)) as client:
        registry.always(fault)
        blob = RemoteBlob(client, registry.repository(), registry.add_blob(DATA), size)
        wanted = rf"another size \(got {len(DATA)}, wanted {size}\)"
        with pytest.raises(RegistryError, match=wanted):
            blob.read_at(0, 100)
        with pytest.raises(RegistryError, match=wanted):
            blob.stream(0, 100)
        assert len(registry.requests) == 2  # trying again would not help
