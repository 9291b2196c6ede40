"""The snapshotter's configuration file: the original's config.json."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from obdlab.errors import ObdlabError
from obdlab.settings.settings import EXPORTER_PORT
from obdlab.snapshotter.errors import InvalidArgumentError
from obdlab.snapshotter.overlaybd import ImageOptions
from obdlab.snapshotter.quota import parse_size
from obdlab.snapshotter.writable import FsSpec, Mode

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
_MAX_TENANT = (1 << 31) - 1
#: Keys that are accepted without effect, and the reason.
_NO_EFFECT = {
    "logReportCaller": "log lines name their part of the program anyway",
    "tenant": "devices are named after the root directory, so that snapshotters do not meet",
    "turboFsType": "turboOCI layers cannot be served yet",
}
_KNOWN = {
    "root",
    "address",
    "verbose",
    "logLevel",
    "rwMode",
    "asyncRemove",
    "autoRemoveDev",
    "writableLayerType",
    "mirrorRegistry",
    "defaultFsType",
    "rootfsQuota",
    "activePathRoots",
    "traceRoots",
    "runtimeType",
    "exporterConfig",
    *_NO_EFFECT,
}


class ConfigError(ObdlabError):
    """The configuration file cannot be read, or asks for something that this snapshotter cannot do."""


@dataclass(frozen=True, slots=True)
class SnapshotterConfig:
    """The contents of a configuration file. None for a key that is missing."""

    root: Path | None = None
    address: Path | None = None
    log_level: int | None = None
    images: ImageOptions = field(default_factory=ImageOptions)
    #: "address:port", or '' for none.
    exporter_listen: str = ""
    exporter_path: str = "/metrics"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file. Logs a warning for each unknown key. Raises ConfigError."""
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: not a JSON object (got {type(values).__name__})")
        for key in sorted(values.keys() - _KNOWN):
            logger.warning("%s: key %r is not known and has no effect", path, key)
        for key in sorted(values.keys() & _NO_EFFECT.keys()):
            logger.info("%s: %s has no effect: %s", path, key, _NO_EFFECT[key])
        _int(path, values, "tenant", -1, most=_MAX_TENANT)
        # Docker's init layers are plain layers on an image here, so the value makes no difference.
        _word(path, values, "runtimeType", ("containerd", "docker"))
        exporter = _object(path, values, "exporterConfig")
        port = _int(path, exporter, "port", EXPORTER_PORT, most=65535, least=1)
        default_fs = _text(path, values, "defaultFsType") or ImageOptions().default_fs
        try:
            FsSpec.parse(default_fs)
        except InvalidArgumentError as error:
            raise ConfigError(f"{path}: defaultFsType: {error}") from error
        return cls(
            root=_path(path, values, "root"),
            address=_path(path, values, "address"),
            log_level=_log_level(path, values),
            images=ImageOptions(
                plain_http_hosts=_plain_http_hosts(path, values),
                default_fs=default_fs,
                mode=Mode(_word(path, values, "rwMode", tuple(mode.value for mode in Mode))),
                sparse=_word(path, values, "writableLayerType", ("append", "sparse")) == "sparse",
                auto_remove_devices=_flag(path, values, "autoRemoveDev"),
                async_remove=_flag(path, values, "asyncRemove"),
                quota_bytes=_size(path, values, "rootfsQuota"),
                active_roots=_paths(path, values, "activePathRoots", ImageOptions().active_roots),
                trace_roots=_paths(path, values, "traceRoots", ImageOptions().trace_roots),
            ),
            exporter_listen=f"0.0.0.0:{port}" if _flag(path, exporter, "enable") else "",
            exporter_path=_text(path, exporter, "uriPrefix") or "/metrics",
        )


def _text(path: Path, values: dict[str, Any], key: str) -> str:
    value = values.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f"{path}: {key}: not a string (got {value!r})")
    return value.strip()


def _word(path: Path, values: dict[str, Any], key: str, words: tuple[str, ...]) -> str:
    value = _text(path, values, key) or words[0]
    if value not in words:
        raise ConfigError(f"{path}: {key} is not supported (got {value!r}, wanted {' or '.join(map(repr, words))})")
    return value


def _size(path: Path, values: dict[str, Any], key: str) -> int:
    text = _text(path, values, key)
    try:
        return parse_size(text) if text else 0
    except InvalidArgumentError as error:
        raise ConfigError(f"{path}: {key}: {error}") from error


def _flag(path: Path, values: dict[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{path}: {key}: wanted true or false (got {value!r})")
    return value


def _int(path: Path, values: dict[str, Any], key: str, default: int, *, most: int, least: int = -1) -> int:
    value = values.get(key, default)
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{path}: {key}: wanted a number from {least} to {most} (got {value!r})")
    return value


def _object(path: Path, values: dict[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key}: not an object (got {value!r})")
    for name in sorted(value.keys() - {"enable", "uriPrefix", "port"}):
        logger.warning("%s: key %r is not known and has no effect", path, f"{key}.{name}")
    return value


def _path(path: Path, values: dict[str, Any], key: str) -> Path | None:
    text = _text(path, values, key)
    return Path(text) if text else None


def _paths(path: Path, values: dict[str, Any], key: str, default: tuple[Path, ...]) -> tuple[Path, ...]:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, list) or not all(isinstance(each, str) and each.startswith("/") for each in value):
        raise ConfigError(f"{path}: {key}: wanted a list of absolute paths (got {value!r})")
    return tuple(map(Path, value))


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
