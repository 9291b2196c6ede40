"""Many readers of many blobs through a registry that fails often: no wrong byte, no error, nothing piling up."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from obdlab.cache.blockcache import BlockCache
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.remoteblob import RemoteBlob
from tests.registry import faulty
from tests.registry.faulty import faulty_registry

BLOBS = 10
BLOB_SIZE = 1_000_000
THREADS = 6
FAULTS = [
    faulty.status(500),
    faulty.status(503),
    faulty.status(429, Retry_After="0"),
    faulty.short_body(500),
    faulty.reset(3000),
    faulty.close_at_once,
    faulty.garbage,
    faulty.other_range,
    faulty.longer_body,
    faulty.whole_blob,
]


@pytest.mark.parametrize("reads", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_one_answer_in_ten_is_bad(tmp_path: Path, reads: int) -> None:
    generator = random.Random(1)

    def sometimes(answer: faulty.Answer) -> None:
        if generator.random() < 0.1:
            generator.choice(FAULTS)(answer)
        else:
            answer.send()

    before = len(os.listdir("/proc/self/fd"))
    with faulty_registry(auth="bearer", token_life_s=0.3) as registry:
        contents = [generator.randbytes(BLOB_SIZE) for _ in range(BLOBS)]
        digests = [registry.add_blob(content) for content in contents]
        registry.always(sometimes)
        credentials = Credentials({registry.host: (registry.user, registry.password)})
        client = RegistryClient(credentials, request_timeout_s=10, deadline_s=60)
        cache = BlockCache(tmp_path, deadline_s=60)
        blobs = [cache.open(RemoteBlob(client, registry.repository(), d, BLOB_SIZE), d) for d in digests]
        failures: list[str] = []

        def reader(seed: int) -> None:
            chooser = random.Random(seed)
            for _ in range(reads):
                number = chooser.randrange(BLOBS)
                offset = chooser.randrange(BLOB_SIZE)
                length = min(chooser.choice([10, 4096, 131072]), BLOB_SIZE - offset)
                if chooser.random() < 0.05:
                    blobs[number].evict(0, BLOB_SIZE)
                try:
                    if blobs[number].read_at(offset, length) != contents[number][offset : offset + length]:
                        failures.append(f"wrong bytes of blob {number} at {offset}")
                except Exception as error:
                    failures.append(repr(error))

        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert cache.statistics()["requests"] > 0
        # A connection per thread that may fetch, another that is hedged, their other ends (here), the cache's files.
        assert len(os.listdir("/proc/self/fd")) - before < 4 * (THREADS + 8) + 2 * BLOBS + 16
        for blob in blobs:
            blob.close()
        client.close()
