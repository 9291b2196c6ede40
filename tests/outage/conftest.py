"""The bench is built once for a file of tests, and is well again before each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import capabilities
from tests.outage.lab import Lab, Pieces, laboratory
from tests.outage.lab import pieces as read_pieces


@pytest.fixture(scope="package")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    capabilities.require("registry")
    with laboratory(tmp_path_factory.mktemp("outage")) as lab:
        yield lab


@pytest.fixture
def lab(bench: Lab) -> Iterator[Lab]:
    bench.reset()
    yield bench
    bench.reset()


@pytest.fixture(scope="package")
def pieces() -> Pieces:
    return read_pieces()
