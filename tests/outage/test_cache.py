"""A damaged, truncated, full or abandoned cache under an image from a registry: always the right bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from obdlab.image.config import ImageConfig
from obdlab.image.open import open_image
from obdlab.layerfiles.rawdisk import RawDisk
from obdlab.layerfiles.writing import Packing, write_layer
from obdlab.settings.settings import Settings
from tests.outage import lab as bench
from tests.outage.lab import Lab, Pieces, push
from tests.outage.soaking import BLOCK, BLOCKS, Task, block

pytestmark = pytest.mark.registry

_SMALL = 24  # blocks
_COMPRESSED = Packing(tar=True)
_KILLS = [pytest.param(4, id="4 kills"), pytest.param(60, id="60 kills", marks=pytest.mark.slow)]


def make_image(
    lab: Lab, directory: Path, number: int, blocks: int, packing: Packing = _COMPRESSED
) -> tuple[ImageConfig, Pieces]:
    """Push an image of one layer; return it and what it holds."""
    raw, layer = directory / "raw", directory / f"{number}.obd"
    wanted = [(index * BLOCK, block(number, index)) for index in range(blocks)]
    raw.write_bytes(b"".join(content for _, content in wanted))
    write_layer(RawDisk(raw), layer, packing)
    pushed = push(lab.registry.host, "outage/cache", [layer])
    return ImageConfig(f"http://{lab.proxy.host}/v2/outage/cache/blobs", lowers=pushed.lowers), wanted


def settings_for(cache: Path) -> Settings:
    return replace(bench.patient(cache), cache_unit=4096, readahead_max=0, cache_min_free=0)


def files_of(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.fixture(params=["compressed", "plain"])
def filled(lab: Lab, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[ImageConfig, Pieces, Path]:
    """A small image whose cache holds all of it. A plain layer has no checksums: there the cache's have to do."""
    plain = request.param == "plain"
    config, wanted = make_image(
        lab, tmp_path, 501 if plain else 500, _SMALL, Packing(algorithm="") if plain else _COMPRESSED
    )
    cache = tmp_path / "filled"
    with open_image(config, settings_for(cache)) as image:
        bench.assert_right(image, wanted)
    asked = lab.proxy.asked
    with open_image(config, settings_for(cache)) as image:
        bench.assert_right(image, wanted)
    assert lab.proxy.asked == asked, "not all of it was kept"
    return config, wanted, cache


def assert_reads_right(config: ImageConfig, cache: Path, wanted: Pieces) -> None:
    with open_image(config, settings_for(cache)) as image:
        bench.assert_right(image, wanted)


@pytest.mark.parametrize(
    "flips", [pytest.param(16, id="some"), pytest.param(1200, id="many", marks=pytest.mark.slow)]
)
def test_any_byte_flipped(lab: Lab, filled: tuple[ImageConfig, Pieces, Path], tmp_path: Path, flips: int) -> None:
    config, wanted, cache = filled
    chooser = random.Random(flips)
    asked = lab.proxy.asked
    for name in (path.relative_to(cache) for path in files_of(cache)):
        size = (cache / name).stat().st_size
        # Where headers are, byte by byte; else anywhere.
        places = [*range(min(size, flips // 2)), *(chooser.randrange(size) for _ in range(flips if size else 0))]
        for place in places:
            damaged = tmp_path / "damaged"
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(cache, damaged)
            with (damaged / name).open("r+b") as file:
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ (1 << chooser.randrange(8))]))
            assert_reads_right(config, damaged, wanted)
            assert_reads_right(config, damaged, wanted)
    assert lab.proxy.asked > asked, "no damage was noticed"


def test_truncated(filled: tuple[ImageConfig, Pieces, Path], tmp_path: Path) -> None:
    config, wanted, cache = filled
    for name in (path.relative_to(cache) for path in files_of(cache)):
        size = (cache / name).stat().st_size
        for length in {0, 1, size // 3, size // 2, max(0, size - 1)}:
            damaged = tmp_path / "damaged"
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(cache, damaged)
            os.truncate(damaged / name, length)
            assert_reads_right(config, damaged, wanted)
            assert_reads_right(config, damaged, wanted)


def test_missing(filled: tuple[ImageConfig, Pieces, Path], tmp_path: Path) -> None:
    config, wanted, cache = filled
    for name in (path.relative_to(cache) for path in files_of(cache)):
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(cache, damaged)
        (damaged / name).unlink()
        assert_reads_right(config, damaged, wanted)


@pytest.mark.parametrize("what", ["flipped", "truncated", "emptied"])
def test_damaged_under_an_open_image(lab: Lab, filled: tuple[ImageConfig, Pieces, Path], what: str) -> None:
    config, wanted, cache = filled
    with open_image(config, settings_for(cache)) as image:
        bench.assert_right(image, wanted)
        asked = lab.proxy.asked
        for path in cache.rglob("data"):
            size = path.stat().st_size
            if what == "truncated":
                os.truncate(path, size // 2)
            elif what == "emptied":
                path.write_bytes(bytes(size))
            else:
                damaged = bytearray(path.read_bytes())
                damaged[::1000] = bytes(byte ^ 1 for byte in damaged[::1000])
                with path.open("r+b") as file:  # in place, as a bad disk would
                    file.write(damaged)
        bench.assert_right(image, wanted)
        assert lab.proxy.asked > asked
        bench.assert_right(image, wanted)


@pytest.mark.kernel
def test_a_full_disk(lab: Lab, tmp_path: Path) -> None:
    config, wanted = make_image(lab, tmp_path, 510, BLOCKS)
    cache = tmp_path / "small"
    cache.mkdir()
    with _tmpfs(cache, "256k"):
        for filler in (False, True):
            if filler:
                with (cache / "filler").open("wb") as file, pytest.raises(OSError, match="No space"):
                    file.write(bytes(1 << 20))
            with open_image(config, settings_for(cache)) as image:
                bench.assert_right(image, wanted)
                bench.assert_right(image, wanted)
                assert image.statistics()["uncached_bytes"] > 0
        (cache / "filler").unlink()
        assert_reads_right(config, cache, wanted)


@contextmanager
def _tmpfs(target: Path, size: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True)


@pytest.mark.parametrize("kills", _KILLS)
@pytest.mark.timeout(900)
def test_killed_while_storing(lab: Lab, tmp_path: Path, kills: int) -> None:
    images = [make_image(lab, tmp_path, 600 + number, BLOCKS) for number in range(3)]
    cache = tmp_path / "cache"
    # Too small for all: stores and evictions go on all the time.
    settings = replace(settings_for(cache), cache_quota=2 * BLOCKS * BLOCK // 2, readahead_max=64 << 10)
    configs = {}
    for number, (config, _) in enumerate(images):
        path = tmp_path / f"{number}.json"
        config.save(path)
        configs[600 + number] = str(path)
    chooser = random.Random(kills)
    for _ in range(kills):
        asked = lab.proxy.asked
        reader = subprocess.Popen(
            [sys.executable, "-m", "tests.outage.soaking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert reader.stdin is not None
        reader.stdin.write(json.dumps(asdict(Task(configs, settings.to_json(), 4, 300.0, chooser.randrange(1000)))))
        reader.stdin.close()
        bench.until(lambda asked=asked: lab.proxy.asked >= asked + 12)
        time.sleep(chooser.random() * 0.3)
        reader.send_signal(signal.SIGKILL)
        assert reader.wait(30) == -signal.SIGKILL
        assert reader.stdout is not None
        reader.stdout.close()
    for config, wanted in images:
        with open_image(config, settings) as image:
            bench.assert_right(image, wanted)
            assert image.statistics()["corrupt_units"] == 0, "a sum without its data was left behind"
    used = sum(path.stat().st_blocks * 512 for path in files_of(cache))
    assert used <= settings.cache_quota + (256 << 10)
