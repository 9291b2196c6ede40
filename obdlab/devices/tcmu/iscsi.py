"""Exports a TCMU backstore over iSCSI, through the kernel's target (LIO), to named initiators only."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices.tcmu import configfs
from obdlab.errors import DeviceError
from obdlab.system.attributes import write_attribute

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.devices.tcmu.configfs import Target

#: Names as of RFC 3720 3.2.6: iqn.YYYY-MM.reversed.domain[:anything].
_NAME = re.compile(r"iqn\.\d{4}-\d{2}\.[a-z0-9][a-z0-9.-]*(:[a-z0-9.:_-]+)?")
_NAME_MOST = 223
_PORTAL = re.compile(r"(\d+\.\d+\.\d+\.\d+|\[[0-9a-fA-F:]+\]):\d{1,5}")


def export(target: Target, name: str, portals: Sequence[str], initiators: Sequence[str]) -> None:
    """Offer a backstore as logical unit 0 of the iSCSI target ``name``, without a password.

    ``portals`` are the addresses it listens at, "address:port"; ``initiators`` are the names allowed to log in.
    Raises DeviceError, leaving nothing: a name or portal is malformed, the target exists, the kernel has no iSCSI
    target.
    """
    _check(name, portals, initiators)
    directory = configfs.TARGET / "iscsi" / name
    if directory.exists():
        raise DeviceError(f"{directory}: there is such a target already")
    group = directory / "tpgt_1"
    unit = group / "lun" / "lun_0"
    try:
        os.makedirs(unit)
        os.symlink(target.backstore, unit / target.backstore.name)
        # Only the named initiators may log in; they need no password.
        for attribute in ("generate_node_acls", "authentication"):
            write_attribute(group / "attrib" / attribute, "0")
        for initiator in initiators:
            mapped = group / "acls" / initiator / "lun_0"
            os.makedirs(mapped)
            os.symlink(unit, mapped / "lun_0")
        for portal in portals:
            os.mkdir(group / "np" / portal)
        write_attribute(group / "enable", "1")
    except OSError as error:
        _remove(directory)
        raise DeviceError(
            f"{directory}: cannot export ({error.strerror}): is iscsi_target_mod there, and the address this host's?"
        ) from error


def unexport(target: Target) -> list[str]:
    """End all exports of a backstore; return their names. Initiators get I/O errors. Raises DeviceError."""
    found = []
    for link in (configfs.TARGET / "iscsi").glob(f"*/tpgt_*/lun/lun_*/{target.backstore.name}"):
        if link.is_symlink() and link.resolve() == target.backstore.resolve():
            directory = link.parents[3]
            _remove(directory)
            found.append(directory.name)
    return found


def _check(name: str, portals: Sequence[str], initiators: Sequence[str]) -> None:
    for each in (name, *initiators):
        if not _NAME.fullmatch(each) or len(each) > _NAME_MOST:
            raise DeviceError(f"no iSCSI name (got {each!r}, wanted iqn.YYYY-MM.domain:name, in lower case)")
    for portal in portals:
        if not _PORTAL.fullmatch(portal):
            raise DeviceError(f"no portal of an iSCSI target (got {portal!r}, wanted ADDRESS:PORT)")
    if not portals or not initiators:
        raise DeviceError(f"{name}: nobody could log in (wanted a portal and an initiator at least)")


def _remove(directory: Path) -> None:
    for group in directory.glob("tpgt_*"):
        _disable(group)
        for pattern in ("np/*", "acls/*/lun_*/lun_*", "acls/*/lun_*", "acls/*", "lun/lun_*/*", "lun/lun_*"):
            for path in group.glob(pattern):
                # Directories that the kernel made go with their parent.
                if path.is_symlink() or (path.is_dir() and path.name not in _KERNELS):
                    configfs.take_away(path)
        configfs.take_away(group)
    configfs.take_away(directory)


_KERNELS = ("alua", "statistics", "attrib", "auth", "param", "fabric_statistics")


def _disable(group: Path) -> None:
    try:
        write_attribute(group / "enable", "0")
    except OSError:  # was not enabled
        pass
