"""A virtual machine whose disk is an image, served by ``obdlab serve nbd``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from obdlab.image.config import ImageConfig
from obdlab.image.open import open_image
from obdlab.settings.settings import Settings
from tests.capabilities import require
from tests.contrib.nbd.test_serving import served
from tests.server.test_live import new_config
from tests.vm import machine

MIB = 1 << 20
SCRIPT = """
set -e
mkdir -p /tmp/m
mkfs.ext4 -q /dev/vda
mount /dev/vda /tmp/m
cp "$0" /tmp/m/file
sync
fstrim /tmp/m
umount /tmp/m
e2fsck -f -n /dev/vda
mount -o ro /dev/vda /tmp/m
cmp "$0" /tmp/m/file
umount /tmp/m
echo done with it
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_machine_makes_its_file_system_on_an_image(tmp_path: Path) -> None:
    require("vm")
    config = new_config(tmp_path, "append", size=64 * MIB)
    content = tmp_path / "content"
    content.write_bytes(random.Random(3).randbytes(3 * MIB))
    sock = tmp_path / "nbd.sock"
    with served(tmp_path, config, "--socket", sock):
        drive = f"file.driver=nbd,file.server.type=unix,file.server.path={sock},format=raw,discard=unmap"
        command = ["sh", "-c", SCRIPT, str(content)]
        done = machine.run(command, modules=["virtio_blk", "ext4"], drives=[drive], timeout_s=1000)
    assert (done.status, done.output.splitlines()[-1]) == (0, "done with it"), done.output
    with open_image(ImageConfig.load(config), Settings()) as image:
        assert content.read_bytes()[:4096] in image.read_at(0, image.size)
