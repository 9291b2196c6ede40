"""overlaybd-resize: the disk of a writable layer and its ext4, detached or in use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.layers.stack import WritableStack
from obdlab.layers.upper import open_upper
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.volumes.ext4.volume import Volume
from tests.cli.dropin.running import Tools
from tests.layers.golden import GOLDEN

pytestmark = pytest.mark.kernel

GIB = 1 << 30


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Directories of the test's own."""
    places = {"OBDLAB_RUN_DIR": str(tmp_path / "run"), "OBDLAB_CACHE_DIR": str(tmp_path / "cache")}
    yield places
    DeviceService(tmp_path / "run", Settings(cache_dir=tmp_path / "cache")).shutdown(force=True)


def sizes(tools: Tools) -> tuple[int, int]:
    """Return the sizes of the disk and of its ext4."""
    with WritableStack(None, open_upper(tools.cwd / "0.data", tools.cwd / "0.index")) as disk:
        return disk.size, Volume(disk).superblock.blocks * 4096


@pytest.mark.parametrize("kind", ["append", "sparse"])
def test_disk_and_file_system_grow(kind: str, tools: Tools, environment: dict[str, str]) -> None:
    tools.ok("overlaybd-create", *(["-s"] if kind == "sparse" else []), "--mkfs", "0.data", "0.index", "1")
    config = tools.config(upper="0")
    tools.ok("overlaybd-apply", GOLDEN / "ext4" / "layer1.tar", config)
    words = ["--config", config, "--size", "2", "--verbose", "--service_config_path", tools.service()]
    printed = tools.ok("overlaybd-resize", *words, **environment)
    assert re.fullmatch(r"Success: filesystem resized to 2 GB \(\d+\.\d{3} seconds\)\n", printed)
    assert sizes(tools) == (2 * GIB, 2 * GIB)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--size", "1"), "smaller|shrink"),
        (("--size", "0"), "invalid size: 0"),
        (("--size", "many"), "invalid size: many"),
        (("--size", "-3"), "invalid size: -3"),
    ],
)
def test_other_sizes_are_refused(
    words: tuple[str, str], text: str, tools: Tools, environment: dict[str, str]
) -> None:
    tools.ok("overlaybd-create", "--mkfs", "0.data", "0.index", "2")
    config = tools.config(upper="0")
    before = (tools.cwd / "0.data").read_bytes()[:4096]
    done = tools.run("overlaybd-resize", "--config", config, f"{words[0]}={words[1]}", **environment)
    assert done.returncode == 1
    assert re.search(text, done.stderr)
    assert (tools.cwd / "0.data").read_bytes()[:4096] == before


def test_a_configuration_without_a_writable_layer_is_refused(tools: Tools, environment: dict[str, str]) -> None:
    config = tools.config("c.json", {"file": str(GOLDEN / "ext4" / "layer1.obd")})
    done = tools.run("overlaybd-resize", "--config", config, "--size", "2", **environment)
    assert (done.returncode, "no writable layer" in done.stderr) == (1, True)
