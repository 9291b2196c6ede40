"""The same through a mounted device: files are right or reading them fails, in time; then all is well again."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from obdlab.cache.admin import clear
from obdlab.cache.space import CacheSpace
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests import capabilities
from tests.outage import lab as bench
from tests.outage.cases import CASES, DEADLINE_S, SLACK_S, Case, case
from tests.outage.lab import Lab
from tests.outage.situations import OwnRegistry

pytestmark = [pytest.mark.kernel, pytest.mark.registry]

FILE = "big"
_BLOCK = 64 << 10
# One of each outcome; all of them run in the long tests.
_QUICK = [
    "401 in mid-stream",
    "403",
    "503",
    "redirect to a URL that expires",
    "short body",
    "black hole: no answer at all",
    "wrong bytes: a flipped bit in every 8 KiB",
]


def _chosen(cases: list[Case]) -> list[pytest.ParameterSet]:
    return [pytest.param(one, id=one.name, marks=() if one.name in _QUICK else pytest.mark.slow) for one in cases]


LASTING = _chosen([one for one in CASES if one.lasts is not None])
PASSING = _chosen([one for one in CASES if one.once is None])


@dataclass(frozen=True)
class Mounted:
    """The golden image, mounted from the registry behind the proxy."""

    service: DeviceService
    cache: CacheSpace
    target: Path
    content: bytes

    def forget(self) -> None:
        """Take all of it out of the cache, so that the registry is asked."""
        clear(self.cache)

    def read(self) -> bytes:
        """Read the file past the page cache. Raises OSError."""
        return read_file(self.target / FILE)


def read_file(path: Path) -> bytes:
    """Read a file past the page cache. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    found = bytearray()
    try:
        with mmap.mmap(-1, _BLOCK) as aligned:
            while count := os.preadv(fd, [aligned], len(found)):
                found += aligned[:count]
    finally:
        os.close(fd)
    return bytes(found)


def read_patiently(path: Path) -> bytes:
    """Read a file as a program does that tries again."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return read_file(path)
        except OSError as error:
            assert error.errno == errno.EIO
            assert time.monotonic() < deadline, "never well again"


@pytest.fixture(scope="module")
def mounted(bench: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    capabilities.require("kernel")
    bench.reset()
    directory = tmp_path_factory.mktemp("device").resolve()
    settings = Settings(
        cache_dir=directory / "cache",
        request_timeout_s=0.5,
        read_deadline_s=DEADLINE_S,
        open_deadline_s=30,
        readahead_max=0,
    )
    service = DeviceService(directory / "run", settings)
    with ExitStack() as cleaning:
        cleaning.callback(clean_up, service, force=True)
        bench.config.save(directory / "config.v1.json")
        device = service.attach(directory / "config.v1.json", "outage")
        target = directory / "mnt"
        target.mkdir()
        service.mount(device, target)
        cleaning.callback(mount.unmount, target)
        content = (target / FILE).read_bytes()
        yield Mounted(service, CacheSpace(settings.cache_dir), target, content)


def test_the_file_is_the_golden_one(mounted: Mounted) -> None:
    with (bench.GOLDEN / "layer1.tar").open("rb") as tar:
        assert mounted.content in tar.read()
    assert len(mounted.content) == 1_200_000


@pytest.mark.parametrize("case", PASSING)
def test_once(lab: Lab, mounted: Mounted, case: Case) -> None:
    before = lab.proxy.injected[case.name]
    mounted.forget()
    lab.proxy.next(case, case.times)
    # A silent server may cost the whole of this reader's short deadline.
    assert read_patiently(mounted.target / FILE) == mounted.content
    assert lab.proxy.injected[case.name] == before + case.times


@pytest.mark.parametrize("case", LASTING)
def test_as_long_as_it_lasts(lab: Lab, mounted: Mounted, case: Case) -> None:
    assert case.lasts is not None
    before = lab.proxy.injected[case.name]
    mounted.forget()
    lab.proxy.always(case)
    started = time.monotonic()
    with pytest.raises(OSError) as caught:
        mounted.read()
    assert caught.value.errno == errno.EIO
    # The kernel asks again, and for less: each time has the deadline.
    assert time.monotonic() - started < 5 * DEADLINE_S + SLACK_S
    assert lab.proxy.injected[case.name] > before
    assert case.lasts.says in mounted.service.last_error("outage")
    lab.proxy.good()
    assert read_patiently(mounted.target / FILE) == mounted.content


def test_a_reader_goes_on_when_its_registry_is_back(tmp_path: Path) -> None:
    directory = tmp_path.resolve()
    settings = Settings(
        cache_dir=directory / "cache", request_timeout_s=1, read_deadline_s=60, open_deadline_s=60, readahead_max=0
    )
    service = DeviceService(directory / "run", settings)
    with ExitStack() as cleaning:
        registry = OwnRegistry(directory / "own", cleaning)
        cleaning.callback(clean_up, service, force=True)
        registry.config.save(directory / "config.v1.json")
        device = service.attach(directory / "config.v1.json", "own")
        target = directory / "mnt"
        target.mkdir()
        service.mount(device, target)
        cleaning.callback(mount.unmount, target)
        wanted = (target / FILE).read_bytes()
        clear(CacheSpace(settings.cache_dir))
        with ThreadPoolExecutor(1) as reader:
            registry.kill()
            reading = reader.submit(read_file, target / FILE)
            time.sleep(1.5)
            assert not reading.done()
            registry.start()
            # No error at all: the registry was away for less than the deadline.
            assert reading.result(timeout=120) == wanted
        assert registry.server.requests()


@pytest.mark.parametrize(
    "away_s", [pytest.param(2.0, id="2 s"), pytest.param(60.0, id="60 s", marks=pytest.mark.slow)]
)
def test_503_for_a_while(lab: Lab, tmp_path: Path, pieces: bench.Pieces, away_s: float) -> None:
    settings = Settings(cache_dir=tmp_path, readahead_max=0)  # whose deadline is 120 s
    lasting = case("503")
    with bench.opened(lab.config, settings) as image, ThreadPoolExecutor(1) as reader:
        before = lab.proxy.injected[lasting.name]
        lab.proxy.always(lasting)
        reading = reader.submit(bench.assert_right, image, pieces)
        time.sleep(away_s)
        assert not reading.done()
        lab.proxy.good()
        reading.result(timeout=120)
        assert lab.proxy.injected[lasting.name] - before >= 5
        # Many more would be a registry kept down by those who wait for it.
        assert lab.proxy.injected[lasting.name] - before < 20 + away_s
