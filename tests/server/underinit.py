"""A systemd of its own, as process 1 of new namespaces: units run as they would, and nothing outside is touched.

It sees the machine's file systems and devices, with a /run and a /var of its own. Its control groups are below one
made for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "packaging" / "systemd"
SYSTEMD = Path("/usr/lib/systemd/systemd")
#: Where the units' Python and packages are seen: not in /home or /root, which units hide.
_PYTHON, _PACKAGES, _PROJECT = "/run/python", "/run/packages", "/run/project"
_TARGETS = ("default", "shutdown", "sysinit", "basic", "umount", "network-online")
_START_S = 60.0

_OUTER = """
set -e
# What others have mounted on devices must not be held here.
theirs='($1 ~ "^/dev/loop" || $3 == "overlay") && $2 != "/" { print $2 }'
awk "$theirs" /proc/self/mounts | tac | xargs -r umount -l || true
mount -t tmpfs tmpfs "$0/cgroup"
mkdir "$0/cgroup/all"
mount -t cgroup2 cgroup2 "$0/cgroup/all"
mine="$0/cgroup/all$(sed -n s/^0:://p /proc/self/cgroup)/obdlab-units-$$"
mkdir "$mine"
remove() {
  for n in $(seq 100); do find "$mine" -depth -type d -exec rmdir {} + 2> /dev/null && break; sleep 0.1; done
}
trap remove EXIT
sh -c 'echo $$ > "$0/cgroup.procs"; exec unshare --cgroup --pid --fork --mount-proc --kill-child sh -ec "$1" "$2"' \\
  "$mine" "$1" "$0"
"""
_INNER = f"""
mount -t tmpfs tmpfs /run
mkdir {_PYTHON} {_PACKAGES} {_PROJECT} /run/lock
mount --bind "$BASE" {_PYTHON}
mount --bind "$SITE" {_PACKAGES}
mount --bind "$PROJECT" {_PROJECT}
mount --bind "$0/var" /var
mount --bind "$0/etc" /etc/systemd
umount -l "$0/cgroup" /sys/fs/cgroup 2> /dev/null || true
mount -t tmpfs tmpfs /sys/fs/cgroup 2> /dev/null || true
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo $$ > "$0/inner"
exec env -i container=test SYSTEMD_UNIT_PATH="$0/units" {SYSTEMD} --system --log-target=console --show-status=0
"""


class Init:
    """A running systemd that knows the project's units."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        for name in ("units", "var", "etc", "cgroup", "var/tmp", "var/lib", "var/cache"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        for name in _TARGETS:
            (directory / "units" / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        for unit in UNITS.glob("*.service"):
            text = unit.read_text().replace("/usr/local/bin/obdlab", f"{_PYTHON}/bin/{_python_name()} -m obdlab")
            path = f"{_PROJECT}:{_PACKAGES}"
            output = directory / "output"
            settings = f"Environment=PYTHONPATH={path} PYTHONDONTWRITEBYTECODE=1 LD_LIBRARY_PATH={_PYTHON}/lib\n"
            settings += f"StandardOutput=append:{output}\nStandardError=append:{output}\n"  # there is no journal
            text = text.replace("[Service]\n", f"[Service]\n{settings}")
            (directory / "units" / unit.name).write_text(text)

    def __enter__(self) -> Self:
        environment = os.environ | {
            "BASE": sys.base_prefix,
            "SITE": sysconfig.get_path("purelib"),
            "PROJECT": str(ROOT),
        }
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _OUTER, str(self._directory), _INNER]
        log = (self._directory / "log").open("wb")
        with log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            self._wait_until_it_runs(self._process)
        except BaseException:
            self._end()
            raise
        return self

    def _wait_until_it_runs(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_S
        while self.ctl("is-system-running", check=False).strip() not in ("running", "degraded"):
            assert time.monotonic() < deadline, self.log()
            assert process.poll() is None, self.log()
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self.obdlab("cleanup", "--force", check=False)  # or file systems would outlive those who serve them
        self._end()

    def _end(self) -> None:
        assert self._process is not None
        pid = self.pid
        if pid and self._process.poll() is None:
            os.kill(pid, signal.SIGKILL)  # all of its namespace with it
        self._process.wait(60)

    @property
    def pid(self) -> int:
        """Process 1, as seen from here; 0 while there is none."""
        if not self._pid:
            self._pid = self._find()
        return self._pid

    def _find(self) -> int:
        assert self._process is not None
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            except OSError:
                continue
            if lines.get("NSpid", "").split()[1:] == ["1"] and self._is_ours(int(lines["Pid"])):
                return int(lines["Pid"])
        return 0

    def _is_ours(self, pid: int) -> bool:
        assert self._process is not None
        while pid > 1:
            if pid == self._process.pid:
                return True
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
        return False

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command in its namespaces, with its process 1's own rights."""
        pid = self.pid
        if not pid:
            return ""
        enter = ["nsenter", "--target", str(pid), "--mount", "--pid", "--cgroup", "--"]
        done = subprocess.run(
            [*enter, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
        )
        assert done.returncode == 0 or not check, f"{done.stdout}\n{self.log()}"
        return done.stdout

    def ctl(self, *arguments: str, check: bool = True) -> str:
        """Run systemctl."""
        return self.run("systemctl", "--no-pager", *arguments, check=check)

    def obdlab(self, *arguments: str, check: bool = True) -> str:
        """Run obdlab as an administrator would."""
        python = f"{_PYTHON}/bin/{_python_name()}"
        return self.run("env", f"PYTHONPATH={_PROJECT}:{_PACKAGES}", python, "-m", "obdlab", *arguments, check=check)

    def override(self, unit: str, text: str) -> None:
        """Add to a unit."""
        folder = self._directory / "units" / f"{unit}.d"
        folder.mkdir(exist_ok=True)
        (folder / "test.conf").write_text(text)
        self.ctl("daemon-reload")

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.ctl("show", "--value", f"--property={name}", unit).strip()

    def log(self) -> str:
        """What systemd and the units have said."""
        paths = (self._directory / name for name in ("log", "output"))
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())


def _python_name() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, Init(Path(name)) as init:
        subprocess.run(["nsenter", "--target", str(init.pid), "--mount", "--pid", "--cgroup"], check=False)
