"""A container that runs once, directly by runc: no containerd, no network plugins, no leftovers.

Its root is an overlay: a mounted image below, the host's run directory above; or the mounted image itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from obdlab.closing import Closing
from obdlab.errors import DeviceError
from obdlab.server.capture.containerbundle import bundle
from obdlab.system import abi
from obdlab.system.mount import unmount

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

_RUNC_S = 30.0
# Short: a first process without a handler ignores SIGTERM, and the recorded data is complete.
_TERM_S = 2.0
# A process that survives SIGKILL waits for the disk.
_STUCK_S = 2.0
_KILL_S = 10.0
_LOOK_S = 0.02
# The container's maker writes a line once it has taken the container down; if it dies before, the guard reads end of
# file. The guard deletes twice, as runc may have been just about to start the container; not for long, as the
# container's mounts are seen here, too.
_GUARD = 'read -r _ || { for _ in 1 2; do runc --root "$1" delete --force "$2"; sleep 0.2; done; umount -l "$3"; }'


class TemporaryContainer(Closing):
    """Runs the command of an image's configuration on ``image_root``, where the image is mounted, until closed.

    ``place`` is an empty directory for the bundle. ``command`` replaces the image's own; ``host_network`` shares the
    host's network, otherwise there is only a loopback. With ``in_place`` changes go to ``image_root`` itself, and
    /run is the image's own; ``mounts`` are added, as in a bundle's config.json. Output goes to the descriptor
    ``output``. If its processes do not die in the end, ``release`` is called, which must end their pending reads. The
    container does not outlive this process. Raises DeviceError, with runc's message.
    """

    def __init__(
        self,
        place: Path,
        image_root: Path,
        config: Mapping[str, Any],
        *,
        command: Sequence[str] = (),
        host_network: bool = False,
        in_place: bool = False,
        mounts: Sequence[Mapping[str, Any]] = (),
        output: int | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        if shutil.which("runc") is None:
            raise DeviceError("runc is not installed (apt-get install runc)")
        arguments = list(command) or [*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())]
        if not arguments:
            raise DeviceError("the image names no command: give one")
        self._place = place
        self._release = release
        self._id = f"obdlab-{os.getpid()}-{place.name}"
        for part in ("upper", "work", "root", "state"):
            (place / part).mkdir()
        self._root = image_root if in_place else place / "root"
        self._in_place = in_place
        if not in_place:
            _mount_overlay(self._root, image_root, place)
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        try:
            self._guard = self._guarded()
            document = bundle(self._root, arguments, config, host_network=host_network, in_place=in_place)
            document["mounts"] += mounts
            (place / "config.json").write_text(json.dumps(document))
            self._process = subprocess.Popen(
                [*self._runc, "run", "--bundle", str(place), self._id],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise DeviceError(f"{place}: cannot start a container ({error.strerror or error})") from error
            raise

    @property
    def _runc(self) -> list[str]:
        return ["runc", "--root", str(self._place / "state")]

    @property
    def status(self) -> int | None:
        """The exit status, None while it runs."""
        return None if self._process is None else self._process.poll()

    def run(self, command: str) -> subprocess.Popen[bytes]:
        """Begin ``sh -c command`` in the container. Its status is also not 0 while the container still starts."""
        return subprocess.Popen(
            [*self._runc, "exec", self._id, "/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self, seconds: float | None, ended: Callable[[], bool]) -> bool:
        """Wait until ``ended()``, the timeout, or the container's end. Return True if the container still runs."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while self.status is None and not ended():
            if deadline is not None and time.monotonic() >= deadline:
                break
            time.sleep(_LOOK_S)
        return self.status is None

    def close(self) -> None:
        """End it, by SIGTERM first, and take its root down."""
        if self._process is not None:
            self._end(self._process)
        if not self._in_place:
            unmount(self._root, lazy=True)
        if self._guard is not None:
            with suppress(subprocess.TimeoutExpired, BrokenPipeError):
                self._guard.communicate(b"\n", _KILL_S)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        for number, patience_s in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, _STUCK_S)):
            if process.poll() is None:
                self._kill(number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(patience_s)
        if process.poll() is None:
            self._release()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_S)
        if process.poll() is None:
            process.kill()
            process.wait(_KILL_S)
        self._run("delete", "--force", self._id)

    # In a session of its own: no terminal's Ctrl-C and no kill of a whole group ends it.
    def _guarded(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "obdlab-guard", str(self._place / "state"), self._id, str(self._root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _kill(self, number: signal.Signals) -> None:
        self._run("kill", self._id, str(int(number)))

    def _run(self, *words: str) -> None:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([*self._runc, *words], capture_output=True, timeout=_RUNC_S, check=False)


class LineWatch:
    """Passes all data written to :attr:`descriptor` on to ``target``, and notices a line that holds ``text``."""

    def __init__(self, text: str, target: int) -> None:
        self._wanted = text.encode()
        self._target = target
        self._seen = threading.Event()
        self._read, self.descriptor = os.pipe()
        self._thread = threading.Thread(target=self._pass_on, name="obdlab-output", daemon=True)
        self._thread.start()

    @property
    def seen(self) -> bool:
        """Whether the text has come."""
        return self._seen.is_set()

    def close(self) -> None:
        """Pass on the remaining data, once the writers are gone."""
        os.close(self.descriptor)
        self._thread.join(_KILL_S)

    def _pass_on(self) -> None:
        rest = b""
        with open(self._read, "rb", buffering=0) as source:
            while data := source.read(65536):
                with suppress(OSError):
                    os.write(self._target, data)
                *lines, rest = (rest[-65536:] + data).split(b"\n")
                if any(self._wanted in line for line in lines):
                    self._seen.set()


def _mount_overlay(target: Path, lower: Path, place: Path) -> None:
    options = ",".join(
        f"{key}={_escaped(path)}"
        for key, path in (("lowerdir", lower), ("upperdir", place / "upper"), ("workdir", place / "work"))
    )
    try:
        abi.mount("overlay", target, "overlay", 0, options)
    except OSError as error:
        raise DeviceError(f"cannot mount an overlay on {target}: {error.strerror}") from error


def _escaped(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
