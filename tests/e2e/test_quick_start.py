"""The page ``docs/tutorial/run-containers.md``, followed to the letter: every command, and what it prints.

Only places differ (directories and the registry's port are the test's own), and the image, which on the page comes
from Docker Hub. Packages are installed here already, and there is no systemd.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests import capabilities
from tests.containerd.host import wait_until_it_answers
from tests.e2e.images import busybox_layer, push_plain
from tests.e2e.running import wait_for
from tests.snapshotter import imagefiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.registry.server import RegistryServer

pytestmark = [pytest.mark.containerd, pytest.mark.registry]

PAGE = Path(__file__).parents[2] / "docs" / "tutorial" / "run-containers.md"
#: What the machine has done already, or does by other means.
ELSEWHERE = ("apt-get install containerd docker-registry", "systemctl start docker-registry")
RESTART = "systemctl restart containerd"
KILL = "kill %1"
_TIMEOUT_S = 120


def steps(page: str) -> Iterator[tuple[str, list[str]]]:
    """Give each command of the page's console blocks and the lines that it is said to print."""
    command, printed, ends = "", list[str](), ""
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        for line in block.splitlines():
            if ends:
                command += f"\n{line}"
                ends = "" if line == ends else ends
            elif line.startswith("# "):
                if command:
                    yield command, printed
                command, printed = line.removeprefix("# "), []
                here = re.search(r"<<'(\w+)'", command)
                ends = here[1] if here else ""
            else:
                printed.append(line)
    yield command, printed


def agrees(printed: list[str], page: list[str]) -> bool:
    """Return True if the lines are those of the page, but for numbers, digests, blanks and what "..." stands for."""
    pattern = "\n".join(".*?" if line == "..." else _pattern(line) for line in page)
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in printed), re.DOTALL) is not None


def _pattern(line: str) -> str:
    words = []
    for word in line.split():
        free = re.sub(r"sha256:[0-9a-f]+", "\0", word)
        free = re.sub(r"\b[0-9a-f]{8}-\d", "\1", free)
        free = re.sub(r"\d+(\.\d+)*", "\2", free)
        text = re.escape(free).replace("\0", "sha256:[0-9a-f]+").replace("\1", "[0-9a-f]{8}-[0-9]+")
        words.append(text.replace("\2", r"[0-9]+(?:\.[0-9]+)*"))
    return r"[ \t]*" + r"[ \t]+".join(words)


def test_how_lines_are_compared() -> None:
    page = ["all   1.0 MB  sha256:ab", "...", "end 3"]
    assert agrees(["all 22.5 MB sha256:0123", "x", "y", "end 4"], page)
    assert not agrees(["all 22.5 GB sha256:0123", "x", "end 4"], page)
    assert not agrees(["all 22.5 MB sha256:0123", "x"], page)
    assert [command for command, _ in steps("```console\n# a <<'E'\nb\nE\n# c\nd\n```\n")] == ["a <<'E'\nb\nE", "c"]


class Machine:
    """Runs the page's commands, with the test's places in place of the system's."""

    def __init__(self, directory: Path, places: dict[str, str]) -> None:
        self.directory = directory
        self.places = places
        self.socket = directory / "containerd.sock"
        self.background: list[subprocess.Popen[str]] = []
        self.containerd: subprocess.Popen[bytes] | None = None
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CONTAINERD_ADDRESS": str(self.socket),
            "OBDLAB_RUN_DIR": places["/run/obdlab"],
            "OBDLAB_CACHE_DIR": f"{places['/var/lib/obdlab']}/cache",
            "OBDLAB_CONVERT_DATABASE": "none",
        }

    def own(self, text: str) -> str:
        for known, ours in self.places.items():
            text = text.replace(known, ours)
        return text

    def run(self, command: str) -> list[str]:
        if command == RESTART:
            self.start_containerd()
            return []
        if command == KILL:
            with self.background.pop() as process:
                process.send_signal(signal.SIGTERM)
                assert process.wait(_TIMEOUT_S) == 0
            return []
        if command.endswith(" &"):
            return [self.start(self.own(command.removesuffix(" &")))]
        done = subprocess.run(
            ["bash", "-c", self.own(command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
            cwd=self.directory,
            timeout=_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0 or command == "obdlab doctor", f"{command}: {done.stdout}"
        return done.stdout.splitlines()

    def start(self, command: str) -> str:
        log = (self.directory / "snapshotter.log").open("wb")
        with log:
            process = subprocess.Popen(
                command.split(), stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment
            )
        self.background.append(process)
        assert process.stdout is not None
        return process.stdout.readline().rstrip("\n")

    def start_containerd(self) -> None:
        config = f"{self.places['/etc/containerd']}/config.toml"
        places = {"--root": "root", "--state": "state", "--address": "containerd.sock"}
        command = ["containerd", "--config", config]
        for option, name in places.items():
            command += [option, str(self.directory / name)]
        log = self.directory / "containerd.log"
        with log.open("wb") as output:
            self.containerd = subprocess.Popen(command, stdout=output, stderr=output, env=self.environment)
        wait_until_it_answers(self.containerd, str(self.socket), log)

    def end(self) -> None:
        for process in [*self.background, *([self.containerd] if self.containerd else [])]:
            with process:
                process.terminate()
                process.wait(_TIMEOUT_S)
        for entry in reversed(mount.mounts()):
            if self.directory in entry.mountpoint.parents:
                mount.unmount(entry.mountpoint, lazy=True)
        clean_up(DeviceService(Path(self.places["/run/obdlab"]), Settings()), force=True)


def test_the_page(registry_server: RegistryServer, tmp_path: Path) -> None:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    plain = push_plain(registry_server.host, "library/busybox", [busybox_layer()])
    places = {path: str(tmp_path / path[1:]) for path in ("/etc/containerd", "/var/lib/obdlab", "/run/obdlab")}
    places |= {"docker.io/library/busybox:stable": plain, "127.0.0.1:5000": registry_server.host}
    machine = Machine(tmp_path, places)
    done = []
    try:
        for command, page in steps(PAGE.read_text()):
            if command in ELSEWHERE:
                continue
            printed = machine.run(command)
            wanted = [machine.own(line) for line in page]
            assert agrees(printed, wanted), "\n".join([command, "--- printed:", *printed, "--- page:", *wanted])
            done.append(command.split()[0])
            if command.startswith("ctr images rm"):
                wait_for(lambda: not machine.run("obdlab device list"))
    finally:
        machine.end()
    assert {"obdlab", "ctr", "cat", "kill", "systemctl"} <= set(done)
    assert len(done) >= 14
