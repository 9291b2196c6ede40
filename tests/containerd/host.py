"""A real containerd of the tests' own, and stock ctr to speak with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.containerd.client import Containerd
from obdlab.errors import ObdlabError
from obdlab.registry.platform import host_platform

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0
# What no test uses: the optional directory of binaries, and by default the CRI plugin, which takes a second to start.
_NO_OPT, _NO_CRI = "io.containerd.internal.v1.opt", "io.containerd.grpc.v1.cri"


class ContainerdHost:
    """A containerd with root, state, socket, configuration and log below one directory. May be started again."""

    def __init__(self, directory: Path, configuration: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.address = str(directory / "c.sock")
        self.root = directory / "root"
        self.log = directory / "containerd.log"
        self._configuration = directory / "config.toml"
        self._configuration.write_text(configuration)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        """True from :meth:`start` to :meth:`stop`."""
        return self._process is not None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                ["containerd", "--config", str(self._configuration)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "CONTAINERD_DISABLE_PIGZ": "1"},
            )
        wait_until_it_answers(self._process, self.address, self.log)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal and wait for its end. Containers go on."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_TIMEOUT_S)

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
    directory: Path,
    snapshotters: Mapping[str, str] | None = None,
    *,
    cri: str = "",
    sandbox_image: str = "",
    differ: str = "",
    transfers: bool = False,
) -> Iterator[ContainerdHost]:
    """Run containerd below ``directory`` with proxy snapshotters (name: socket), and stop it at the end.

    The ``differ`` on that socket is asked before containerd's own, and is the only one of the transfer service if
    ``transfers``.
    With ``cri`` its CRI plugin runs too, on the snapshotter of that name and with pods on ``sandbox_image``.
    """
    proxies = "".join(
        f'[proxy_plugins.{json.dumps(name)}]\ntype = "snapshot"\naddress = {json.dumps(socket)}\n'
        for name, socket in (snapshotters or {}).items()
    )
    # containerd 2 unpacks what `ctr images pull` and `import` bring only for snapshotters that are named here.
    platform = f"linux/{host_platform().architecture}"
    unpacked = "".join(
        f'[[plugins."io.containerd.transfer.v1.local".unpack_config]]\nplatform = {json.dumps(platform)}\n'
        f"snapshotter = {json.dumps(name)}\n"
        + ('differ = "obdlab-diff"\n' if transfers and name != "overlayfs" else "")
        for name in ("overlayfs", *(snapshotters or {}))
    )
    plugin = unpacked
    if differ:
        plugin += '[plugins."io.containerd.service.v1.diff-service"]\ndefault = ["obdlab-diff", "walking"]\n'
        proxies += f'[proxy_plugins."obdlab-diff"]\ntype = "diff"\naddress = {json.dumps(differ)}\n'
    if cri:  # pods' scores are below 0, which a root without CAP_SYS_RESOURCE may not give
        plugin += f"""[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = {json.dumps(sandbox_image)}
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = {json.dumps(cri)}
disable_snapshot_annotations = false
"""
    configuration = f"""version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = {json.dumps([_NO_OPT] if cri else [_NO_OPT, _NO_CRI])}
[grpc]
address = "{directory}/c.sock"
[debug]
level = "debug"
[plugins."io.containerd.gc.v1.scheduler"]
startup_delay = "1ms"
mutation_threshold = 1
{plugin}{proxies}"""
    host = ContainerdHost(directory, configuration)
    try:
        host.start()
        yield host
    finally:
        host.stop()


def wait_until_it_answers(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
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
