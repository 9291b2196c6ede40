"""One step of an image build: commands in a root file system of overlays.

Each step runs in its own mount and process namespaces. When the step ends or is killed, or this process dies, the
kernel takes down its mounts and processes; only directories remain to be removed.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.lab.images.layertar import BUILD_EPOCH_S
from obdlab.lab.testbed.process import run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from obdlab.lab.images.recipe import RecipeLayer

# A fresh /dev instead of the host's: package scripts must not reach real devices. /tmp is a tmpfs, so that the
# step's own files (apt's lists and archives, staged files) never get into the layer.
_ENTER = r"""
set -eu
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3,redirect_dir=off,metacopy=off,index=off" root
mount -t proc proc root/proc
mount -t sysfs -o ro sysfs root/sys
mount -t tmpfs -o mode=0755 tmpfs root/dev
for node in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0"; do
    set -- $node
    mknod -m 0666 "root/dev/$1" c "$2" "$3"
done
mkdir root/dev/pts root/dev/shm
ln -s pts/ptmx root/dev/ptmx
ln -s /proc/self/fd root/dev/fd
mount -t devpts -o newinstance,ptmxmode=0666 devpts root/dev/pts
mount -t tmpfs -o mode=1777 tmpfs root/tmp
mkdir root/tmp/obdlab
mount --bind stage root/tmp/obdlab
if [ -d apt ]; then mkdir -p stage/apt; mount --bind "$(readlink -f apt)" root/tmp/obdlab/apt; fi
if [ -e root/etc/resolv.conf ] && [ -e /etc/resolv.conf ]; then mount --bind /etc/resolv.conf root/etc/resolv.conf; fi
exec chroot root /bin/sh -eu /tmp/obdlab/script
"""
APT_DIRECTORY = "/tmp/obdlab/apt"
#: Words before a command: it gets its own mount and process namespaces and ends with this process. setpriv passes
#: the death of this process to unshare, unshare passes its own to the namespace's init, and then the kernel kills
#: every process of the namespace.
ISOLATED = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--propagation", "private"),
)


@dataclass(frozen=True, slots=True)
class Chroot:
    """The directory that steps run in. ``directory`` holds ``lowers`` (by relative path) and may hold ``apt``."""

    directory: Path
    timeout_s: float = 900.0

    def run_layer(self, layer: RecipeLayer, lowers: Sequence[str], upper: str, refresh_lists: bool) -> None:
        """Apply one layer of a recipe over ``lowers`` (bottom first); the changes are in ``upper`` afterwards.

        Paths are relative to the directory. Raises LabError with the last output of the step if it fails.
        """
        stage = self.directory / "stage"
        stage.mkdir(exist_ok=True)
        for name in (upper, "work", "root"):
            (self.directory / name).mkdir(exist_ok=True)
        for number, file in enumerate(layer.files):
            (stage / f"file{number}").write_bytes(file.content)
        (stage / "script").write_text(layer_script(layer, refresh_lists))
        # Relative paths keep the mount options inside mount(8)'s 256-byte limit per option.
        lower_option = ":".join(reversed(lowers))
        run(
            [*ISOLATED, "--", "sh", "-c", _ENTER, "sh", lower_option, upper, "work"],
            directory=self.directory,
            timeout_s=self.timeout_s,
            environment=_ENVIRONMENT,
        )


_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "HOME": "/root",
    # The caller's TMPDIR may lie outside of the image, and package scripts make files there.
    "TMPDIR": "/tmp",
    "TMP": "/tmp",
    "TEMP": "/tmp",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    # /etc/shadow records the day of the last password change, which a new user takes from here.
    "SOURCE_DATE_EPOCH": str(BUILD_EPOCH_S),
}


def layer_script(layer: RecipeLayer, refresh_lists: bool) -> str:
    """Return the shell script that applies a layer inside the image."""
    lines = []
    if layer.packages:
        lines.append(f"export APT_CONFIG={APT_DIRECTORY}/apt.conf")
        if refresh_lists:
            lines.append("apt-get -q update")
        lines.append(f"apt-get -q install -y --no-install-recommends {shlex.join(layer.packages)}")
        # Logs and backups hold times, which would make each build differ.
        lines.append("rm -rf /var/log/apt /var/log/dpkg.log /var/log/alternatives.log /var/cache/ldconfig/aux-cache")
        lines.append("rm -f /var/lib/dpkg/*-old /var/cache/debconf/*-old /etc/*-")
    for number, file in enumerate(layer.files):
        lines.append(f"install -D -m {file.mode:04o} /tmp/obdlab/file{number} {shlex.quote(file.path)}")
    lines += [f"sh -euc {shlex.quote(command)}" for command in layer.run]
    return "\n".join(lines) + "\n"
