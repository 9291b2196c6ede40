"""A real containerd of the tests' own, and stock ctr to speak with it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.containerd.client import Containerd
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class ContainerdHost:
    """A running containerd."""

    address: str
    root: Path
    log: Path
    pid: int

    def ctr(self, *arguments: str, timeout_s: float = 60.0, check: bool = True) -> str:
        """Run stock ctr against it and return what it printed."""
        done = subprocess.run(
            ["ctr", "--address", self.address, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"ctr {arguments}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr


@contextmanager
def running_containerd(
    directory: Path, snapshotters: Mapping[str, str] | None = None, *, cri: str = ""
) -> Iterator[ContainerdHost]:
    """Run containerd below ``directory`` with proxy snapshotters (name: socket), and stop it at the end.

    With ``cri`` its CRI plugin runs too, on the snapshotter of that name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    address = directory / "c.sock"
    proxies = "".join(
        f'[proxy_plugins.{json.dumps(name)}]\ntype = "snapshot"\naddress = {json.dumps(socket)}\n'
        for name, socket in (snapshotters or {}).items()
    )
    disabled = ["io.containerd.internal.v1.opt"]
    plugin = ""
    if cri:
        plugin = (
            '[plugins."io.containerd.grpc.v1.cri".containerd]\n'
            f"snapshotter = {json.dumps(cri)}\ndisable_snapshot_annotations = false\n"
        )
    else:
        disabled.append("io.containerd.grpc.v1.cri")
    configuration = directory / "config.toml"
    configuration.write_text(
        f"""version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = {json.dumps(disabled)}
[grpc]
address = "{address}"
[debug]
level = "debug"
[plugins."io.containerd.gc.v1.scheduler"]
startup_delay = "1ms"
mutation_threshold = 1
{plugin}{proxies}"""
    )
    log = directory / "containerd.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["containerd", "--config", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "CONTAINERD_DISABLE_PIGZ": "1"},
        )
    try:
        _wait_until_it_answers(process, str(address), log)
        yield ContainerdHost(str(address), directory / "root", log, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_TIMEOUT_S)


def _wait_until_it_answers(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with Containerd(address, timeout_s=2.0) as client:
                client.version()
        except ObdlabError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"containerd does not start: {log.read_text(errors='replace')[-2000:]}")
