"""overlaybd-tcmu and overlaybd-attacher on a kernel with TCMU, as the original's packages run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.image.config import ImageConfig, LowerConfig
from tests.cli.dropin.running import Tools
from tests.layers.golden import GOLDEN
from tests.server.tcmu.test_daemon import mounted, wait_for

pytestmark = pytest.mark.vm

SERVED = Path("/sys/kernel/config/target/core/user_999999999")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tools]:
    """The commands, and a running overlaybd-tcmu with a service configuration."""
    directory = tmp_path_factory.mktemp("tcmu")
    assert main(["install-tools", str(directory / "bin")]) == 0
    made = Tools(directory / "bin", directory)
    service = directory / "overlaybd.json"
    keys = {"logConfig": {"logPath": f"{directory}/tcmu.log"}, "cacheConfig": {"cacheDir": f"{directory}/cache"}}
    service.write_text(json.dumps(keys))
    with (directory / "errors").open("ab") as errors:
        daemon = subprocess.Popen([directory / "bin/overlaybd-tcmu", service], stdout=subprocess.PIPE, stderr=errors)
    assert daemon.stdout is not None
    with daemon.stdout as stream:
        assert stream.readline() == b"obdlab tcmu: ready\n", (directory / "errors").read_text()
    yield made
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(90) == 0


def image(directory: Path, **changes: str) -> Path:
    """Write the configuration of the golden image."""
    lowers = tuple(LowerConfig(file=str(GOLDEN / "ext4" / f"layer{n}.obd")) for n in (1, 2))
    path = directory / "config.v1.json"
    ImageConfig(lowers=lowers, **changes).save(path)
    return path


def test_attach_prints_the_disk_and_detach_removes_it(tools: Tools, tmp_path: Path) -> None:
    config = image(tmp_path, result_file="result")
    printed = tools.ok("overlaybd-attacher", "attach", "--id", "77", "--config", config)
    disk = Path(printed.removesuffix("\n"))
    assert disk.is_block_device()
    assert (tmp_path / "result").read_text() == "success"
    with mounted(disk, tmp_path / "mnt", read_only=True) as target:
        assert os.listdir(target)
    for _ in range(2):  # a device that is gone is no error
        assert tools.ok("overlaybd-attacher", "detach", "--id", "77", "-v") == ""
    assert not (SERVED / "dev_77").exists()


def test_with_devid_the_configuration_names_the_device(tools: Tools, tmp_path: Path) -> None:
    config = image(tmp_path)
    tools.ok("overlaybd-attacher", "attach", "-id", "78", f"--config={config}", "--with-devid", "--verbose")
    names = [path.read_text().strip() for path in Path("/sys/class/uio").glob("*/name")]
    assert f"tcm-user/999999999/dev_78/overlaybd/{config};78" in names
    tools.ok("overlaybd-attacher", "detach", "--id", "78")
    wait_for(lambda: not (SERVED / "dev_78").exists(), "the device stays")


@pytest.mark.timeout(300)
def test_an_image_that_cannot_be_opened_is_reported_after_five_attempts(tools: Tools, tmp_path: Path) -> None:
    config = tmp_path / "config.v1.json"
    ImageConfig(lowers=(LowerConfig(file=str(tmp_path / "missing")),)).save(config)
    done = tools.run("overlaybd-attacher", "attach", "--id", "79", "--config", config)
    assert done.returncode == 1
    assert "failed to attach device after 5 attempts" in done.stderr
    assert "missing" in done.stderr
    assert not (SERVED / "dev_79").exists()
