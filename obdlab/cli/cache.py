"""``obdlab cache list``, ``gc``, ``clear``, ``verify``: the cache that all devices share, also while they run."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options, settings_from
from obdlab.cli.jsonoutput import add_json_option, answer, print_json
from obdlab.cli.packing import size_text
from obdlab.cli.progressbar import progress_bar

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from obdlab.cache.admin import CacheEntry, CheckedBlob
    from obdlab.cache.unpacked import FlatFile


def declare_list(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Lists the blobs in the block cache, the last used first, and the images unpacked by graduation, which the "
        "next starts read. The least recently used of both are evicted when the cache needs room."
    )
    _add_common(parser)
    parser.set_defaults(run=_list)


def declare_clear(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Removes all blobs from the block cache and all unpacked images that are not in use, or the named blobs. "
        "Devices that read them fetch them again from their registry."
    )
    _add_digests(parser)
    _add_common(parser)
    parser.set_defaults(run=_clear)


def declare_gc(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Removes unpacked images that a killed process left half-made, and evicts what was not used for longest "
        "until the cache is within its limits (cache_quota, cache_min_free). Stores do the latter by themselves."
    )
    _add_common(parser)
    parser.set_defaults(run=_gc)


def declare_verify(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Reads all blobs in the block cache, or those named, and checks their bytes against their checksums, and "
        "against their digest where the whole blob is present. The exit status is 1 if damage was found and not "
        "repaired."
    )
    _add_digests(parser)
    parser.add_argument(
        "--repair", action="store_true", help="remove damaged units, which are fetched again when read"
    )
    _add_common(parser)
    parser.set_defaults(run=_verify)


def _add_digests(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("digests", nargs="*", metavar="DIGEST", help="blobs (default: all)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_json_option(parser, "print JSON")
    add_runtime_options(parser)


def _list(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from obdlab.cache.admin import entries, unpacked_disks
    from obdlab.cache.space import CacheSpace

    directory = settings_from(args).cache_dir
    with _readable_errors():
        found, disks = entries(CacheSpace(directory)), unpacked_disks(CacheSpace(directory))
    if args.json:
        print_json([asdict(entry) for entry in found] + [{"unpacked": asdict(disk)} for disk in disks], indent=2)
        return 0
    print(f"{'DIGEST':19}  {'SIZE':>10}  {'CACHED':>6}  {'ON DISK':>10}  {'LAST USE':16}  STATE     REGISTRY")
    for entry in found:
        print(_line(entry))
    for disk in disks:
        print(_disk_line(disk))
    sizes = [size_text(sum(entry.disk_bytes for entry in each)) for each in (found, disks)]
    print(f"{len(found)} blobs, {sizes[0]}; {len(disks)} unpacked images, {sizes[1]}; on disk in {directory}")
    return 0


def _line(entry: CacheEntry) -> str:
    share = f"{100 * entry.cached_bytes // entry.size}%" if entry.size else "-"
    used = _time_text(entry.last_use)
    state = "damaged" if not entry.size else "verified" if entry.verified else "in use" if entry.in_use else ""
    return (
        f"{entry.digest[:19]}  {size_text(entry.size):>10}  {share:>6}  {size_text(entry.disk_bytes):>10}  {used:16}"
        f"  {state:8}  {entry.registry}"
    )


def _disk_line(disk: FlatFile) -> str:
    state = "in use" if disk.in_use else "" if disk.size else "half-made"
    return (
        f"{disk.name[:19]}  {size_text(disk.size):>10}  {'-':>6}  {size_text(disk.disk_bytes):>10}  "
        f"{_time_text(disk.last_use):16}  {state:8}  (unpacked image)"
    )


def _time_text(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time_s)) if time_s else "-"


def _gc(args: argparse.Namespace) -> int:
    from obdlab.cache.admin import collect
    from obdlab.cache.eviction import EvictingSpace

    settings = settings_from(args)
    with _readable_errors():
        freed = collect(
            EvictingSpace(settings.cache_dir, quota=settings.cache_quota, min_free=settings.cache_min_free)
        )
    answer(args, {"freed_bytes": freed}, f"freed {size_text(freed)}")
    return 0


def _clear(args: argparse.Namespace) -> int:
    from obdlab.cache.admin import clear
    from obdlab.cache.space import CacheSpace

    _check_digests(args.digests)
    with _readable_errors():
        freed = clear(CacheSpace(settings_from(args).cache_dir), args.digests)
    answer(args, {"freed_bytes": freed}, f"freed {size_text(freed)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from obdlab.cache.admin import blobs_of, check_blob, entries
    from obdlab.cache.space import CacheSpace

    _check_digests(args.digests)
    space = CacheSpace(settings_from(args).cache_dir)
    checked: list[CheckedBlob] = []
    with _readable_errors():
        total = sum(e.cached_bytes for e in entries(space) if not args.digests or e.digest in args.digests)
        with progress_bar("verifying", total, quiet=args.json) as progress:
            for directory in blobs_of(space, args.digests):
                blob = check_blob(space, directory, repair=args.repair, progress=progress)
                checked += [blob] if blob is not None else []
    damaged = [blob for blob in checked if not blob.sound]
    if args.json:
        print_json([asdict(blob) | {"sound": blob.sound} for blob in checked], indent=2)
    else:
        for blob in damaged:
            print(_damage(blob, args.repair))
        size = size_text(sum(blob.checked_bytes for blob in checked))
        print(f"{len(checked)} blobs, {size} sound; {len(damaged)} blobs damaged")
    return 1 if damaged and not args.repair else 0


def _damage(blob: CheckedBlob, repaired: bool) -> str:
    if blob.matches is False:
        what = "all of it is there, and does not match its digest"
    else:
        places = ", ".join(map(str, blob.damaged[:8])) + (", ..." if len(blob.damaged) > 8 else "")
        what = f"{len(blob.damaged)} damaged units (at {places})"
    return f"{blob.registry}/{blob.digest}: {what}{'; taken away' if repaired else ''}"


def _check_digests(digests: list[str]) -> None:
    from obdlab.formats.oci import check_digest

    for digest in digests:
        check_digest(digest, "command line")


@contextmanager
def _readable_errors() -> Iterator[None]:
    from obdlab.errors import SourceError

    try:
        yield
    except PermissionError:
        raise  # the command line has its own words for that
    except OSError as error:
        raise SourceError(f"{error.strerror} ({error.filename})" if error.filename else str(error)) from error
