"""A turboOCI layer that is made in steps: its files between them, and its commit.

The data file is a sparse writable layer with the file system's metadata, the index file has the mapped ranges of the
target (:meth:`TargetDisk.saved_mapping`). The original keeps the same in another form, so that its tools and obdlab's
are not to be mixed between create and commit.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import FormatError, SourceError
from obdlab.formats.lsmt.layout import HEADER_SPACE, RECORD_SIZE
from obdlab.layerfiles.writing import write_packed
from obdlab.layers.targetdisk import TargetDisk
from obdlab.layers.upper import SparseUpper
from obdlab.system.newfile import new_file, replace_file

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from obdlab.layerfiles.writing import Packing
    from obdlab.layers.commit import Committed
    from obdlab.layers.stack import Stack

_MOST_RECORDS = 1_000_000


@contextmanager
def opened_target_disk(
    data: str | os.PathLike[str],
    index: str | os.PathLike[str],
    lowers: Stack | None = None,
    *,
    read_only: bool = False,
) -> Iterator[TargetDisk]:
    """Give the disk of a turboOCI layer in the making for the block, and store its mapping at the end.

    Nothing of the mapping is stored if the block fails. ``lowers`` stay open. Raises FormatError, SourceError.
    """
    upper = SparseUpper.open(data, read_only=read_only)
    try:
        disk = TargetDisk(lowers, upper)
        disk.restore_mapping(_read(Path(index)))
        yield disk
        if not read_only:
            disk.flush()
            _store(Path(index), disk.saved_mapping())
    finally:
        upper.close()


def commit_turbo_layer(
    data: str | os.PathLike[str],
    index: str | os.PathLike[str],
    output: str | os.PathLike[str],
    packing: Packing,
    *,
    force: bool = False,
) -> Committed:
    """Write a turboOCI layer in the making as a warp layer. Raises OutputError, FormatError, SourceError."""
    with opened_target_disk(data, index, read_only=True) as disk, new_file(output, force=force) as file:
        return write_packed(file, packing, disk.commit, name=str(output))[0]


def _read(path: Path) -> bytes:
    most = HEADER_SPACE + _MOST_RECORDS * RECORD_SIZE
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise SourceError(f"cannot be read ({error.strerror})", blob=str(path)) from error
    if len(content) > most:
        raise FormatError("index file is too long", blob=str(path), wanted=f"at most {most} bytes")
    return content


def _store(path: Path, content: bytes) -> None:
    try:
        replace_file(path, content, private=False)
    except OSError as error:
        raise SourceError(f"cannot be written ({error.strerror})", blob=str(path)) from error
