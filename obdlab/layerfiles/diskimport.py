"""Importing disk images of virtual machines, raw or qcow2, as layers.

A qcow2 file is decoded by ``qemu-img``. Its header is checked first: an image that names other files (a backing
file, an external data file) could make qemu-img read any file of this host, and is refused.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import tempfile
import time
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import FormatError, ObdlabError, SourceError
from obdlab.layerfiles.partitions import find_root
from obdlab.layerfiles.rawdisk import RawDisk
from obdlab.layerfiles.writing import write_layer
from obdlab.localfile import LocalFile
from obdlab.system.newfile import check_absent
from obdlab.system.programs import running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.layerfiles.writing import Packing, Progress
    from obdlab.layers.commit import Committed

KINDS = ("raw", "qcow2")
_QCOW2_MAGIC = b"QFI\xfb"
# magic, version, backing file offset and size, cluster bits, size of the disk (docs/interop/qcow2 of QEMU)
_QCOW2 = struct.Struct(">4sIQIIQ")
_FEATURES_OFFSET = 72
# Incompatible features that make no difference to a reader of the file: dirty, corrupt, compression type, extended
# L2 entries. Bit 2 is the external data file.
_HARMLESS_FEATURES = 0b11011
#: qemu-img is stopped when it has written nothing for this long.
STALL_TIMEOUT_S = 600.0
_LOOK_EVERY_S = 0.1
_CHECKED = ("corruptions", "image-end-offset", "compressed-clusters")
_NO_QEMU_IMG = (
    "qcow2 images are read by qemu-img, which is not installed (Debian and Ubuntu: apt install qemu-utils; "
    "Fedora: dnf install qemu-img)"
)
# qemu-img convert -p prints "    (12.34/100%)" and a carriage return, repeatedly.
_PERCENT = re.compile(rb"\((\d{1,3}(?:\.\d+)?)/100%\)")


class ImportDiskError(ObdlabError, code="import-disk"):
    """A disk image cannot be imported: qemu-img is missing, or failed."""


def disk_kind(path: str | os.PathLike[str]) -> str:
    """Return "qcow2" if the file starts as one, else "raw". Raises SourceError if it cannot be read."""
    with LocalFile(path) as file:
        return "qcow2" if file.read_at(0, min(4, file.size)) == _QCOW2_MAGIC else "raw"


def disk_size(path: str | os.PathLike[str], kind: str) -> int:
    """Return the bytes of the disk in an image. Raises FormatError for a qcow2 file that is refused."""
    with LocalFile(path) as file:
        return file.size if kind == "raw" else _check_qcow2(file)


def work_size(path: str | os.PathLike[str], kind: str) -> int:
    """Return the bytes that ``progress`` gets: those of the disk, twice if it is unpacked first."""
    return disk_size(path, kind) * (1 if kind == "raw" else 2)


def import_disk(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    packing: Packing,
    *,
    kind: str,
    uuid: str = "",
    user_tag: str = "",
    force: bool = False,
    partition: int | None = None,
    progress: Progress | None = None,
) -> Committed:
    """Write a disk as a new base layer; blocks of 4 KiB that are all zeros are left out.

    ``partition`` is the number of the one to write, 0 for that of the root file system
    (:func:`obdlab.layerfiles.partitions.find_root`); None: the whole disk, partition table and all.
    A qcow2 image is unpacked beside ``path`` first, into a sparse file that is deleted afterwards. ``progress`` gets
    :func:`work_size` bytes, while the disk is unpacked and read. Raises ImportDiskError, FormatError, SourceError,
    OutputError.
    """
    check_absent(path, force=force)
    with _as_raw(Path(source), Path(path), kind, progress) as raw, closing(_part(raw, partition, progress)) as disk:
        return write_layer(disk, path, packing, uuid=uuid, user_tag=user_tag, force=force)


def _part(raw: Path, partition: int | None, progress: Progress | None) -> RawDisk:
    if partition is None:
        return RawDisk(raw, progress)
    with LocalFile(raw) as file:
        found = find_root(file, partition)
        if progress is not None:
            progress(file.size - found.size)
    return RawDisk(raw, progress, begin=found.begin, size=found.size)


@contextmanager
def _as_raw(source: Path, target: Path, kind: str, progress: Progress | None) -> Iterator[Path]:
    if kind == "raw":
        yield source
        return
    with LocalFile(source) as file:
        size = _check_qcow2(file)
        _check_whole(source.absolute(), file.size)
    try:
        directory = tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise SourceError(f"cannot be made ({error.strerror})", blob=str(target)) from error
    with directory as name:
        raw = Path(name) / "disk.raw"
        _run_qemu_img(source.absolute(), raw, partial(_report, progress, size))
        yield raw


def _image_options(source: Path) -> str:
    # --image-opts takes the file name literally except for commas; a plain argument could be a URL of qemu's.
    name = str(source).replace(",", ",,")
    return f"driver=qcow2,file.driver=file,file.filename={name}"


def _check_whole(source: Path, size: int) -> None:
    # qemu-img reads zeros past the end of a truncated file.
    command = ["qemu-img", "check", "--output=json", "--image-opts", _image_options(source)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=STALL_TIMEOUT_S, check=False
        )
        told = json.loads(done.stdout)
        wrong, end, compressed = (int(told.get(key, 0)) for key in _CHECKED)
    except FileNotFoundError as error:
        raise ImportDiskError(_NO_QEMU_IMG) from error
    except subprocess.TimeoutExpired as error:
        raise ImportDiskError(f"{source}: qemu-img did not end within {STALL_TIMEOUT_S:g} s") from error
    except (ValueError, TypeError, AttributeError):
        return  # unpacking reports the error
    # Compressed clusters may end before the space that is counted for them.
    if wrong or (end > size and not compressed):
        raise FormatError(
            "qcow2 image is cut off or damaged, as qemu-img check says",
            blob=str(source),
            got=f"{size} bytes, {wrong} errors",
            wanted=f"{end} bytes",
        )


def _run_qemu_img(source: Path, raw: Path, report: Callable[[int, int], int]) -> None:
    command = [
        "qemu-img", "convert", "-p", "-S", "4k", "-O", "raw", "--image-opts", _image_options(source), str(raw),
    ]  # fmt: skip
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as percents:
        try:
            with running(command, stdout=percents, stderr=said) as process:
                status = _wait(process, raw, partial(report, percents.fileno()))
        except FileNotFoundError as error:
            raise ImportDiskError(_NO_QEMU_IMG) from error
        if status:
            said.seek(0)
            text = said.read(4096).decode(errors="replace").strip() or f"exit status {status}"
            raise ImportDiskError(f"{source}: qemu-img failed: {text}")


def _report(progress: Progress | None, size: int, descriptor: int, done: int) -> int:
    # Reports the progress since `done` bytes of `size`, by the last percentage in the file; returns the new `done`.
    end = os.fstat(descriptor).st_size
    found = _PERCENT.findall(os.pread(descriptor, 64, max(0, end - 64)))
    now = max(done, min(size, int(size * float(found[-1]) / 100))) if found else done
    if progress is not None and now > done:
        progress(now - done)
    return now


def _wait(process: subprocess.Popen[bytes], raw: Path, report: Callable[[int], int]) -> int:
    seen, since = -1, time.monotonic()
    done = 0
    while True:
        try:
            status = process.wait(_LOOK_EVERY_S)
            report(done)
            return status
        except subprocess.TimeoutExpired:
            done = report(done)
        written = raw.stat().st_blocks if raw.exists() else 0
        if written != seen:
            seen, since = written, time.monotonic()
        elif time.monotonic() - since > STALL_TIMEOUT_S:
            raise ImportDiskError(f"{raw}: qemu-img wrote nothing for {STALL_TIMEOUT_S:g} s")


def _check_qcow2(file: LocalFile) -> int:
    start = file.read_at(0, min(_FEATURES_OFFSET + 8, file.size))
    if len(start) < _FEATURES_OFFSET or not start.startswith(_QCOW2_MAGIC):
        raise FormatError("no qcow2 image", blob=file.name, offset=0, got=start[:4].hex(), wanted=_QCOW2_MAGIC.hex())
    _, version, backing_offset, _, _, size = _QCOW2.unpack_from(start)
    if version not in (2, 3):
        raise FormatError("unknown qcow2 version", blob=file.name, offset=4, got=version, wanted="2 or 3")
    if backing_offset:
        raise FormatError(
            "qcow2 image has a backing file; make it whole first (qemu-img rebase, or convert)",
            blob=file.name,
            offset=8,
        )
    features = int.from_bytes(start[_FEATURES_OFFSET:], "big") if version == 3 else 0
    if features & ~_HARMLESS_FEATURES:
        raise FormatError(
            "qcow2 image has features that are not taken (bit 2: external data file)",
            blob=file.name,
            offset=_FEATURES_OFFSET,
            got=f"{features:#x}",
            wanted=f"none but {_HARMLESS_FEATURES:#x}",
        )
    return int(size)
