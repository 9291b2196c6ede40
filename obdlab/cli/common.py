"""Options that several commands share, and the only reading of the environment."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.packing import size_argument
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from obdlab.formats.oci import Platform
    from obdlab.registry.client import RegistryClient
    from obdlab.server.client import DeviceService
    from obdlab.settings.settings import Settings

DEFAULT_RUN_DIR = Path("/run/obdlab")
DEFAULT_CACHE_DIR = Path("/var/lib/obdlab/cache")
DEFAULT_SETTINGS = Path("/etc/obdlab/obdlab.json")


class NeedsRootError(ObdlabError):
    """The command needs root."""


def need_root(what: str) -> None:
    """Raise NeedsRootError with the reason ``what``, unless this process is root's."""
    if os.geteuid() != 0:
        raise NeedsRootError(f"must be run as root, as it {what} (got user {os.geteuid()})")


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the run directory and the block cache."""
    group = parser.add_argument_group("where things live")
    group.add_argument(
        "--run-dir",
        type=Path,
        default=Path(os.environ.get("OBDLAB_RUN_DIR", DEFAULT_RUN_DIR)),
        help="sockets and device servers (default: $OBDLAB_RUN_DIR or %(default)s)",
    )
    add_cache_options(group)
    group.add_argument(
        "--download",
        action="store_true",
        help="fetch images in use whole into the block cache, from 5 minutes after they are opened on",
    )
    group.add_argument(
        "--audit-log",
        type=Path,
        metavar="FILE",
        help="log the reads of devices from registries, cache and disks, one line each (default: no log)",
    )
    _add_settings_option(parser)


def add_cache_options(group: argparse._ActionsContainer) -> None:
    """Add the options for the block cache."""
    group.add_argument(
        "--cache-dir",
        type=Path,
        help=f"block cache shared by all devices (default: $OBDLAB_CACHE_DIR or {DEFAULT_CACHE_DIR})",
    )
    group.add_argument(
        "--cache-quota",
        type=size_argument,
        metavar="SIZE",
        help="most that the block cache may hold, 0: no limit (default: $OBDLAB_CACHE_QUOTA or 4G)",
    )


def add_registry_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for access to registries."""
    group = parser.add_argument_group("registries")
    group.add_argument(
        "--plain-http",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="speak plain HTTP to this registry (localhost and 127.0.0.0/8 always are); repeatable",
    )
    group.add_argument(
        "--credentials",
        type=Path,
        metavar="FILE",
        help="docker config.json with credentials (default: that of $DOCKER_CONFIG or ~/.docker, if it can be read)",
    )
    _add_settings_option(parser)


def add_device_option(parser: argparse.ArgumentParser, *, daemon: bool = False) -> None:
    """Add the option for the kind of device; ``daemon`` allows devices of a TCMU daemon."""
    from obdlab.settings.settings import DAEMON_KIND

    def kind(text: str) -> str:
        try:
            _check_kind(text, daemon=daemon)
        except ObdlabError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    beside = (
        f"; {DAEMON_KIND}: devices of obdlab serve tcmu or overlaybd-tcmu, which runs on this host" if daemon else ""
    )
    parser.add_argument(
        "--device",
        type=kind,
        metavar="KIND",
        dest="device_kind",
        help=f"kind of block device, as obdlab doctor lists them; auto: the best that this host has{beside} "
        "(default: auto)",
    )


def add_trace_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the trace that is replayed."""
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help=(
            "fetch ahead the reads of this trace (obdlab trace record) or the files of this priority list, in place "
            "of the trace in the image's acceleration layer"
        ),
    )


# Both groups of options have it. The snapshotter's --config is another file.
def _add_settings_option(parser: argparse.ArgumentParser) -> None:
    for names in (("--settings", "--config"), ("--settings",)):
        try:
            parser.add_argument(
                *names,
                type=Path,
                dest="settings",
                metavar="FILE",
                help=(
                    "JSON with obdlab's settings, or the original's overlaybd.json; options given here win over it "
                    f"(default: $OBDLAB_SETTINGS, or {DEFAULT_SETTINGS} if it is there)"
                ),
            )
        except argparse.ArgumentError:  # taken already
            continue
        return


def _default_credentials() -> Path | None:
    # No default without a home directory, or without the right to look into it (sudo -u, a service's user).
    directory = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    path = Path(directory) / "config.json"
    return path if os.access(path, os.R_OK) else None


def settings_from(args: argparse.Namespace) -> Settings:
    """Return the settings of these arguments. Options win over the environment, which wins over the settings file.

    Raises SettingsError.
    """
    from obdlab.settings.original import ServiceConfig, load
    from obdlab.settings.settings import Settings

    path = getattr(args, "settings", None) or _default_settings()
    loaded = ServiceConfig(Settings()) if path is None else load(path)
    for note in loaded.notes:
        logging.getLogger(__name__).warning("%s", note)
    settings = loaded.settings
    if settings.device_kind != Settings().device_kind:
        _check_kind(settings.device_kind)
    changes: dict[str, Any] = _cache_options(args)
    if getattr(args, "download", False):
        changes |= {"download_enabled": True, "settings_path": None}
    audit_log = getattr(args, "audit_log", None)
    if audit_log is not None:
        changes["audit_path"] = audit_log.absolute()
    if getattr(args, "device_kind", None):
        changes["device_kind"] = args.device_kind
    trace = getattr(args, "trace", None)
    if isinstance(trace, Path):
        changes["trace_path"] = _existing(trace)
    log_format = os.environ.get("OBDLAB_LOG_FORMAT")
    if log_format:
        changes["log_format"] = log_format
    credentials = getattr(args, "credentials", None)
    if credentials is None and settings.credentials_mode == "file" and settings.credentials_path is None:
        credentials = _default_credentials()
    if credentials is not None:
        changes |= {"credentials_path": credentials.absolute(), "credentials_mode": "file"}
    return replace(settings, **changes)


# The settings know no kinds of devices, which other packages may add.
def _check_kind(name: str, *, daemon: bool = True) -> None:
    from obdlab.devices import kinds
    from obdlab.settings.settings import DAEMON_KIND, SettingsError

    known = (kinds.AUTOMATIC, *kinds.names(), *([DAEMON_KIND] if daemon else []))
    if name not in known:
        raise SettingsError(f"device_kind: wanted one of {', '.join(known)} (got {name!r})")


def _existing(path: Path) -> Path:
    from obdlab.settings.settings import SettingsError

    if not path.is_file():
        raise SettingsError(f"{path}: not a file, so no trace" if path.exists() else f"{path}: no such trace")
    return path.absolute()


def _cache_options(args: argparse.Namespace) -> dict[str, Any]:
    from obdlab.settings.settings import SettingsError

    changes: dict[str, Any] = {}
    directory = getattr(args, "cache_dir", None) or os.environ.get("OBDLAB_CACHE_DIR")
    if directory:
        # The device host, which gets this path, works in another directory.
        changes["cache_dir"] = Path(directory).absolute()
    quota, text = getattr(args, "cache_quota", None), os.environ.get("OBDLAB_CACHE_QUOTA")
    if quota is None and text:
        try:
            quota = size_argument(text)
        except argparse.ArgumentTypeError as error:
            raise SettingsError(f"$OBDLAB_CACHE_QUOTA: {error}") from error
    if quota is not None:
        changes["cache_quota"] = quota
    return changes


def _default_settings() -> Path | None:
    named = os.environ.get("OBDLAB_SETTINGS")
    if named:
        return Path(named)
    return DEFAULT_SETTINGS if DEFAULT_SETTINGS.exists() else None


def registry_from(args: argparse.Namespace) -> RegistryClient:
    """Return a registry client for these arguments."""
    from obdlab.image.registryaccess import open_client
    from obdlab.registry.credentials import Credentials

    if args.credentials is not None:
        Credentials.load(args.credentials)  # an unusable file fails now, not at the first request
    return open_client(settings_from(args), plain_http_hosts=frozenset(args.plain_http))


def device_service_from(args: argparse.Namespace) -> DeviceService:
    """Return the client of the device host that these arguments name (started on first use)."""
    from obdlab.server.client import DeviceService

    return DeviceService(args.run_dir, settings_from(args))


def platform(text: str) -> Platform:
    """Read the argument of a --platform option."""
    from obdlab.registry.platform import PlatformError, parse_platform

    try:
        return parse_platform(text)
    except PlatformError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
