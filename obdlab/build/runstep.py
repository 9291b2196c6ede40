"""RUN: a command in a container whose root is the stage's disk."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from obdlab.server.capture.container import TemporaryContainer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from obdlab.build.dockerfile import Instruction
    from obdlab.build.stagedisk import StageDisk

NETWORKS = NONE, HOST = ("none", "host")
#: Most bytes of a secret.
_MOST_SECRET = 1 << 20
# What runc makes in a root that lacks it, for mounts: no part of a step's result.
_MOUNT_POINTS = (b"proc", b"sys", b"dev", b"etc/resolv.conf", b"etc/hosts", b"etc")
_SECRETS = "/run/secrets"


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret that a command sees as a file: its source on this host, the path in the container, owner and mode."""

    source: Path
    target: str
    uid: int = 0
    gid: int = 0
    mode: int = 0o400


@dataclass(frozen=True, slots=True)
class Command:
    """A command and its surroundings."""

    words: Sequence[str]
    config: Mapping[str, Any]
    host_network: bool = False
    secrets: Sequence[Secret] = field(default=())


def run(command: Command, disk: StageDisk, place: Path, output: int) -> int:
    """Run a command on a stage's disk; return its exit status. Raises DeviceError if it cannot be started.

    All processes of the container have ended then, and mount points that were made for it are gone. Secrets lie in
    ``place`` alone, a directory in memory.
    """
    place.mkdir()
    missing = [path for path in _MOUNT_POINTS if disk.inside.status(path, follow=False) is None]
    try:
        mounts, made = _secret_mounts(command, disk, place)
        if command.host_network and b"etc/resolv.conf" in missing:
            made.append(b"etc/resolv.conf")
        mounts.append(_hosts(command, place))
        with TemporaryContainer(
            _made(place / "bundle"),
            disk.root,
            command.config,
            command=command.words,
            host_network=command.host_network,
            in_place=True,
            mounts=mounts,
            output=output,
            release=disk.release,
        ) as container:
            container.wait(None, lambda: False)
            status = container.status
        _remove(disk, [*made, *missing])
        return 1 if status is None else status
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


# Names of this host are no part of an image, and without the file many programs do not know "localhost".
def _hosts(command: Command, place: Path) -> dict[str, Any]:
    source = "/etc/hosts"
    if not (command.host_network and os.path.exists(source)):
        path = place / "hosts"
        path.write_text("127.0.0.1\tlocalhost\n::1\tlocalhost\n")
        path.chmod(0o644)
        source = str(path)
    return {"destination": "/etc/hosts", "type": "bind", "source": source, "options": ["rbind", "ro"]}


def _secret_mounts(command: Command, disk: StageDisk, place: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    mounts: list[dict[str, Any]] = []
    made: list[bytes] = []
    for number, secret in enumerate(command.secrets):
        copy = place / f"secret-{number}"
        data = secret.source.read_bytes()
        descriptor = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            os.fchown(descriptor, secret.uid, secret.gid)
            os.fchmod(descriptor, secret.mode)
        mounts.append(
            {"destination": secret.target, "type": "bind", "source": str(copy), "options": ["bind", "ro", "nosuid"]}
        )
        path = os.fsencode(secret.target).strip(b"/")
        while path and disk.inside.status(path, follow=False) is None:
            made.append(path)
            path = os.path.dirname(path)
    return mounts, made


# Removes empty files and directories alone: a command may have put something there.
def _remove(disk: StageDisk, paths: Sequence[bytes]) -> None:
    for path in paths:
        with suppress(OSError), disk.inside.parent(path) as (parent, name):
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                os.rmdir(name, dir_fd=parent)
            elif stat.S_ISREG(found.st_mode) and not found.st_size:
                os.unlink(name, dir_fd=parent)


def secret_of(instruction: Instruction, text: str, known: Mapping[str, Path]) -> Secret | None:
    """Return the secret of a RUN's --mount=type=secret,... ; None for one that is not given and not required.

    Raises BuildError for another type of mount, an unknown key or a secret that is missing.
    """
    values: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        values[key.lower()] = value if equals else "true"
    kind = values.pop("type", "bind")
    if kind != "secret":
        raise instruction.error(f"--mount: type {kind!r} is not supported (wanted type=secret)")
    unknown = set(values) - {"id", "target", "dst", "destination", "required", "mode", "uid", "gid"}
    if unknown:
        raise instruction.error(f"--mount: unknown key {min(unknown)!r} of a secret")
    target = values.get("target") or values.get("dst") or values.get("destination") or ""
    name = values.get("id") or os.path.basename(target)
    if not name:
        raise instruction.error("--mount: a secret without id and target")
    source = known.get(name)
    if source is None:
        if values.get("required", "false").lower() in ("true", "1"):
            raise instruction.error(
                f"--mount: secret {name!r} is required and not given (--secret id={name},src=FILE)"
            )
        return None
    if not source.is_file() or source.stat().st_size > _MOST_SECRET:
        raise instruction.error(f"--mount: secret {name!r}: {source} is no file of at most {_MOST_SECRET} bytes")
    try:
        owner = int(values.get("uid", "0")), int(values.get("gid", "0"))
        mode = int(values.get("mode", "0400"), 8)
    except ValueError:
        raise instruction.error("--mount: uid, gid and mode are numbers, the mode in octal") from None
    path = os.path.normpath(os.path.join("/", target or f"{_SECRETS}/{name}"))
    return Secret(source, path, *owner, mode=mode)
