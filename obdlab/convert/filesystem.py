"""The ext4 that images are written in, and the process that applies a layer to it.

The file system is read over a network, block by block, so its layout serves cold starts: no journal, all metadata
packed at the front (one flex group, no backups of superblock and descriptors in between), tables that are not
zeroed until used. UUID and hash seed are fixed: converted images must not be told apart by them.
"""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from typing import IO, TYPE_CHECKING

from obdlab.convert.apply import ApplyError, ApplyStatistics
from obdlab.convert.worker import Job, pack_job, read_result
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FS_TYPE = "ext4"
#: No journal: barriers and discards would only cost. Inode tables stay unwritten until they are needed.
MOUNT_OPTIONS = "noinit_itable,nobarrier,nodiscard,errors=remount-ro"
_UUID = "6f62646c-6162-4d69-8d61-6765732d6f31"
_FEATURES = "none,dir_index,dir_nlink,extent,64bit,ext_attr,extra_isize,filetype,flex_bg,huge_file,large_file,\
metadata_csum,sparse_super,sparse_super2"
_EXTENDED = f"packed_meta_blocks=1,num_backup_sb=0,lazy_itable_init=1,nodiscard,hash_seed={_UUID},root_owner=0:0"
# More groups than any image has: one flex group.
_FLEX_GROUPS = 1 << 20
_MKFS_TIMEOUT_S = 120.0
#: The worker takes no data for this long: it hangs. Long, as a slow disk writes out what was cached meanwhile.
_STALL_TIMEOUT_S = 300.0
_FINISH_TIMEOUT_S = 900.0
_KILL_TIMEOUT_S = 10.0
_PIPE_SIZE = 1 << 20


def make_filesystem(device: Path, *, offset: int = 0, size: int | None = None) -> None:
    """Make an empty ext4 on a device, or on ``size`` bytes from ``offset`` of a file, that read as zeros.

    Raises DeviceError with what mkfs said.
    """
    place = f",offset={offset}" if offset else ""
    command = [
        "mkfs.ext4", "-q", "-F",
        "-b", "4096", "-I", "256", "-i", "16384", "-m", "0",
        "-O", _FEATURES, "-G", str(_FLEX_GROUPS), "-U", _UUID,
        "-E", f"{_EXTENDED}{place}",
        str(device), *([] if size is None else [f"{size // 1024}k"]),
    ]  # fmt: skip
    try:
        # Without its own configuration file, for the same result everywhere; times are fixed by the variable.
        done = subprocess.run(
            command,
            env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "MKE2FS_CONFIG": "/dev/null", "E2FSPROGS_FAKE_TIME": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_MKFS_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise DeviceError("mkfs.ext4 is not installed (Debian package e2fsprogs)") from error
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{device}: mkfs.ext4 did not end within {_MKFS_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise DeviceError(f"{device}: mkfs.ext4 failed: {done.stderr.decode(errors='replace').strip()}")


def apply_to_device(tar: Iterable[bytes], device: Path, *, blob: str, work_dir: Path, fresh: bool) -> ApplyStatistics:
    """Apply an uncompressed layer tar, given in pieces, to the file system of a writable device.

    The file system is mounted in a process of its own and gone from the kernel when this returns or raises.
    ``work_dir`` gets the log of that process; ``fresh`` tells that :func:`make_filesystem` just ran.
    Raises FormatError for a malformed or escaping tar, ApplyError if it cannot be written, and what ``tar`` raises.
    """
    job = Job(str(device), MOUNT_OPTIONS, blob, fresh)
    with (work_dir / "worker.log").open("w+b") as log:
        return _run_worker(job, tar, log)


def _run_worker(job: Job, tar: Iterable[bytes], log: IO[bytes]) -> ApplyStatistics:
    # A session of its own: an interrupt from the terminal is for this process, which then ends the worker.
    worker = subprocess.Popen(
        [sys.executable, "-m", "obdlab.convert.worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
    )  # fmt: skip
    assert worker.stdin is not None
    assert worker.stdout is not None
    with worker.stdin as stdin, worker.stdout as stdout:
        try:
            if _feed(stdin.fileno(), job, tar):
                stdin.close()
            result = _read_all(stdout.fileno(), job.blob)
            worker.wait(_FINISH_TIMEOUT_S)
        except BaseException:
            # The tar is wrong or incomplete, or the user gave up: nothing of this layer will be used.
            worker.kill()
            # It may hang in the device; that ends when the device is taken away, which is the caller's next step.
            with suppress(subprocess.TimeoutExpired):
                worker.wait(_KILL_TIMEOUT_S)
            raise
    if not result:
        log.seek(0)
        said = log.read(4096).decode(errors="replace").strip() or f"exit status {worker.returncode}"
        raise ApplyError(f"{job.blob}: the process that applies the layer failed: {said}")
    return read_result(result, job.blob)


def _feed(pipe: int, job: Job, tar: Iterable[bytes]) -> bool:
    # False if the worker ended before it had everything; it tells why on its standard output.
    os.set_blocking(pipe, False)
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    try:
        _write_all(pipe, pack_job(job), job.blob)
        for piece in tar:
            _write_all(pipe, piece, job.blob)
    except BrokenPipeError:
        return False
    return True


def _write_all(pipe: int, piece: bytes, blob: str) -> None:
    view = memoryview(piece)
    while view:
        try:
            view = view[os.write(pipe, view) :]
        except BlockingIOError:
            _, writable, _ = select.select((), (pipe,), (), _STALL_TIMEOUT_S)
            if not writable:
                raise ApplyError(f"{blob}: the device took nothing for {_STALL_TIMEOUT_S:g} s") from None


def _read_all(pipe: int, blob: str) -> bytes:
    deadline = time.monotonic() + _FINISH_TIMEOUT_S
    data = b""
    while True:
        ready, _, _ = select.select((pipe,), (), (), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise ApplyError(f"{blob}: the layer was not written out within {_FINISH_TIMEOUT_S:g} s")
        piece = os.read(pipe, 1 << 16)
        if not piece:
            return data
        data += piece
