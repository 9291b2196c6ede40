"""overlaybd-apply: the original's layers, applied again, hold what the original's hold."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import threading
from contextlib import closing
from pathlib import Path

import pytest

import obdlab
from obdlab.convert.compare.listing import list_volume
from obdlab.layerfiles.description import describe_stack
from obdlab.layers.rawfile import RawFile
from obdlab.volumes.ext4.volume import Volume
from tests.cli.dropin.running import Tools
from tests.convert import goldens
from tests.convert.goldens import GOLDEN, golden_view
from tests.volumes.ext4.disk import fsck

UUIDS = [f"{digit * 8}-{digit * 4}-4{digit * 3}-8{digit * 3}-{digit * 12}" for digit in "12"]


def wanted_view(depth: int) -> dict[str, list[object]]:
    """Return what the original's layers hold but for lost+found, which obdlab's ext4 does not have."""
    wanted = goldens.wanted_view(depth)
    del wanted["lost+found"]
    return wanted


def built(tools: Tools, number: int, tar: Path, *lowers: Path, words: tuple[str, ...] = ()) -> Path:
    """Make one layer as the original's convertor does: create, apply, commit."""
    first = number == 0
    size = "1" if first else "0"
    tools.ok("overlaybd-create", "-s", *(["--mkfs"] if first else []), f"{number}.data", f"{number}.index", size)
    config = tools.config(f"{number}.json", *({"file": str(lower)} for lower in lowers), upper=str(number))
    assert tools.ok("overlaybd-apply", tar, config, *words) == "overlaybd-apply done\n"
    layer = tools.cwd / f"{number}.obd"
    names = ["--uuid", UUIDS[number], *(["--parent-uuid", UUIDS[number - 1]] if number else [])]
    tools.ok("overlaybd-commit", "-z", "-t", *names, f"{number}.data", f"{number}.index", layer)
    return layer


def test_the_convertors_calls_make_the_originals_image(tools: Tools) -> None:
    first = built(tools, 0, GOLDEN / "layer1.tar")
    second = built(tools, 1, GOLDEN / "layer2.tar", first)
    for depth, layers in ((1, [first]), (2, [first, second])):
        with obdlab.open_stack(layers) as disk:
            assert golden_view(list_volume(Volume(disk))) == wanted_view(depth)
    assert describe_stack([first, second]).broken_parent_links == ()


@pytest.mark.parametrize("how", ["gzip", "pipe"])
def test_a_layer_may_be_compressed_or_come_through_a_pipe(tools: Tools, how: str) -> None:
    tar, path = (GOLDEN / "layer1.tar").read_bytes(), tools.cwd / "layer"
    if how == "gzip":
        path.write_bytes(gzip.compress(tar))
        layer = built(tools, 0, path)
    else:
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_bytes, args=(tar,), daemon=True)
        writer.start()
        layer = built(tools, 0, path)
        writer.join(60)
    with obdlab.open_stack([layer]) as disk:
        assert golden_view(list_volume(Volume(disk))) == wanted_view(1)


def test_mkfs_of_apply_and_a_raw_disk(tools: Tools) -> None:
    tools.ok("overlaybd-create", "--raw", "disk", "none", "1")
    words = ("--raw", "--mkfs", "--verbose", "--service_config_path", tools.service())
    tools.ok("overlaybd-apply", *words, GOLDEN / "layer1.tar", "disk")
    with closing(RawFile(tools.cwd / "disk")) as disk:
        assert golden_view(list_volume(Volume(disk))) == wanted_view(1)
    assert fsck(tools.cwd / "disk") == ""


def test_the_checksum_is_checked_and_printed(tools: Tools) -> None:
    digest = f"sha256:{hashlib.sha256((GOLDEN / 'layer1.tar').read_bytes()).hexdigest()}"
    for number, (given, status) in enumerate(((digest, 0), (f"sha256:{'0' * 64}", 255))):
        tools.ok("overlaybd-create", "--mkfs", f"{number}.data", f"{number}.index", "1")
        config = tools.config("c.json", upper=str(number))
        done = tools.run("overlaybd-apply", "--checksum", given, GOLDEN / "layer1.tar", config)
        assert done.returncode == status
        assert (done.stdout == "overlaybd-apply done\n") is (status == 0)
        assert (digest if status == 0 else "sha256:0000") in done.stderr


@pytest.mark.parametrize("missing", ["upper", "file system", "tar"])
def test_a_configuration_or_layer_that_cannot_be_applied_is_refused(tools: Tools, missing: str) -> None:
    tools.ok("overlaybd-create", *([] if missing == "file system" else ["--mkfs"]), "0.data", "0.index", "1")
    config = tools.config(upper="0")
    if missing == "upper":
        config.write_text(json.dumps({"lowers": [{"file": str(GOLDEN / "layer1.obd")}]}))
    layer = tools.cwd / "layer"
    layer.write_bytes(b"no tar" * 1000 if missing == "tar" else (GOLDEN / "layer1.tar").read_bytes())
    done = tools.run("overlaybd-apply", layer, config)
    assert done.returncode == 255
    assert done.stdout == ""
    wanted = {"upper": "no writable layer", "file system": "no file system that can be written", "tar": "layer"}
    assert wanted[missing] in done.stderr
