"""One blob that tests of faults read a part of, and what an error of such a read must say."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from tests.registry import faulty

if TYPE_CHECKING:
    from obdlab.registry.errors import RegistryError
    from tests.registry.faulty import FaultyRegistry

DATA = random.Random(1).randbytes(300_000)
OFFSET, LENGTH = 70_000, 50_000
WANTED = DATA[OFFSET : OFFSET + LENGTH]
DEADLINE_S = 0.4  # of those who wait for a registry that stays broken


def read(client: RegistryClient, registry: FaultyRegistry) -> bytes:
    return client.read_range(registry.repository(), faulty.digest_of(DATA), OFFSET, LENGTH)


def credentials(registry: FaultyRegistry, password: str) -> Credentials:
    return Credentials({registry.host: (registry.user, password)})


def with_password(registry: FaultyRegistry) -> RegistryClient:
    return RegistryClient(credentials(registry, registry.password), request_timeout_s=5, deadline_s=20)


def assert_located(error: RegistryError, registry: FaultyRegistry) -> None:
    text = str(error)
    assert f"{registry.host}/some/image@{faulty.digest_of(DATA)}" in text
    assert f"at offset {OFFSET}" in text
    assert error.offset == OFFSET
