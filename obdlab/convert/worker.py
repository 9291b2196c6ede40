"""The process that applies one layer, with the file system as its root directory.

The file system is mounted nowhere in the tree, so that the end of this process, whatever its cause, is also the end
of the mount. (A mount namespace of its own would do that too, but would hold copies of everybody's mounts meanwhile,
and their devices could not be detached.) Absolute symbolic links of the layer stay inside, as the root directory is
that of the image.

Wire: standard input brings one :func:`pack_job` and then the uncompressed tar to its end; standard output gets one
JSON object, the statistics or the error. Everything that is needed is imported before the root changes.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from dataclasses import asdict, dataclass
from typing import IO

from obdlab.convert.apply import ApplyError, ApplyStatistics, apply_layer
from obdlab.devices import abi
from obdlab.errors import FormatError

_ATTRIBUTES = abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC | abi.MOUNT_ATTR_NOATIME
_LENGTH = struct.Struct("<I")
_MAX_JOB_SIZE = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Job:
    """What to do: mount ``device``, apply the layer that errors call ``blob``."""

    device: str
    #: As of mount(8), comma-separated.
    mount_options: str
    blob: str
    #: The file system was just made: it is emptied, its root gets fixed times.
    fresh: bool


def pack_job(job: Job) -> bytes:
    """Return what a worker reads before the tar."""
    data = json.dumps(asdict(job)).encode()
    return _LENGTH.pack(len(data)) + data


def read_result(text: bytes, blob: str) -> ApplyStatistics:
    """Return what a worker wrote when it was done, or raise the error it met (FormatError, ApplyError)."""
    try:
        result = json.loads(text)
        if "statistics" in result:
            return ApplyStatistics(**result["statistics"])
    except (ValueError, TypeError):
        raise ApplyError(f"{blob}: the process that applies the layer ended without a result") from None
    error = result["error"]
    if "what" in error:
        raise FormatError(error["what"], blob=blob, offset=error["offset"], got=error["got"], wanted=error["wanted"])
    raise ApplyError(error["message"])


def main() -> int:
    """Run the job on standard input."""
    # Unbuffered: the tar's bytes belong to the reader of the tar.
    with os.fdopen(0, "rb", buffering=0, closefd=False) as stdin:
        job = _read_job(stdin)
        try:
            result: dict[str, object] = {"statistics": asdict(run(job, stdin))}
        except FormatError as error:
            got, wanted = (None if value is None else str(value) for value in (error.got, error.wanted))
            result = {"error": {"what": error.what, "offset": error.offset, "got": got, "wanted": wanted}}
        except (ApplyError, OSError) as error:
            result = {"error": {"message": str(error)}}
    os.write(1, json.dumps(result).encode())
    return 0 if "statistics" in result else 1


def run(job: Job, tar: IO[bytes]) -> ApplyStatistics:
    """Mount, apply, write everything out and unmount. Raises FormatError, ApplyError or OSError."""
    options = {name: value or None for name, _, value in (o.partition("=") for o in job.mount_options.split(","))}
    root = abi.mount_detached("ext4", {"source": job.device, **options}, _ATTRIBUTES)
    outside = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    os.fchdir(root)
    os.chroot(".")
    if job.fresh:
        os.rmdir("/lost+found")
        os.utime("/", ns=(0, 0))
    statistics = apply_layer(tar, job.blob)
    _sync_file_system(job.blob)
    # Letting go of it here unmounts it here, while errors can still be told.
    os.fchdir(outside)
    os.chroot(".")
    os.close(outside)
    os.close(root)
    return statistics


def _sync_file_system(blob: str) -> None:
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY)  # a mount's own descriptor is for paths only
    try:
        if _libc.syncfs(root) != 0:
            raise ApplyError(f"{blob}: the layer could not be written out: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(root)


def _read_job(stdin: IO[bytes]) -> Job:
    (length,) = _LENGTH.unpack(_read_exactly(stdin, _LENGTH.size))
    if length > _MAX_JOB_SIZE:
        raise ValueError(f"job of {length} bytes")
    return Job(**json.loads(_read_exactly(stdin, length)))


def _read_exactly(stdin: IO[bytes], length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = stdin.read(length - len(data))
        if not piece:
            raise EOFError("standard input ends inside the job")
        data += piece
    return data


if __name__ == "__main__":
    sys.exit(main())
