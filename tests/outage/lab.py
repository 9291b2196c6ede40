"""The laboratory's bench: a real registry in token mode behind the proxy, an image in it, and what it holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

import obdlab
from obdlab.blob import Blob
from obdlab.errors import ObdlabError
from obdlab.formats.oci import digest_of
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.open import Image, open_image
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from tests.outage.cases import DEADLINE_S, IMPATIENT_SILENCE_S, PATIENCE_S, SILENCE_S, Failure
from tests.outage.proxy import OutageProxy, outage_proxy
from tests.outage.tokens import TokenServer, token_server
from tests.registry.server import RegistryServer, running_registry

T = TypeVar("T")

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
LAYERS = [GOLDEN / "layer1.obd", GOLDEN / "layer2.obd"]
_PIECE = 128 << 10


@dataclass(frozen=True)
class Lab:
    """A registry in token mode, the proxy that spoils its answers, and the golden image in it."""

    registry: RegistryServer
    tokens: TokenServer
    proxy: OutageProxy
    config: ImageConfig

    def reset(self) -> None:
        """Let all be well again."""
        self.proxy.good()
        self.tokens.reset()


@contextmanager
def laboratory(directory: Path) -> Iterator[Lab]:
    """Run one, with all its files below ``directory``."""
    with (
        token_server(directory / "tokens") as tokens,
        running_registry(directory / "registry", auth=tokens.registry_auth()) as registry,
        outage_proxy(registry.host) as proxy,
    ):
        yield Lab(registry, tokens, proxy, push(proxy.host, "outage/golden", LAYERS))


def push(host: str, name: str, layers: list[Path], *, plain_http: bool = True) -> ImageConfig:
    """Put layers into a repository, and return the image of them."""
    client = RegistryClient(request_timeout_s=20, deadline_s=60)
    repository = client.repository(Reference.parse(f"{host}/{name}:1"))
    lowers = []
    for path in layers:
        digest, size = digest_of(path.read_bytes()), path.stat().st_size
        client.push_blob(repository, digest, size, partial(path.open, "rb"))
        lowers.append(LowerConfig(digest=digest, size=size))
    client.close()
    url = repository.blobs_url if plain_http else repository.blobs_url.replace("http:", "https:")
    return ImageConfig(url, lowers=tuple(lowers))


def patient(cache_dir: Path) -> Settings:
    """Settings of a reader who sees faults through."""
    return Settings(
        cache_dir=cache_dir, request_timeout_s=SILENCE_S, read_deadline_s=PATIENCE_S, open_deadline_s=PATIENCE_S
    )


def impatient(cache_dir: Path) -> Settings:
    """Settings of a reader who soon has had enough, and for whom nothing is fetched before he asks."""
    return Settings(
        readahead_max=0,
        cache_dir=cache_dir,
        request_timeout_s=IMPATIENT_SILENCE_S,
        read_deadline_s=DEADLINE_S,
        open_deadline_s=PATIENCE_S,
    )


Pieces = list[tuple[int, bytes]]


def pieces() -> Pieces:
    """What the golden image holds, from its files, as (offset, content)."""
    with obdlab.open_stack(LAYERS) as disk:
        found = []
        for begin, end in _mapped(disk):
            for offset in range(begin, end, _PIECE):
                found.append((offset, disk.read_at(offset, min(_PIECE, end - offset))))  # noqa: PERF401
        return found


def _mapped(disk: obdlab.Disk) -> Iterator[tuple[int, int]]:
    segments = disk.index.segments()
    begin = end = 0
    for first, count in zip(segments.offset_sectors.tolist(), segments.length_sectors.tolist(), strict=True):
        if first * 512 != end:
            if end > begin:
                yield begin, end
            begin = first * 512
        end = (first + count) * 512
    yield begin, end


def opened(config: ImageConfig, settings: Settings) -> Image:
    """Open an image; on a busy machine an impatient reader may need another try."""
    image = insist(lambda: open_image(config, settings))
    assert isinstance(image, Image)
    return image


def insist(attempt: Callable[[], T]) -> T:
    """Return what ``attempt`` does, which may fail a few times; the last error is raised."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return attempt()
        except ObdlabError:
            if time.monotonic() >= deadline:
                raise


def assert_right(blob: Blob, wanted: Pieces) -> None:
    """Read all pieces, which must be as they should."""
    for offset, content in wanted:
        assert blob.read_at(offset, len(content)) == content, f"wrong bytes at {offset}"


def assert_right_again(blob: Blob, wanted: Pieces) -> None:
    """The same, by an impatient reader after a trouble that is over."""
    for offset, content in wanted:
        assert insist(partial(blob.read_at, offset, len(content))) == content, f"wrong bytes at {offset}"


def read_until_failure(blob: Blob, wanted: Pieces) -> tuple[ObdlabError, float]:
    """Read pieces, all right, until one fails; return the error and how long that read took."""
    for offset, content in wanted:
        started = time.monotonic()
        try:
            data = blob.read_at(offset, len(content))
        except ObdlabError as error:
            return error, time.monotonic() - started
        assert data == content, f"wrong bytes at {offset}"
    pytest.fail("every read succeeded")


def assert_is(error: ObdlabError, failure: Failure) -> None:
    """Check an error's kind, its text, and whether it was worth another try."""
    assert isinstance(error, failure.kind), repr(error)
    assert failure.says in str(error)
    if hasattr(error, "temporary"):
        assert error.temporary is not failure.at_once


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait for something that must come about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.01)
