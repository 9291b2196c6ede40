"""Kills a process before and after each change it makes to the file system while it unpacks, or evicts, disks.

``python -m tests.cache.unpackingkills DIRECTORY store|evict`` checks the cache after each kill, and prints how many
there were.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cache.admin import collect, unpacked_disks
from obdlab.cache.eviction import FRESH_S, EvictingSpace, evict
from obdlab.cache.space import disk_usage
from obdlab.cache.unpacked import PIECE, FlatFiles

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = ("mkdir", "rename", "unlink", "rmdir", "write", "pwrite", "truncate", "fsync", "fdatasync", "open")
SIZE = 3 * PIECE
QUOTA = 8 * PIECE
#: Blocks of directories that a process made just before it was killed.
DIRECTORIES = 2 * 4096
#: A disk that goes to make room, one that stays, and one that is unpacked.
OLD, STAYS, NEW = "old", "stays", "new"
CONTENT = {name: random.Random(name).randbytes(SIZE) for name in (OLD, STAYS, NEW)}


def store(files: FlatFiles, name: str) -> None:
    files.store(name, SIZE, SIZE, lambda offset, length: CONTENT[name][offset : offset + length])
    fd = files.take_into_use(name)
    assert fd is not None
    os.close(fd)


def prepare(directory: Path) -> None:
    files = FlatFiles(EvictingSpace(directory))
    for name, age_s in ((OLD, 3 * FRESH_S), (STAYS, 0.0)):
        store(files, name)
        mark = files.path(name).with_name("checked")
        used_s = mark.stat().st_mtime - age_s
        os.utime(mark, (used_s, used_s))


def storing(directory: Path) -> None:
    store(FlatFiles(EvictingSpace(directory, quota=QUOTA)), NEW)


def evicting(directory: Path) -> None:
    assert evict(EvictingSpace(directory, quota=5 * PIECE)) >= SIZE


def check(directory: Path) -> None:
    """Assert that each disk is whole or gone, and that collecting leaves nothing but them."""
    space = EvictingSpace(directory, quota=QUOTA)
    files = FlatFiles(space)
    ledger = struct.unpack("=8s40sq", (directory / "usage").read_bytes())[2]
    assert ledger >= disk_usage(directory) - DIRECTORIES, "the cache would grow beyond its limits"
    whole = set()
    for name, content in CONTENT.items():
        fd = files.take_into_use(name)
        if fd is not None:
            whole.add(name)
            assert os.pread(fd, SIZE + 1, 0) == content
            os.close(fd)
    assert STAYS in whole
    collect(space)
    assert {disk.name for disk in unpacked_disks(space) if disk.size} == whole
    left = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert left == {"usage"} | {f"graduated/{name}/{file}" for name in whole for file in ("disk", "sums", "checked")}
    assert space.count() == disk_usage(directory)
    if NEW not in whole:  # the next process does it
        if OLD in whole:
            (mark := files.path(OLD).with_name("checked")).touch()
            os.utime(mark, (0, 0))
        store(files, NEW)
        assert files.path(NEW).read_bytes() == CONTENT[NEW]


def killed_at(number: int, when_after: bool, run: Callable[[], None]) -> bool:
    """Run in a child that is killed before or after that call. Return False if it made fewer calls."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert status == 0, "the child failed"
        return False
    try:
        left = number

        def killing(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0 and not when_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*args, **kwargs)
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return wrapped

        for name in CALLS:
            setattr(os, name, killing(getattr(os, name)))
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    place, scenario = Path(sys.argv[1]), {"store": storing, "evict": evicting}[sys.argv[2]]
    prepare(place / "prepared")
    kills = 0
    for when_after in (False, True):
        for number in range(1, 1000):
            trial = place / "trial"
            copy_of(place / "prepared", trial)
            EvictingSpace(trial).count()
            killed = killed_at(number, when_after, partial(scenario, trial))
            check(trial)
            shutil.rmtree(trial)
            if not killed:
                break
            kills += 1
    print(kills)


def copy_of(source: Path, target: Path) -> None:
    """Copy with the times of files, which are those of their last use."""
    shutil.copytree(source, target, copy_function=shutil.copy2)


if __name__ == "__main__":
    main()
