"""Layers that stay in their registry: what is asked of it."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import pytest

from obdlab.image.remote import RemoteLayers
from obdlab.settings.settings import Settings
from tests.registry import faulty
from tests.registry.faulty import faulty_registry

KIB, MIB = 1 << 10, 1 << 20
DATA = random.Random(9).randbytes(16 * MIB)


@pytest.mark.parametrize(("most", "last"), [(1024 * KIB, 1024 * KIB), (0, 256 * KIB)])
def test_misses_fetch_more_where_answers_are_long_in_coming(tmp_path: Path, most: int, last: int) -> None:
    settings = Settings(cache_dir=tmp_path, readahead_max=0, cache_extent_max=most)
    with faulty_registry() as registry:
        digest = registry.add_blob(DATA)
        registry.always(faulty.slowly(0.03))
        with (
            closing(RemoteLayers(registry.repository().blobs_url, settings)) as remote,
            remote.open(digest, len(DATA)) as blob,
        ):
            assert blob.read_at(0, 100) == DATA[:100]
            remote.opened()
            for offset in range(MIB, 12 * MIB, 2 * MIB):
                assert blob.read_at(offset, 100) == DATA[offset : offset + 100]
        ranges = [str(request.range).removeprefix("bytes=").split("-") for request in registry.blob_requests()]
    lengths = [int(end) - int(begin) + 1 for begin, end in ranges]
    assert lengths[0] == settings.cache_unit
    assert lengths[1] == 256 * KIB
    assert lengths[-1] == last
