"""What goes wrong on the data path is counted, once and in the right place."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.call import Call
from obdlab.errors import CorruptBlobError, SourceError
from obdlab.layers.zfile import open_zfile
from obdlab.observe import audit
from obdlab.observe.counters import Table, ages_s, counted
from obdlab.registry.client import RegistryClient
from obdlab.registry.errors import RegistryError
from obdlab.registry.remoteblob import RemoteBlob
from tests.cache.origin import DATA, UNIT, Origin, open_cached
from tests.layers.zfile_samples import compress, quadratic
from tests.registry.faulty import close_at_once, faulty_registry, status

REPEATED = b"the same again " * 4000


@pytest.fixture
def grown() -> Callable[[], Table]:
    """What was counted since the test began, without what stayed 0."""
    before = counted()

    def since() -> Table:
        found: Table = {}
        for name, labels in counted().items():
            for label, number in labels.items():
                difference = number - before.get(name, {}).get(label, 0)
                if difference and label != "sum":
                    found.setdefault(name, {})[label] = difference
        return found

    return since


class DamagedOnce(MemoryBlob):
    """Has a wrong byte until the range is evicted."""

    def __init__(self, data: bytes, at: int) -> None:
        super().__init__(data)
        self._at = at
        self._damaged = True

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        data = bytearray(super().read_at(offset, length, call))
        if self._damaged and offset <= self._at < offset + length and length < 100_000:
            data[self._at - offset] ^= 0x55
        return bytes(data)

    def evict(self, offset: int, length: int) -> None:
        self._damaged = False


@pytest.mark.parametrize("length", [100, 12000])
def test_a_damaged_block_of_a_zfile(grown: Callable[[], Table], length: int) -> None:
    content = quadratic(50_000)
    with open_zfile(DamagedOnce(compress(content), 700)) as blob:
        assert blob.read_at(0, length) == content[:length]
    assert grown() == {"checksum_failures": {"zfile": 1}, "corruptions_healed": {"zfile": 1}}


def test_a_block_that_does_not_decompress(grown: Callable[[], Table]) -> None:
    stored = bytearray(compress(REPEATED, verify=False))
    stored[512:515] = b"\xff\xff\xff"  # where the first block begins
    with open_zfile(MemoryBlob(bytes(stored))) as blob, pytest.raises(CorruptBlobError):
        blob.read_at(0, 100)
    assert grown() == {"decompression_failures": {"": 4}}  # read once, and three times more


def test_a_damaged_unit_of_the_cache(grown: Callable[[], Table], tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, 4 * UNIT)
        misses = grown()["miss_seconds"]
        assert sum(misses.values()) == 1
        (data,) = tmp_path.rglob("data")
        with data.open("r+b") as file:
            file.seek(UNIT + 7)
            file.write(b"\x00damage\x00")
        assert blob.read_at(UNIT, 100) == DATA[UNIT : UNIT + 100]
        assert blob.statistics()["corrupt_units"] == 1
    assert grown()["corruptions_healed"] == {"cache": 1}


def test_requests_by_status_and_retries(grown: Callable[[], Table], caplog: pytest.LogCaptureFixture) -> None:
    data = bytes(range(256)) * 16
    with faulty_registry() as registry:
        repository, digest = registry.repository(), registry.add_blob(data)
        client = RegistryClient(deadline_s=30)
        blob = RemoteBlob(client, repository, digest, len(data))
        registry.next(status(503), close_at_once)
        with caplog.at_level(logging.INFO, "obdlab.registry"):
            assert blob.read_at(100, 50) == data[100:150]
        assert grown()["registry_requests"] == {"503": 1, "failed": 1, "206": 1}
        assert grown()["registry_retries"] == {"": 2}
        assert grown()["download_bytes"] == {"": 50}
        assert sum(grown()["download_seconds"].values()) == 1
        first, second = (record.getMessage() for record in caplog.records if "(try " in record.getMessage())
        assert blob.name in first
        assert "answered 503" in first
        assert "at offset 100 (try 1, the next in " in first
        assert "(try 2, " in second
        assert ages_s()["registry_answered"] <= ages_s()["registry_failed"]

        registry.next(status(404))
        with pytest.raises(RegistryError, match="404") as raised:
            blob.read_at(0, 10)
        assert (raised.value.blob, raised.value.offset, raised.value.tries) == (blob.name, 0, 1)
        assert grown()["registry_requests"]["404"] == 1
        client.close()


def test_the_audit_log_tells_downloads_also_those_in_vain(tmp_path: Path) -> None:
    audit.configure(tmp_path / "audit.log", who="test")
    try:
        with faulty_registry() as registry:
            repository, digest = registry.repository(), registry.add_blob(b"x" * 1000)
            client = RegistryClient(deadline_s=30)
            blob = RemoteBlob(client, repository, digest, 1000)
            blob.read_at(10, 20)
            registry.next(status(404))
            with pytest.raises(SourceError):
                blob.read_at(30, 40)
            client.close()
    finally:
        audit.configure(None)
    first, second = (tmp_path / "audit.log").read_text().splitlines()
    where = f"[pathname={repository.blobs_url}/{digest}]"
    assert f"|test|[action=download]{where}[offset=10][size=20][latency_us=" in first
    assert f"|test|[action=download_failed]{where}[offset=30][size=40][latency_us=" in second
    assert time.strftime("%Y/%m/%d ") in first
