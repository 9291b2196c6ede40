"""A bench for builds, which must leave nothing behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.build.building import Bench

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.registry.server import RegistryServer


@pytest.fixture
def bench(tmp_path: Path, registry_server: RegistryServer) -> Iterator[Bench]:
    made = Bench(tmp_path.resolve(), registry_server.host)
    try:
        yield made
        assert made.leftovers() == []
    finally:
        done = made.obdlab("cleanup", "--force")
        assert "still in use" not in done.stdout
