"""Cold and warm, made and proved.

Cold: no image, snapshot, content, device or cached block of the experiment is on this host, and the page cache was
dropped. What is *not* meant to be measured is then read back into the page cache: the registry's blobs (its disk
stands for a remote one), the programs that start containers and what snapshotters that run have mapped (the host is
no newly booted one).
Warm: the image has been run on this host, and its files or blocks are in the page cache.
Dropped: the image has been run on this host, and nothing of it is in the page cache: what the disk costs.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.errors import ObdlabError
from obdlab.lab.containerd import unmount_below
from obdlab.lab.process import LabError, run, wait_until
from obdlab.lab.residency import resident_below

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.lab.containerd import OwnContainerd
    from obdlab.lab.registry import RegistryHost, Request, Traffic

_PROGRAMS = ("ctr", "containerd", "containerd-shim-runc-v2", "runc", "ctr-remote", "soci")
# Pages that are mapped (a device server's, another container's) stay.
_MOST_RESIDENT = 0.02
_DROP_TIMEOUT_S = 30.0
_DROP_AGAIN_S = 1.0
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class NotColdError(LabError):
    """Something of an earlier start is still on this host: a start now would not be a cold one."""


class NotWarmError(LabError):
    """A start that was to be warm needed the registry, or found nothing in memory."""


class NotDroppedError(LabError):
    """The page cache still holds layers after it was dropped, or a start that was to need only the disk did not."""


def make_cold(host: OwnContainerd, registry: RegistryHost) -> dict[str, Any]:
    """Take away what earlier starts left, and return the evidence of :func:`prove_cold`.

    Drops the page cache of the whole machine. Raises NotColdError if something stays.
    """
    with closing(host.client()) as client:
        for image in client.images.list():
            host.remove_image(image.name)
    for device in host.devices.list():
        with suppress(ObdlabError):  # what stays is told by the proof
            host.devices.detach(device.device_id)
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
    """Return what is left of earlier starts, every number 0. Raises NotColdError naming what is not."""
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


def prove_warm(layers: Path, traffic: Traffic, requests: Sequence[Request] = ()) -> dict[str, Any]:
    """Return the evidence that a start was warm: no request to the registry, layers in the page cache.

    ``layers`` holds the data of pulled images, ``traffic`` is what the registry served during the start, of which the
    error names ``requests``. Raises NotWarmError.
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
    if not resident:
        raise NotWarmError(f"not warm: nothing of {layers} is in the page cache")
    return evidence


def make_dropped(host: OwnContainerd, layers: Path) -> dict[str, Any]:
    """Drop the page cache of the whole machine; return the evidence. Raises NotDroppedError.

    The programs that start containers are read back, as before a cold start.
    """
    deadline = time.monotonic() + _DROP_TIMEOUT_S
    while True:
        drop_page_cache()
        preload_programs(host)
        resident, stored = resident_below([layers])
        # What is being written in the background cannot be dropped yet.
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
    """Read the programs that start containers, and what the daemons that run have mapped, into the page cache."""
    found = {Path(path) for path in map(shutil.which, _PROGRAMS) if path is not None}
    for path in found | host.groups.mapped_files():
        with suppress(OSError):  # replaced since
            path.read_bytes()


def empty_directory(directory: Path) -> None:
    """Delete everything in a directory, not the directory."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
