"""The snapshotter's configuration file: the keys of the original's config.json that mean something here."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from obdlab.errors import ObdlabError
from obdlab.snapshotter.overlaybd import ImageOptions

logger = logging.getLogger(__name__)

#: logrus level names.
_LEVELS = {
    "panic": logging.CRITICAL,
    "fatal": logging.CRITICAL,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}
#: Values besides the default that are refused, not ignored: containers would run differently than asked for.
_ONLY: dict[str, tuple[Any, ...]] = {
    "rwMode": ("overlayfs",),
    "autoRemoveDev": (False,),
    "asyncRemove": (False,),
    "runtimeType": ("containerd",),
    "rootfsQuota": ("",),
    "tenant": (-1,),
}
_KNOWN = {"root", "address", "verbose", "logLevel", "mirrorRegistry", "defaultFsType", *_ONLY}


class ConfigError(ObdlabError):
    """The configuration cannot be read, or asks for what this snapshotter cannot do."""


@dataclass(frozen=True, slots=True)
class SnapshotterConfig:
    """What a configuration file says. None where it says nothing."""

    root: Path | None = None
    address: Path | None = None
    log_level: int | None = None
    images: ImageOptions = field(default_factory=ImageOptions)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file. Unknown keys are warned of. Raises ConfigError."""
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: not a JSON object (got {type(values).__name__})")
        for key in sorted(values.keys() - _KNOWN):
            logger.warning("%s: key %r is not known and has no effect", path, key)
        for key, allowed in _ONLY.items():
            if key in values and values[key] not in allowed:
                raise ConfigError(f"{path}: {key} is not supported (got {values[key]!r}, wanted {allowed[0]!r})")
        return cls(
            root=_path(path, values, "root"),
            address=_path(path, values, "address"),
            log_level=_log_level(path, values),
            images=ImageOptions(
                plain_http_hosts=_plain_http_hosts(path, values),
                default_fs=_text(path, values, "defaultFsType") or ImageOptions().default_fs,
            ),
        )


def _text(path: Path, values: dict[str, Any], key: str) -> str:
    value = values.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f"{path}: {key}: not a string (got {value!r})")
    return value.strip()


def _path(path: Path, values: dict[str, Any], key: str) -> Path | None:
    text = _text(path, values, key)
    return Path(text) if text else None


def _log_level(path: Path, values: dict[str, Any]) -> int | None:
    text = _text(path, values, "logLevel") or _text(path, values, "verbose")
    if text and text.lower() not in _LEVELS:
        logger.error("%s: no such log level (got %r, wanted one of %s)", path, text, ", ".join(_LEVELS))
    return _LEVELS.get(text.lower())


def _plain_http_hosts(path: Path, values: dict[str, Any]) -> frozenset[str]:
    mirrors = values.get("mirrorRegistry") or []
    hosts = set()
    for mirror in mirrors if isinstance(mirrors, list) else [mirrors]:
        if not (isinstance(mirror, dict) and isinstance(mirror.get("host"), str)):
            raise ConfigError(f"{path}: mirrorRegistry: wanted a list of {{host, insecure}} (got {mirror!r})")
        if mirror.get("insecure") is True:
            hosts.add(mirror["host"])
    return frozenset(hosts)
