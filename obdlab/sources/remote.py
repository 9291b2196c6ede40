"""A blob in a registry, read by HTTP range requests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from obdlab.blob import Blob, check_range
from obdlab.formats.oci import check_digest
from obdlab.waiting import waiting

if TYPE_CHECKING:
    from obdlab.registry.client import RegistryClient
    from obdlab.registry.reference import Repository


class RemoteBlob(Blob):
    """A registry's blob of a size known beforehand (from its descriptor). Nothing is requested before a read.

    ``deadline_s`` bounds each read with all its retries; without it the client's own deadline does.
    """

    def __init__(
        self,
        client: RegistryClient,
        repository: Repository,
        digest: str,
        size: int,
        *,
        deadline_s: float | None = None,
    ) -> None:
        self.name = f"{repository}@{check_digest(digest, str(repository))}"
        self._client = client
        self._repository = repository
        self._digest = digest
        self._size = size
        self._deadline_s = deadline_s

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        """One range request. Raises RegistryError naming the blob and the offset."""
        check_range(self, offset, length)
        if length == 0:
            return b""
        deadline = None if self._deadline_s is None else time.monotonic() + self._deadline_s
        with waiting():
            return self._client.read_range(self._repository, self._digest, offset, length, deadline)

    def evict(self, offset: int, length: int) -> None:
        """Nothing is kept here, but who calls this was given wrong bytes: a mirror or proxy may be to blame."""
        self._client.distrust(self._repository, self._digest)
