"""The bundle of a container: the command that runc runs, and its surroundings.

It follows the OCI runtime specification; settings missing in the image's configuration get the defaults of container
engines.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Any

from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW"),
        *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
    )
]
_MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/sys/firmware"]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
# An image's /etc/passwd and /etc/group may be of any size.
_MOST_ACCOUNTS = 1 << 20


def bundle(
    root: Path, arguments: list[str], config: Mapping[str, Any], *, host_network: bool, in_place: bool = False
) -> dict[str, Any]:
    """Return the document of a bundle that runs ``arguments`` in ``root`` with an image's ``config``.

    ``in_place`` leaves /run as it is in the image, for a command whose changes are to stay. Raises DeviceError for a
    user that the image does not have.
    """
    environment = list(config.get("Env") or ())
    if not any(entry.startswith("PATH=") for entry in environment):
        environment.insert(0, _PATH)
    user, group, groups = user_of(str(config.get("User") or ""), root)
    namespaces = ["pid", "ipc", "uts", "mount", *([] if host_network else ["network"])]
    # The soft limit is the recording command's own bound (cli/memorybound.py).
    most = resource.getrlimit(resource.RLIMIT_DATA)[1] & (2**64 - 1)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": user, "gid": group, "additionalGids": groups},
            "args": arguments,
            "env": environment,
            "cwd": config.get("WorkingDir") or "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "noNewPrivileges": False,
            "rlimits": [{"type": "RLIMIT_DATA", "soft": most, "hard": most}],
        },
        "root": {"path": str(root), "readonly": False},
        "hostname": "obdlab",
        "mounts": _mounts(host_network=host_network, in_place=in_place),
        "linux": {
            "namespaces": [{"type": name} for name in namespaces],
            "maskedPaths": _MASKED,
            "readonlyPaths": _READ_ONLY,
        },
    }


def _mounts(*, host_network: bool, in_place: bool) -> list[dict[str, Any]]:
    careful = ["nosuid", "noexec", "nodev"]
    found = [
        ("/proc", "proc", "proc", careful),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        ("/dev/shm", "tmpfs", "shm", [*careful, "mode=1777", "size=65536k"]),
        ("/dev/mqueue", "mqueue", "mqueue", careful),
    ]
    if not in_place:
        found.append(("/run", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]))
    if host_network:  # sysfs shows the network of the process that mounts it
        found.append(("/sys", "none", "/sys", ["rbind", "nosuid", "noexec", "nodev", "ro"]))
        found.append(("/etc/resolv.conf", "bind", "/etc/resolv.conf", ["rbind", "ro"]))
    else:
        found.append(("/sys", "sysfs", "sysfs", [*careful, "ro"]))
    return [
        {"destination": target, "type": kind, "source": source, "options": options}
        for target, kind, source, options in found
    ]


def user_of(text: str, root: Path) -> tuple[int, int, list[int]]:
    """Return user, group and further groups of "user", "uid", "user:group" or "uid:gid" (OCI image configuration).

    Names are looked up in the files of the image mounted at ``root``. Raises DeviceError for an unknown one.
    """
    name, _, group = text.partition(":")
    if not name:
        return 0, 0, []
    account = next((a for a in _accounts(root, "passwd") if a[0] == name or a[2] == name), None)
    if account is None and not name.isdecimal():
        raise DeviceError(f"the image has no user {name!r}")
    uid = int(account[2]) if account is not None else int(name)
    gid = int(account[3]) if account is not None else 0
    known = _accounts(root, "group")
    if group:
        found = next((g for g in known if g[0] == group), None)
        if found is None and not group.isdecimal():
            raise DeviceError(f"the image has no group {group!r}")
        return uid, int(found[2]) if found is not None else int(group), []
    user = account[0] if account is not None else name
    return uid, gid, sorted(int(g[2]) for g in known if user in g[3].split(","))


def _accounts(root: Path, name: str) -> list[list[str]]:
    if (root / "etc").is_symlink():
        return []  # could lead out of the image
    try:
        descriptor = os.open(root / "etc" / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            text = file.read(_MOST_ACCOUNTS).decode(errors="replace")
    except OSError:
        return []
    fields = [line.split(":") for line in text.splitlines()]
    numbers = (2,) if name == "group" else (2, 3)
    return [each for each in fields if len(each) >= 4 and all(each[number].isdecimal() for number in numbers)]
