"""Checks whether the machine can start and serve containers: host, devices, registries, cache."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from obdlab.cache.space import CacheSpace
from obdlab.server import wire
from obdlab.server.rundir import SOCKET_NAME, host_process

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from obdlab.metrics.exporter import Server, Snapshot

_HOST_TIMEOUT_S = 1.0
#: A registry's failure counts for this long, unless a request was answered since.
_LATELY_S = 120.0


def health_of(run_dir: Path, cache_dir: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Return ``{"ok": bool, ...}`` with a part for each of host, devices, registry and cache, each with its "ok"."""
    parts = {
        "host": host_health(run_dir),
        "devices": _devices(snapshot),
        "registry": registry_health(snapshot.servers),
        "cache": cache_health(cache_dir),
    }
    return {"ok": all(part["ok"] for part in parts.values()), **parts}


def host_health(run_dir: Path) -> dict[str, Any]:
    """Check that the device host answers. A host that is not running is fine: the next attach starts it."""
    try:
        wire.connect(run_dir / SOCKET_NAME, _HOST_TIMEOUT_S).close()
    except OSError as error:
        if host_process(run_dir) is not None:
            return {"ok": False, "state": f"does not answer: {error.strerror or error}"}
        return {"ok": True, "state": "not running, started on demand"}
    return {"ok": True, "state": "running"}


def _devices(snapshot: Snapshot) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    for state in snapshot.states.values():
        counts[state] = counts.get(state, 0) + 1
    bad = sorted(device_id for device_id, state in snapshot.states.items() if state != "alive")
    return {"ok": not bad, **counts} | ({"not_alive": bad} if bad else {})


def registry_health(servers: Iterable[Server]) -> dict[str, Any]:
    """Check that the last exchange with a registry, by any server in the last two minutes, was answered."""
    ages = [server.ages_s for server in servers]
    answered = min((each["registry_answered"] for each in ages if "registry_answered" in each), default=None)
    failed = min((each["registry_failed"] for each in ages if "registry_failed" in each), default=None)
    ok = failed is None or failed > _LATELY_S or (answered is not None and answered < failed)
    return {"ok": ok, "answered_s_ago": answered, "failed_s_ago": failed}


def cache_health(cache_dir: Path) -> dict[str, Any]:
    """Check that only we can write in the cache directory, and can: there or in the nearest existing parent."""
    try:
        CacheSpace(cache_dir).check_owner()
    except OSError as error:
        return {"ok": False, "directory": str(cache_dir), "error": error.strerror}
    directory = cache_dir
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"\0" * 4096)
        finally:
            os.close(fd)
    except OSError as error:
        return {"ok": False, "directory": str(cache_dir), "error": error.strerror}
    free = 0
    with suppress(OSError):
        status = os.statvfs(directory)
        free = status.f_bavail * status.f_frsize
    return {"ok": True, "directory": str(cache_dir), "free_bytes": free}
