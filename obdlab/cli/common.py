"""Options that several commands share, and the only reading of the environment."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.packing import size_argument

if TYPE_CHECKING:
    from obdlab.formats.oci import Platform
    from obdlab.image.settings import Settings
    from obdlab.registry.client import RegistryClient
    from obdlab.service.client import DeviceService

DEFAULT_RUN_DIR = Path("/run/obdlab")
DEFAULT_CACHE_DIR = Path("/var/lib/obdlab/cache")


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Add where device servers and the block cache live."""
    group = parser.add_argument_group("where things live")
    group.add_argument(
        "--run-dir",
        type=Path,
        default=Path(os.environ.get("OBDLAB_RUN_DIR", DEFAULT_RUN_DIR)),
        help="sockets and device servers (default: $OBDLAB_RUN_DIR or %(default)s)",
    )
    group.add_argument(
        "--cache-dir",
        type=Path,
        default=Path(os.environ.get("OBDLAB_CACHE_DIR", DEFAULT_CACHE_DIR)),
        help="block cache shared by all devices (default: $OBDLAB_CACHE_DIR or %(default)s)",
    )
    group.add_argument(
        "--cache-quota",
        type=size_argument,
        default=os.environ.get("OBDLAB_CACHE_QUOTA", "4G"),
        metavar="SIZE",
        help="most that the block cache may hold, 0: no limit (default: $OBDLAB_CACHE_QUOTA or 4G)",
    )
    group.add_argument(
        "--download",
        action="store_true",
        help="fetch images in use whole into the block cache, from 5 minutes after they are opened on",
    )


def add_registry_options(parser: argparse.ArgumentParser) -> None:
    """Add how registries are reached."""
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
        default=_default_credentials(),
        metavar="FILE",
        help="docker config.json with credentials (default: that of $DOCKER_CONFIG or ~/.docker, if it can be read)",
    )


def _default_credentials() -> Path | None:
    # Where nobody has a home, or it may not be looked into (sudo -u, a service's user), there is no default.
    directory = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    path = Path(directory) / "config.json"
    return path if os.access(path, os.R_OK) else None


def settings_from(args: argparse.Namespace) -> Settings:
    """Return the image settings these arguments ask for."""
    from obdlab.image.settings import Settings

    credentials = getattr(args, "credentials", None) or _default_credentials()
    # The device host that gets them works in another directory.
    return Settings(
        cache_dir=args.cache_dir.absolute(),
        cache_quota=args.cache_quota,
        download_enabled=args.download,
        credentials_path=credentials.absolute() if credentials else None,
    )


def registry_from(args: argparse.Namespace) -> RegistryClient:
    """Return a registry client for these arguments."""
    from obdlab.registry.auth import Credentials
    from obdlab.registry.client import RegistryClient

    return RegistryClient(Credentials.load(args.credentials), plain_http_hosts=frozenset(args.plain_http))


def device_service_from(args: argparse.Namespace) -> DeviceService:
    """Return the client of the device host that these arguments name (started on first use)."""
    from obdlab.service.client import DeviceService

    return DeviceService(args.run_dir, settings_from(args))


def platform(text: str) -> Platform:
    """Read the argument of a --platform option."""
    from obdlab.registry.platforms import PlatformError, parse_platform

    try:
        return parse_platform(text)
    except PlatformError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
