"""Opening a remote image: how many requests one after another."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.open import open_image, open_stack
from obdlab.layerfiles.description import describe
from obdlab.layerfiles.writing import Packing, write_layer
from obdlab.layers.append import AppendUpper
from obdlab.layers.ends import guessed_end
from obdlab.settings.settings import Settings
from tests.layers.golden import GOLDEN, LSMT
from tests.registry.faulty import Answer, FaultyRegistry, faulty_registry

SIZE = 256 << 20
UNIT = Settings().cache_unit
# Much longer than a thread that could ask at once may need to do so on a loaded machine.
ANSWER_S = 1.0


@dataclass
class Rounds:
    """When each request for a blob was answered, as its sender may have seen it."""

    spans: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, answer: Answer) -> None:
        begin = time.monotonic()
        time.sleep(ANSWER_S)
        with self.lock:
            self.spans[answer.handler.path].append((begin, time.monotonic()))
        answer.send()

    def depth(self, path: str) -> int:
        """Return the length of the longest chain of requests each of which came after the one before it was over."""
        deepest: list[tuple[float, int]] = []
        for begin, end in sorted(self.spans[path], key=lambda span: span[1]):
            before = max((depth for other, depth in deepest if other <= begin), default=0)
            deepest.append((end, before + 1))
        return max(depth for _, depth in deepest)


def layer(directory: Path, kind: str, number: int) -> bytes:
    """Return a layer file with a large index; perhaps compressed so well that its block table is as large."""
    directory = directory / f"{kind}{number}"
    directory.mkdir()
    with AppendUpper.create(directory / "data", directory / "index", SIZE) as upper:
        for at in range(15_000):
            upper.write_at((at * 3 + at % 2) * 1024, bytes([at * 7 % 251, number]) * 256)
        if kind == "table":
            for at in range(64 << 20, 128 << 20, 1 << 20):
                upper.write_at(at, bytes([at >> 20, number]) * (1 << 19))
        path = directory / "layer.obd"
        write_layer(upper, path, Packing("lz4", 4096, bool(number % 2), rewrite_header=bool(number % 3)))
    return path.read_bytes()


@pytest.mark.parametrize("cold", ["large indexes", "small"])
def test_twenty_layers_are_opened_by_two_rounds_of_requests(tmp_path: Path, cold: str) -> None:
    small = [path.read_bytes() for path in (LSMT / "l1.lz4tar.lsmt", LSMT / "l2.lz4.lsmt", LSMT / "c1.empty.lsmt")]
    large = [(GOLDEN / "ext4" / name).read_bytes() for name in ("layer1.obd", "layer2.obd")]
    made = [layer(tmp_path, kind, number) for kind in ("index", "table") for number in range(4)]
    files = (made + large) * 2 if cold == "large indexes" else (small + large) * 4
    with faulty_registry() as registry:
        config = image_of(registry, files)
        assert len(config.lowers) == 20
        rounds = Rounds()
        registry.always(rounds)
        with open_image(config, Settings(cache_dir=tmp_path / "cache")) as image:
            depths = {path: rounds.depth(path) for path in rounds.spans}
            assert len(depths) == len(set(files))
            assert max(depths.values()) <= (2 if cold == "large indexes" else 1), depths
            asked = image.statistics()
            assert asked["requests"] <= 3 * len(depths)
        registry.always(None)
        paths = []
        for number, file in enumerate(files):
            paths.append(tmp_path / f"{number}.obd")
            paths[-1].write_bytes(file)
        with open_stack(paths) as wanted, open_image(config, Settings(cache_dir=tmp_path / "cache")) as image:
            for at in range(0, SIZE, 16 << 20):
                assert image.read_at(at, 1 << 20) == wanted.read_at(at, 1 << 20)


def image_of(registry: FaultyRegistry, files: list[bytes]) -> ImageConfig:
    lowers = tuple(LowerConfig(digest=registry.add_blob(file), size=len(file)) for file in files)
    return ImageConfig(repo_blob_url=registry.repository().blobs_url, lowers=lowers)


def test_the_made_layers_are_what_they_are_for(tmp_path: Path) -> None:
    for kind in ("index", "table"):
        file = layer(tmp_path, kind, 0)
        (tmp_path / kind).write_bytes(file)
        facts = describe(tmp_path / kind)
        assert facts.zfile is not None
        table = len(file) - facts.zfile.index_offset
        if kind == "table":  # which the guess does not reach, even from the unit's beginning
            assert table > guessed_end(len(file))
            assert facts.zfile.index_offset < (len(file) - guessed_end(len(file))) // UNIT * UNIT
        else:
            assert facts.layer is not None
            assert facts.layer.segments * 16 > 200_000
            assert table < guessed_end(len(file))


@pytest.mark.parametrize("block_size", [4096, 16384, 32768])
def test_of_layers_with_small_indexes_little_is_fetched(tmp_path: Path, block_size: int) -> None:
    files = []
    for number in range(4):
        directory = tmp_path / str(number)
        directory.mkdir()
        with AppendUpper.create(directory / "data", directory / "index", SIZE) as upper:
            upper.write_at(number << 20, random.Random(number).randbytes((1 << 20) + 4096 * number))
            write_layer(upper, directory / "layer.obd", Packing("zstd", block_size, tar=True))
        files.append((directory / "layer.obd").read_bytes())
    with faulty_registry() as registry:
        config = image_of(registry, files)
        with open_image(config, Settings(cache_dir=tmp_path / "cache")) as image:
            asked = image.statistics()
            # The beginning, the guess, what rounding to units adds, and a block that was not guessed.
            assert asked["demand_bytes"] <= len(files) * ((32 << 10) + guessed_end(1 << 20) + 2 * UNIT + block_size)
            assert asked["requests"] <= 3 * len(files)
            assert image.read_at(2 << 20, 1 << 20) == random.Random(2).randbytes((1 << 20) + 8192)[: 1 << 20]
