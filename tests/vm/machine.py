"""Running one command in the virtual machine: the host's files, its own kernel, nothing written back."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tests.vm.initramfs import build_initramfs
from tests.vm.kernel import VmError, get_kernel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.vm.kernel import Kernel

QEMU = "qemu-system-x86_64"
#: Set for the command, so that it knows where it runs.
GUEST_VARIABLE = "OBDLAB_VM_GUEST"
#: Where the command finds the directory shared with the host, writable on both sides.
GUEST_SHARE = Path("/run/vm")
#: Passed on from the caller's environment.
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH")
_END_S = 20.0
#: Made by the job when it begins, in the shared directory.
_STARTED = "started"
#: Lines of the console that an error shows: those of two panics.
_CONSOLE_LINES = 160


@dataclass(frozen=True)
class Finished:
    """How a command in the machine ended. ``console`` is what the kernel said, also in a boot that failed before."""

    status: int
    output: str
    console: str


def in_guest() -> bool:
    """Tell whether this is the machine, or a host that was declared to be as good."""
    return os.environ.get(GUEST_VARIABLE) == "1"


def missing() -> str:
    """Say what keeps the virtual machine from running here, or ''."""
    if os.uname().machine != "x86_64":
        return f"only for x86-64 hosts so far (this is {os.uname().machine})"
    for tool, package in ((QEMU, "qemu-system-x86"), ("busybox", "busybox-static"), ("apt-get", "apt")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian package {package})"
    return ""


def run(
    command: Sequence[str],
    *,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    modules: Sequence[str] = (),
    share: Path | None = None,
    timeout_s: float = 600.0,
    memory_mib: int = 3072,
    processors: int = 2,
    drives: Sequence[str] = (),
    echo: IO[str] | None = None,
) -> Finished:
    """Boot, run ``command`` in ``directory`` (default: this one), and return how it ended.

    The machine sees all of the host's files, read-only below a layer in its own memory. ``modules`` are loaded first.
    ``drives`` are more disks, as qemu's -drive has them (``file=...,format=raw``), in the machine /dev/vda and so on.
    ``share``, an empty directory, is writable on both sides (``GUEST_SHARE`` in the machine). ``echo`` gets the
    output as it comes. A machine that dies before the command begins, as on a busy host it may, is booted once more.
    Raises VmError if the machine cannot be run, dies, or is not done after ``timeout_s``; it is gone in any case.
    """
    reason = missing()
    if reason:
        raise VmError(reason)
    kernel = get_kernel()
    with tempfile.TemporaryDirectory(prefix="vm-") as name:
        work = Path(name)
        job = share or work / "share"
        job.mkdir(exist_ok=True)
        (job / "modules").write_text(str(kernel.modules.resolve()))
        (job / "job.sh").write_text(_job(command, directory or Path.cwd(), environment or {}, modules))
        (work / "initrd").write_bytes(build_initramfs(kernel))
        argv = _command(kernel, work, job, memory_mib, processors)
        argv += [word for drive in drives for word in ("-drive", f"{drive},if=virtio")]
        deadline = time.monotonic() + timeout_s
        output, timed_out = _execute(argv, timeout_s, echo)
        console = _text(work / "console")
        if not timed_out and not (job / _STARTED).exists():
            first = f"{console}\n--- the machine died before the command began, and was booted once more ---\n"
            again, timed_out = _execute(argv, max(0.0, deadline - time.monotonic()), echo)
            output, console = output + again, first + _text(work / "console")
        status = _text(job / "status").strip()
    told = f"{_tail(output)}\nconsole:\n{_tail(console, _CONSOLE_LINES)}"
    if timed_out:
        raise VmError(f"the machine was not done after {timeout_s:g} s\n{told}")
    if not status.isdecimal():
        raise VmError(f"the machine ended without a status\n{told}")
    return Finished(int(status), output, console)


def _job(command: Sequence[str], directory: Path, environment: Mapping[str, str], modules: Sequence[str]) -> str:
    values = {key: os.environ[key] for key in _KEPT if key in os.environ}
    values |= {
        "TERM": "dumb",
        "TMPDIR": "/run/tmp",
        GUEST_VARIABLE: "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    lines = [f"export {key}={shlex.quote(value)}" for key, value in values.items()]
    lines.append(f"touch {GUEST_SHARE / _STARTED}")
    lines += [f"/sbin/modprobe {shlex.quote(module)} || exit 125" for module in modules]
    if "configfs" in modules:
        lines.append("mount -t configfs none /sys/kernel/config 2>/dev/null || true")
    lines += [f"cd {shlex.quote(str(directory))} || exit 125", f"exec {shlex.join(command)}"]
    return "\n".join(lines) + "\n"


def _command(kernel: Kernel, work: Path, job: Path, memory_mib: int, processors: int) -> list[str]:
    # With its parent the machine dies, too; it must not slow down who waits for it.
    wrapper = ["nice", "-n", "2", "setpriv", "--pdeathsig", "KILL"]
    return [
        *wrapper, QEMU, "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max", "-smp", str(processors),
        "-m", str(memory_mib), "-nodefaults", "-display", "none", "-no-reboot", "-nographic",
        "-kernel", str(kernel.image), "-initrd", str(work / "initrd"),
        # On a busy host the timer's ticks may come too late for the kernel's check at boot, which then panics.
        "-append", "console=ttyS0 quiet panic=-1 oops=panic mitigations=off no_timer_check",
        "-serial", f"file:{work / 'console'}", "-serial", "stdio",
        "-fsdev", "local,id=host,path=/,security_model=none,multidevs=remap,readonly=on",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
        "-fsdev", f"local,id=job,path={job},security_model=none",
        "-device", "virtio-9p-pci,fsdev=job,mount_tag=job",
        "-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng",
    ]  # fmt: skip


def _execute(argv: list[str], timeout_s: float, echo: IO[str] | None) -> tuple[str, bool]:
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    parts: list[bytes] = []
    reader = threading.Thread(target=_collect, args=(process, parts, echo), daemon=True)
    reader.start()
    timed_out = False
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait(_END_S)
        reader.join(_END_S)
    return b"".join(parts).decode(errors="replace"), timed_out


def _collect(process: subprocess.Popen[bytes], parts: list[bytes], echo: IO[str] | None) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        while part := os.read(stream.fileno(), 1 << 16):
            parts.append(part)
            if echo is not None:
                echo.write(part.decode(errors="replace"))
                echo.flush()


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace") if path.exists() else ""


def _tail(text: str, lines: int = 40) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])
