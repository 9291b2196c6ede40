"""Making a host cold, warm or dropped, and proving it.

Cold: no image, snapshot, content, device or cached block of the experiment is on this host, and the page cache was
dropped. Files whose reads must *not* be measured are then read back into the page cache: the registry's blobs (its
disk stands for a remote one), the programs that start containers, and files that running snapshotters have mapped
(the host stands for one that has run for a while).
Warm: the image has been run on this host, and its files or blocks are in the page cache.
Dropped: the image has been run on this host, and its data is on the disk only.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.devices.usage import STARTS_END_S
from obdlab.errors import ObdlabError
from obdlab.lab.testbed.process import LabError, run, wait_until
from obdlab.lab.testbed.residency import resident_below
from obdlab.lab.testbed.takedown import unmount_below

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.lab.testbed.registry import RegistryHost, Request, Traffic

_PROGRAMS = ("ctr", "containerd", "containerd-shim-runc-v2", "runc", "ctr-remote", "soci", "unpigz")
# Mapped pages (of a device server, of another container) survive the drop.
_MOST_RESIDENT = 0.02
_DROP_TIMEOUT_S = 30.0
_DROP_AGAIN_S = 1.0
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class NotColdError(LabError):
    """Remains of an earlier start are on this host, so that a start would not be cold."""


class NotWarmError(LabError):
    """A start that should be warm needed the registry, or found nothing in memory."""


class NotDroppedError(LabError):
    """The page cache still holds layers after it was dropped."""


def make_cold(host: OwnContainerd, registry: RegistryHost) -> dict[str, Any]:
    """Remove the remains of earlier starts; return the evidence of :func:`prove_cold`.

    Drops the page cache of the whole machine. Raises NotColdError if anything remains.
    """
    with closing(host.client()) as client:
        for image in client.images.list():
            host.remove_image(image.name)
    for device in host.devices.list():
        with suppress(ObdlabError):  # prove_cold reports the remains
            host.devices.detach(device.device_id, patience_s=STARTS_END_S)
    with suppress(LabError):
        wait_until(lambda: not host.devices.list(), "end of device servers", 10.0, 0.02)
    unmount_below([host.files_dir])
    for directory in (host.cache_dir, host.files_dir):
        empty_directory(directory)
    drop_page_cache()
    registry.preload()
    preload_programs(host)
    return prove_cold(host)


def prove_cold(host: OwnContainerd) -> dict[str, Any]:
    """Return the counts of earlier starts' remains, all 0. Raises NotColdError naming the counts that are not."""
    with closing(host.client()) as client:
        content = len(client.content.list())
        images = len(client.images.list())
        snapshots = {name: len(client.snapshots(name).list()) for name in host.snapshotters}
    resident, stored = resident_below([*host.layer_directories.values(), host.files_dir])
    evidence = {
        "images": images,
        "content_blobs": content,
        "snapshots": sum(snapshots.values()),
        "devices": len(host.devices.list()),
        "containers": len(run([*host.ctr, "containers", "list", "-q"]).split()),
        "stored_bytes": stored,
        "resident_bytes": resident,
    }
    left = {key: value for key, value in evidence.items() if value}
    if left:
        raise NotColdError(f"not cold: {', '.join(f'{value} {key}' for key, value in left.items())} (wanted none)")
    return evidence


def prove_warm(
    layers: Path, traffic: Traffic, requests: Sequence[Request] = (), *, cached: bool = True
) -> dict[str, Any]:
    """Return the evidence that a start was warm: no request to the registry, layers in the page cache.

    ``layers`` holds the data of pulled images; ``cached`` is False if the page cache has a device above instead.
    ``traffic`` is the registry's traffic during the start. Raises NotWarmError, which names ``requests``.
    """
    resident, stored = resident_below([layers])
    evidence = {"requests": traffic.requests, "stored_bytes": stored, "resident_bytes": resident}
    if traffic.requests:
        asked = ", ".join(
            f"{each.uri.rpartition('/')[2][:19]} {each.status} {each.written} bytes" for each in requests
        )
        raise NotWarmError(
            f"not warm: the registry was asked {traffic.requests} times (wanted none){f': {asked}' if asked else ''}"
        )
    if cached and not resident:
        raise NotWarmError(f"not warm: nothing of {layers} is in the page cache")
    return evidence


def make_dropped(host: OwnContainerd, layers: Path) -> dict[str, Any]:
    """Drop the page cache of the whole machine; return the evidence. Raises NotDroppedError.

    Programs that start containers are read back into it, as before a cold start.
    """
    deadline = time.monotonic() + _DROP_TIMEOUT_S
    while True:
        drop_page_cache()
        preload_programs(host)
        resident, stored = resident_below([layers])
        # Pages under background writeback cannot be dropped yet.
        if resident <= stored * _MOST_RESIDENT or time.monotonic() >= deadline:
            break
        time.sleep(_DROP_AGAIN_S)
    if resident > stored * _MOST_RESIDENT:
        raise NotDroppedError(f"not dropped: {resident} of {stored} bytes of {layers} are in the page cache")
    return {"stored_bytes": stored, "resident_bytes": resident}


def drop_page_cache() -> None:
    """Write dirty pages back, then drop page cache, dentries and inodes of the whole machine. Raises LabError."""
    os.sync()
    try:
        _DROP_CACHES.write_text("3\n")
    except OSError as error:
        raise LabError(f"{_DROP_CACHES}: {error} (wanted to drop the page cache)") from error


def preload_programs(host: OwnContainerd) -> None:
    """Read the programs that start containers, and the mapped files of running daemons, into the page cache."""
    found = {Path(path) for path in map(shutil.which, _PROGRAMS) if path is not None}
    for path in found | host.groups.mapped_files():
        with suppress(OSError):  # the file has been replaced
            path.read_bytes()


def empty_directory(directory: Path) -> None:
    """Delete the content of a directory, not the directory."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
