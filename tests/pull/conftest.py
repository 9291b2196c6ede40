"""A containerd and a registry for pulls."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from obdlab.registry.client import RegistryClient
from tests.containerd.conftest import containerd, containerd_host

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["containerd", "containerd_host", "registry"]


@pytest.fixture
def registry() -> Iterator[RegistryClient]:
    with closing(RegistryClient()) as client:
        yield client
