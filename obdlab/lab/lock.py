"""The pin of a dataset: which version of every Debian package its image holds (``packages.lock`` beside the recipe).

An archive holds one version at a time, so a pin cannot bring an old one back; it makes a change loud. The file holds
a line ``package:architecture=version`` per package, in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.lab.process import LabError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

LOCK_NAME = "packages.lock"
_SHOWN = 5


def installed_packages(roots: Iterable[Path]) -> tuple[str, ...]:
    """Return the installed packages by the first of ``roots`` that has dpkg's status file; () if none has."""
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


def check_lock(name: str, wanted: Sequence[str], got: Sequence[str]) -> None:
    """Raise LabError naming the first packages that differ from what the recipe ``name`` was pinned to."""
    old, new = (dict(package.split("=", 1) for package in packages) for packages in (wanted, got))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if not changed:
        return
    shown = [f"{key} {new.get(key, 'absent')} (wanted {old.get(key, 'absent')})" for key in changed[:_SHOWN]]
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    raise LabError(
        f"{name}: the archive's packages are not those of {LOCK_NAME}: got {', '.join(shown)}{more}; to pin what the "
        f"archive has today: obdlab dataset build {name} --update-lock"
    )


def _parse_status(text: str) -> tuple[str, ...]:
    packages = []
    for paragraph in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Status", "").endswith(" installed"):
            packages.append(f"{fields['Package']}:{fields['Architecture']}={fields['Version']}")
    return tuple(sorted(packages))
