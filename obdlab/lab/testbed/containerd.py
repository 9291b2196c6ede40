"""The experiment's own containerd, with obdlab's snapshotter as proxy plugin: started, used, and removed.

Its configuration declares other proxy snapshotters from the start, but they run only inside
:meth:`OwnContainerd.serving`: an idle one would use link, processor and memory.
It shares only ``/run/containerd/{s,fifo,runc}`` with other containerds. Shims keep sockets and state there by
namespace and container name, so each experiment uses its own containerd namespace.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from obdlab.closing import Closing
from obdlab.containerd.client import Containerd
from obdlab.containerd.errors import UnavailableError
from obdlab.errors import ObdlabError
from obdlab.lab.testbed.cgroups import ControlGroups
from obdlab.lab.testbed.events import EventMonitor
from obdlab.lab.testbed.ownership import DEFAULT_STATE_DIR, Record
from obdlab.lab.testbed.probe import wait_for_line
from obdlab.lab.testbed.process import Daemon, LabError, run, wait_until
from obdlab.lab.testbed.residency import occupied_below
from obdlab.lab.testbed.startedcontainer import RunningContainer, StartTimes, remove_container
from obdlab.lab.testbed.takedown import remove_runtime_state, unmount_below
from obdlab.server.client import DeviceService
from obdlab.server.rundir import PULL_SOCKET_NAME, host_process
from obdlab.settings.settings import Settings
from obdlab.system.processes import children_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from obdlab.lab.images.recipe import Probe

LAZY_SNAPSHOTTER = "obdlab"
#: Settings of measured hosts: besides what a start asks for, nothing is fetched or unpacked unless an arm says so.
MEASURED = Settings(completion=False)
_CONNECT_S = 60.0
_COMPLETE_S = 600.0
# If unpigz is installed, containerd unpacks layers with it on another core; hosts could not be compared then, unless
# all measure with it.
_NO_PIGZ = {"CONTAINERD_DISABLE_PIGZ": "1"}


class OwnContainerd(Closing):
    """containerd and obdlab's snapshotter below ``directory``; a context manager that leaves only logs behind.

    ``directory`` holds the content store, snapshots, the block cache (``cache``) and ``logs``; sockets and mounts are
    below ``state_dir``. ``proxies`` are the names of other snapshotters that :meth:`serving` can run. ``settings``
    are those of obdlab; the host's own settings are not used. With ``always_lazy`` obdlab's snapshotter runs from the
    beginning, else only inside :meth:`serving_lazy`, as the others do. ``certificate`` is one that all clients and
    daemons trust. ``unpigz``: containerd unpacks with it.
    """

    def __init__(
        self,
        directory: Path,
        state_dir: Path = DEFAULT_STATE_DIR,
        proxies: Sequence[str] = (),
        settings: Settings | None = None,
        *,
        always_lazy: bool = True,
        certificate: Path | None = None,
        unpigz: bool = False,
    ) -> None:
        self.directory = directory
        self.cache_dir = directory / "cache"
        self.files_dir = directory / "files"
        self.root = directory / "containerd"
        self.snapshotter_root = directory / "snapshotter"
        self.logs = directory / "logs"
        self._state_dir = state_dir
        self._proxies = tuple(proxies)
        self._settings = replace(settings or MEASURED, cache_dir=self.cache_dir)
        self._served: dict[str, Path] = {}
        self._always_lazy, self.unpigz = always_lazy, unpigz
        # Go's programs and OpenSSL both read the certificates that they trust from this file.
        self._trust = {} if certificate is None else {"SSL_CERT_FILE": str(certificate)}
        self._stack = ExitStack()
        self._containerd = ExitStack()
        self._running: list[RunningContainer] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for path in (self._state_dir, self.logs, self.cache_dir, self.files_dir):
                path.mkdir(parents=True, exist_ok=True)
            self.state = self._state_dir / f"ctd-{secrets.token_hex(4)}"
            self.state.mkdir()
            record = Record(
                self._state_dir,
                "containerd",
                self.state.name,
                state=str(self.state),
                roots=[str(path) for path in self._roots],
            )
            stack.callback(record.remove)
            stack.callback(self._remove_directories)
            self.groups = ControlGroups(self.namespace)
            stack.callback(self.groups.remove)
            self.groups.create()
            self.devices = DeviceService(self.state / "run", self._settings)
            stack.callback(self.devices.shutdown, force=True)
            if self._always_lazy:
                self._start_snapshotter(stack)
            stack.callback(lambda: self._containerd.close())
            self._start_containerd()
            stack.callback(self.remove_everything)
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """Remove containers and images, stop both daemons, unmount, delete all but logs. Idempotent."""
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that all daemons and clients get: the trusted certificate, and whether unpigz unpacks."""
        return {**self._trust, **({} if self.unpigz else _NO_PIGZ)}

    @property
    def address(self) -> Path:
        """The path of containerd's socket."""
        return self.state / "containerd.sock"

    @property
    def namespace(self) -> str:
        """The containerd namespace of the experiment."""
        return self.state.name

    @property
    def snapshotters(self) -> tuple[str, ...]:
        """The names of the snapshotters that run now."""
        return tuple(self.layer_directories)

    @property
    def layer_directories(self) -> dict[str, Path]:
        """The directories of layer data on disk by snapshotter, for those that run now."""
        snapshots = self.root / "io.containerd.snapshotter.v1.overlayfs" / "snapshots"
        always = {LAZY_SNAPSHOTTER: self.cache_dir} if self._always_lazy else {}
        return {"overlayfs": snapshots, **always, **self._served}

    def disk_bytes(self) -> int:
        """Return the bytes on disk of containerd, the snapshotters and the block cache."""
        return occupied_below([*self._roots, self.cache_dir])

    @property
    def _roots(self) -> list[Path]:
        return [self.root, self.snapshotter_root, self.files_dir, *(self.proxy_root(name) for name in self._proxies)]

    def proxy_socket(self, name: str) -> Path:
        """Return the socket at which containerd looks for the snapshotter ``name``."""
        return self.state / f"{name}.sock"

    def proxy_root(self, name: str) -> Path:
        """Return the directory for all files of the snapshotter ``name``."""
        return self.directory / name

    @contextmanager
    def serving(
        self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> Iterator[None]:
        """Run the daemon of the snapshotter ``name`` at its socket; afterwards stop it and remove its files.

        Raises LabError with the daemon's last output if it ends or does not serve in time.
        """
        socket, root = self.proxy_socket(name), self.proxy_root(name)
        root.mkdir(parents=True, exist_ok=True)
        daemon = Daemon(name, command, self.logs / f"{name}.log", {**self.environment, **(environment or {})})
        try:
            self.groups.add(daemon.pid)
            daemon.wait_for(socket.exists, "socket")
            daemon.wait_for(lambda: self._reaches(name), "connection from containerd")
            self._served[name] = root
            yield
        finally:
            self._served.pop(name, None)
            daemon.stop()
            socket.unlink(missing_ok=True)
            unmount_below([root])
            shutil.rmtree(root, ignore_errors=True)

    @contextmanager
    def unpacking_by_unpigz(self) -> Iterator[None]:
        """Start containerd again as one that unpacks by unpigz, and without afterwards; neither start is timed.

        containerd looks for unpigz once in its life. Raises LabError.
        """
        if self.unpigz:
            yield
            return
        self._start_again(unpigz=True)
        try:
            yield
        finally:
            self._start_again(unpigz=False)

    @contextmanager
    def serving_lazy(self) -> Iterator[None]:
        """Run obdlab's snapshotter and device host, both fresh, and stop them afterwards. Their start is not timed.

        With ``always_lazy`` they run already, and go on. Raises LabError.
        """
        if self._always_lazy:
            yield
            return
        with ExitStack() as stack:
            # A recorded start at publication may have left a device host.
            self.devices.shutdown(force=True)
            stack.callback(self.devices.shutdown, force=True)
            self._start_snapshotter(stack)
            wait_until(lambda: self._reaches(LAZY_SNAPSHOTTER), "connection from containerd", _CONNECT_S)
            self._served[LAZY_SNAPSHOTTER] = self.cache_dir
            stack.callback(self._served.pop, LAZY_SNAPSHOTTER)
            yield

    # containerd connects again only after some seconds, and answers some calls from its database alone: only a call
    # that reaches the daemon proves the connection.
    def _reaches(self, name: str) -> bool:
        key = f"reach-{secrets.token_hex(4)}"
        with self.client() as client:
            snapshots = client.snapshots(name)
            try:
                snapshots.prepare(key, "")
            except UnavailableError:
                time.sleep(0.1)
                return False
            snapshots.remove(key)
        return True

    @property
    def ctr(self) -> tuple[str, ...]:
        """The first words of a ``ctr`` command for this containerd and namespace."""
        return ("ctr", "--address", str(self.address), "--namespace", self.namespace)

    def client(self) -> Containerd:
        """Return a new client of this containerd; the caller closes it."""
        return Containerd(str(self.address), self.namespace)

    def pull(self, reference: str, snapshotter: str = "overlayfs", timeout_s: float = 600.0) -> None:
        """Pull everything and unpack it, as ``ctr images pull`` does. Raises LabError."""
        options = (*self.plain_http(reference), "--snapshotter", snapshotter)
        run([*self.ctr, "images", "pull", *options, reference], timeout_s=timeout_s, environment=self.environment)

    def lazy_pull(self, reference: str, timeout_s: float = 600.0) -> None:
        """Pull metadata only, by the process ``obdlab image pull``, as its users do. Raises LabError."""
        options = ["--address", str(self.address), "--namespace", self.namespace, "--snapshotter", LAZY_SNAPSHOTTER]
        words = [sys.executable, "-m", "obdlab", "image", "pull", "--quiet", *options, reference]
        # The host's own settings are not used, and the snapshotter's ready process is that of this testbed.
        settings = {
            **self.environment,
            "OBDLAB_SETTINGS": str(self._settings_file),
            "OBDLAB_RUN_DIR": str(self.state / "run"),
        }
        run(words, timeout_s=timeout_s, environment=settings)

    def complete(self, config: Path, device_id: str) -> None:
        """Fetch an image whole and unpack it at once, by a device that is gone afterwards. Raises LabError."""
        settings = replace(
            self._settings,
            download_enabled=True,
            download_delay_s=0.0,
            download_delay_extra_s=0.0,
            download_bytes_per_s=0.0,
            graduation=True,
        )
        service = DeviceService(self.devices.run_dir.path, settings)
        service.attach(config, device_id)
        try:
            wait_until(lambda: _graduated(service, device_id), f"unpacked disk of {config}", _COMPLETE_S, 0.1)
        finally:
            service.detach(device_id)

    def plain_http(self, reference: str) -> tuple[str, ...]:
        """Return the option of ``ctr`` for a reference to the registry without TLS, or nothing."""
        return ("--plain-http",) if reference.startswith("127.") else ()

    @property
    def _settings_file(self) -> Path:
        return self.state / "obdlab.json"

    def start(self, reference: str, name: str, snapshotter: str, probe: Probe) -> RunningContainer:
        """Run a container with ``ctr run`` and return once it is ready.

        Raises LabError with the container's last output if it cannot be started, ends, or is not ready in time; the
        container is removed then.
        """
        words = ["--snapshotter", snapshotter, reference, name]
        return self.start_with(words, probe.command, name, probe, f"{reference} on {snapshotter}", time.time())

    def start_with(
        self, words: Sequence[str], command: Sequence[str], name: str, probe: Probe, what: str, requested_s: float
    ) -> RunningContainer:
        """Run ``ctr run WORDS COMMAND``; the start began at ``requested_s``, ``what`` names it in errors."""
        self.groups.prepare_container(name)
        child = subprocess.Popen(
            [*self.ctr, "run", *words, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **self.environment},
        )
        container = RunningContainer(self.ctr, name, child)
        self._running.append(container)
        try:
            assert child.stdout is not None
            ready_s = wait_for_line(child.stdout.fileno(), probe, what)
            stamps = [self._events.wait_for(topic, key, name).time_s for topic, key in _STAGES]
        except BaseException:
            container.remove()
            raise
        container.times = StartTimes(requested_s, stamps[0], stamps[1], stamps[2], ready_s)
        return container

    def remove_image(self, reference: str, timeout_s: float = 30.0) -> None:
        """Remove an image with its snapshots and content. Raises LabError if some of it is still in use."""
        with self.client() as client:
            with suppress(ObdlabError):  # the image is missing: only wait for its snapshots and content
                client.images.delete(reference, sync=True)
            if not client.images.list():
                wait_until(lambda: not self.leftovers(client), "removal of snapshots and content", timeout_s, 0.02)

    def leftovers(self, client: Containerd) -> list[str]:
        """Return the present snapshots and content in words."""
        found = [f"content {info.digest}" for info in client.content.list()]
        for snapshotter in self.snapshotters:
            found += [f"{snapshotter} snapshot {info.name}" for info in client.snapshots(snapshotter).list()]
        return found

    def facts(self) -> dict[str, Any]:
        """Return the facts about containerd that the rows' environment records."""
        with self.client() as client:
            version = client.version()
        return {
            "containerd_version": version.version,
            "unpigz": self.unpigz,
            "cri": False,
            "pull_client": "ctr images pull",
            "lazy_pull_client": "obdlab image pull",
            "daemons": "running" if self._always_lazy else "fresh for each cell",
            "tls": "SSL_CERT_FILE" in self.environment,
        }

    def _start_snapshotter(self, stack: ExitStack) -> None:
        socket = self.proxy_socket(LAZY_SNAPSHOTTER)
        arguments = ["--root", str(self.snapshotter_root), "--address", str(socket)]
        self._settings_file.write_text(self._settings.to_json())
        arguments += ["--run-dir", str(self.state / "run"), "--cache-dir", str(self.cache_dir)]
        arguments += ["--settings", str(self._settings_file)]
        command = [sys.executable, "-m", "obdlab", "-v", "serve", "snapshotter", *arguments]
        snapshotter = Daemon("obdlab serve snapshotter", command, self.logs / "snapshotter.log", self.environment)
        stack.callback(snapshotter.stop)
        stack.callback(socket.unlink, missing_ok=True)
        self.groups.add(snapshotter.pid)
        snapshotter.wait_for(socket.exists, "socket")
        # A host in use has a running device host and a process for pulls, so their starts (Python with all imports)
        # are not measured.
        self.devices.start_host()
        host = host_process(self.devices.run_dir.path)
        assert host is not None, "the device host was just started"
        self.groups.add(host.pid)
        if self._settings.prefork_pulls:
            snapshotter.wait_for((self.state / "run" / PULL_SOCKET_NAME).exists, "socket for pulls")
        for child in children_of(snapshotter.pid):
            self.groups.add(child)

    def _start_containerd(self) -> None:
        config = self.state / "config.toml"
        config.write_text(self._configuration())
        with ExitStack() as stack:
            command: list[str | Path] = ["containerd", "--config", config]
            daemon = Daemon("containerd", command, self.logs / "containerd.log", self.environment)
            stack.callback(daemon.stop)
            self.groups.add(daemon.pid)
            daemon.wait_for(self._answers, "answer on its socket")
            self._events = EventMonitor(self.ctr)
            stack.callback(self._events.close)
            self._containerd = stack.pop_all()

    # Images and snapshots stay; there must be no container.
    def _start_again(self, *, unpigz: bool) -> None:
        self._containerd.close()
        self.address.unlink(missing_ok=True)
        self.unpigz = unpigz
        self._start_containerd()

    def _configuration(self) -> str:
        # JSON strings are TOML strings.
        proxies = "".join(
            f"""\
[proxy_plugins.{name}]
type = "snapshot"
address = {json.dumps(str(self.proxy_socket(name)))}
"""
            for name in (LAZY_SNAPSHOTTER, *self._proxies)
        )
        return f"""\
version = 2
root = {json.dumps(str(self.root))}
state = {json.dumps(str(self.state / "state"))}
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = {json.dumps(str(self.address))}
[debug]
level = "info"
{proxies}"""

    def _answers(self) -> bool:
        if not self.address.exists():
            return False
        try:
            with Containerd(str(self.address), self.namespace, timeout_s=2.0) as client:
                client.version()
        except ObdlabError:
            return False
        return True

    def remove_everything(self) -> None:
        """Remove all containers and images, also those of a start that failed. Raises LabError."""
        for container in self._running:
            container.remove()
        for name in run([*self.ctr, "containers", "list", "-q"]).split():
            remove_container(self.ctr, name)
        with self.client() as client:
            for image in client.images.list():
                with suppress(LabError):  # still in use: prove_cold reports the remains
                    self.remove_image(image.name)

    def _remove_directories(self) -> None:
        unmount_below([self.state, *self._roots])
        remove_runtime_state(self.namespace)
        for path in (self.state, *self._roots, self.cache_dir):
            shutil.rmtree(path, ignore_errors=True)


def _graduated(service: DeviceService, device_id: str) -> bool:
    return any(device.graduated for device in service.list() if device.device_id == device_id)


_STAGES = (("/containers/create", "id"), ("/tasks/create", "container_id"), ("/tasks/start", "container_id"))
