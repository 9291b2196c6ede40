"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from obdlab.errors import ObdlabError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator


class OutputError(ObdlabError, code="output"):
    """A file to be made exists already."""


@contextmanager
def new_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that becomes ``path`` when the block succeeds; otherwise nothing is left of it.

    It is written under another name in the same directory, synced, and renamed. ``force`` replaces an existing file;
    without it OutputError is raised if ``path`` exists, before or at the end. Raises SourceError naming ``path`` if
    the system refuses.
    """
    import tempfile

    target = Path(path)
    check_absent(target, force=force)
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise SourceError(f"cannot be made ({error.strerror})", blob=str(target)) from error
    try:
        with os.fdopen(descriptor, "w+b", buffering=0) as file:
            yield file
            os.fchmod(descriptor, 0o666 & ~_umask())
            os.fsync(descriptor)
        _place(temporary, target, force)
    except OSError as error:
        raise SourceError(f"cannot be written ({error.strerror or error})", blob=str(target)) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def replace_file(path: str | os.PathLike[str], data: bytes, *, private: bool = True, sync: bool = False) -> None:
    """Write a whole file in one step: a reader finds the old content or the new one, whole. Raises OSError.

    A ``private`` file has mode 0600. With ``sync`` the new content is on stable storage before the old one is gone.
    """
    import tempfile

    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if not private:
                os.fchmod(descriptor, 0o666 & ~_umask())
            if sync:
                os.fsync(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def check_absent(path: str | os.PathLike[str], *, force: bool) -> None:
    """Raise OutputError if ``path`` exists and may not be replaced."""
    if not force and os.path.lexists(path):
        raise _exists(path)


def _place(temporary: str, target: Path, force: bool) -> None:
    if force:
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)  # unlike a rename, this fails if another was faster
    except FileExistsError:
        raise _exists(target) from None
    except OSError:  # a file system without hard links
        os.rename(temporary, target)


def _exists(path: str | os.PathLike[str]) -> OutputError:
    return OutputError(
        f"{os.fspath(path)}: exists already, and may not be replaced unless that is asked for (--force)"
    )


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
