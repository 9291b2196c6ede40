"""Paths that callers of the snapshot service may name, and the token that authenticates them on TCP."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import DeviceError
from obdlab.image.config import ImageConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

#: In the run directory.
TOKEN_NAME = "snapshot-api.token"
API_SOCKET_NAME = "snapshot-api.sock"
_LEAST_TOKEN = 16
_MOST_TOKEN = 4096


def check_paths(device_config: Path, new_config: Path, roots: Iterable[Path]) -> Path:
    """Return the real path of a new configuration that a caller names.

    It and the files of its writable layer must be regular files below one of ``roots``, or below the directories of
    the device's present configuration and writable layer. Raises DeviceError or ConfigError.
    """
    present = ImageConfig.load(device_config).upper
    allowed = [root.resolve() for root in roots] + [device_config.resolve().parent]
    if present.active:
        allowed.append(_real(present.data).parent)
    real = _checked(new_config, allowed)
    upper = ImageConfig.load(real).upper
    for name in (upper.data, upper.index):
        if name:
            _checked(name, allowed)
    return real


def _checked(name: str | Path, allowed: list[Path]) -> Path:
    real = _real(name)
    if not any(real.is_relative_to(root) for root in allowed):
        raise DeviceError(f"{name}: not below an allowed directory ({', '.join(map(str, allowed))})")
    try:
        mode = os.lstat(real).st_mode
    except OSError as error:
        raise DeviceError(f"{name}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise DeviceError(f"{name}: not a regular file")
    return real


def _real(name: str | Path) -> Path:
    path = Path(name)
    if not path.is_absolute():
        raise DeviceError(f"{name}: not an absolute path")
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a zero byte
        raise DeviceError(f"{str(name)[:200]!r}: no such path: {error}") from error


def read_token(path: Path) -> str:
    """Return the token in a file; make the file with a random token if it is missing.

    Raises DeviceError if the file is another user's, or if other users may read it.
    """
    try:
        if not os.path.lexists(path):
            _make_token(path)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(f"{path}: cannot read the token: {error.strerror}") from error
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o077:
            raise DeviceError(
                f"{path}: not a file for its user alone (owner {found.st_uid}, mode "
                f"{stat.S_IMODE(found.st_mode):04o}, wanted 0600)"
            )
        token = file.read(_MOST_TOKEN + 1).strip()
    if not _LEAST_TOKEN <= len(token) <= _MOST_TOKEN or not token.isascii() or len(token.split()) != 1:
        raise DeviceError(f"{path}: not a token ({_LEAST_TOKEN} to {_MOST_TOKEN} ASCII characters without blanks)")
    return token.decode()


def _make_token(path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        os.link(temporary, path)
    except FileExistsError:  # another process was faster
        pass
    finally:
        os.unlink(temporary)
