"""The lock of a dataset: the version of every Debian package in its image when the lock was last written.

An archive holds one version at a time and moves on every few days. So a build compares the lock (``packages.lock``
beside the recipe) with the installed packages, and a difference is an error only with ``--locked``. The file holds
one line ``package:architecture=version`` per package, sorted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.command import command
from obdlab.lab.testbed.process import LabError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

LOCK_NAME = "packages.lock"
_SHOWN = 3


def installed_packages(roots: Iterable[Path]) -> tuple[str, ...]:
    """Return the installed packages of the first of ``roots`` with dpkg's status file; () without such a file."""
    for root in roots:
        status = root / "var/lib/dpkg/status"
        if status.is_file():
            return _parse_status(status.read_text(errors="replace"))
    return ()


def read_lock(path: Path) -> tuple[str, ...]:
    """Return a lock file's lines; () if there is no such file."""
    return tuple(path.read_text().split()) if path.is_file() else ()


def write_lock(path: Path, packages: Sequence[str]) -> None:
    """Write a lock file."""
    path.write_text("".join(f"{package}\n" for package in packages))


def compare_lock(locked: Sequence[str], installed: Sequence[str]) -> str:
    """Return a line: the number of installed packages and their differences from the lock; "" without packages."""
    if not installed and not locked:
        return ""
    count = f"{len(installed)} packages"
    if not locked:
        return f"{count}, no {LOCK_NAME}"
    changed = _changes(locked, installed)
    if not changed:
        return f"{count}, as in {LOCK_NAME}"
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    verb = "differs" if len(changed) == 1 else "differ"
    return f"{count}, {len(changed)} {verb} from {LOCK_NAME}: {', '.join(changed[:_SHOWN])}{more}"


def holds(locked: Sequence[str], installed: Sequence[str]) -> bool:
    """Return True if a lock has all of the packages, in their versions."""
    return set(installed) <= set(locked)


def check_lock(name: str, locked: Sequence[str], installed: Sequence[str]) -> None:
    """Raise LabError naming the first packages of the recipe ``name`` that differ from its lock."""
    if not _changes(locked, installed):
        return
    build = command("lab", "dataset", "build", name)
    raise LabError(
        f"{name}: --locked: {compare_lock(locked, installed)} (wanted every package as locked); to build what the "
        f"archive has: {build}, to lock it: {build} --update-lock"
    )


def _changes(locked: Sequence[str], installed: Sequence[str]) -> list[str]:
    old, new = (dict(package.split("=", 1) for package in packages) for packages in (locked, installed))
    return [
        f"{key} {new.get(key, 'absent')} (locked {old.get(key, 'absent')})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _parse_status(text: str) -> tuple[str, ...]:
    packages = []
    for paragraph in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Status", "").endswith(" installed"):
            packages.append(f"{fields['Package']}:{fields['Architecture']}={fields['Version']}")
    return tuple(sorted(packages))
