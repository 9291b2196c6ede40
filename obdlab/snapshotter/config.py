"""The snapshotter's configuration file: the original's config.json."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from obdlab.errors import ObdlabError
from obdlab.plain import Table
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
    "turboFsType",
    "turboTargetsByLabel",
    "recordStarts",
    "contentStore",
    "containerdAddress",
    "convertLayers",
    "runtimeType",
    "exporterConfig",
    *_NO_EFFECT,
}
# Starts do not take longer.
_MOST_RECORDED_S = 3600
_KNOWN_OF_EXPORTER = {"enable", "uriPrefix", "port"}


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
    #: The socket of the containerd whose content the differ reads and writes; None for the usual one.
    containerd: Path | None = None
    #: File system of ordinary layers that the differ makes block layers of, '' to leave them as they are.
    convert_layers: str = ""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file. Logs a warning for each unknown key. Raises ConfigError."""
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
        table = Table.of_json(text, str(path), ConfigError)
        exporter = table.table("exporterConfig")
        _log_unknown(table, exporter)
        table.number("tenant", least=-1, most=_MAX_TENANT)
        # Docker's init layers are plain layers on an image here, so the value makes no difference.
        table.word("runtimeType", ("containerd", "docker"))
        port = exporter.number("port", EXPORTER_PORT, least=1, most=65535)
        standard = ImageOptions()
        default_fs = table.text("defaultFsType") or standard.default_fs
        quota = table.text("rootfsQuota")
        try:
            FsSpec.parse(default_fs)
            quota_bytes = parse_size(quota) if quota else 0
        except InvalidArgumentError as error:
            raise ConfigError(f"{path}: defaultFsType, rootfsQuota: {error}") from error
        return cls(
            root=Path(table.text("root")) if table.text("root") else None,
            address=Path(table.text("address")) if table.text("address") else None,
            log_level=_log_level(table),
            images=ImageOptions(
                plain_http_hosts=_plain_http_hosts(table),
                default_fs=default_fs,
                mode=Mode(table.word("rwMode", tuple(mode.value for mode in Mode))),
                sparse=table.word("writableLayerType", ("append", "sparse")) == "sparse",
                auto_remove_devices=table.get("autoRemoveDev", bool, False),
                async_remove=table.get("asyncRemove", bool, False),
                quota_bytes=quota_bytes,
                active_roots=table.paths("activePathRoots", standard.active_roots),
                trace_roots=table.paths("traceRoots", standard.trace_roots),
                turbo_file_systems=_turbo_file_systems(table),
                content_store=Path(table.text("contentStore")) if table.text("contentStore") else None,
                turbo_targets_by_label=table.get("turboTargetsByLabel", bool, False),
                record_starts_s=table.number("recordStarts", 0, least=0, most=_MOST_RECORDED_S),
            ),
            exporter_listen=f"0.0.0.0:{port}" if exporter.get("enable", bool, False) else "",
            exporter_path=exporter.text("uriPrefix") or "/metrics",
            containerd=table.path("containerdAddress"),
            convert_layers=table.word("convertLayers", ("", "ext4", "erofs")),
        )


def _log_unknown(table: Table, exporter: Table) -> None:
    unknown = sorted(table.values.keys() - _KNOWN)
    unknown += [f"exporterConfig.{key}" for key in sorted(exporter.values.keys() - _KNOWN_OF_EXPORTER)]
    for key in unknown:
        logger.warning("%s: key %r is not known and has no effect", table.name, key)
    for key in sorted(table.values.keys() & _NO_EFFECT.keys()):
        logger.info("%s: %s has no effect: %s", table.name, key, _NO_EFFECT[key])


def _turbo_file_systems(table: Table) -> tuple[str, ...]:
    known = ImageOptions().turbo_file_systems
    value: tuple[str, ...] = table.get("turboFsType", tuple[str, ...]) or known
    if not set(value) <= set(known):
        raise table.wrong("turboFsType", table.values["turboFsType"], f"a list of {' and '.join(known)}")
    return value


def _log_level(table: Table) -> int | None:
    text = table.text("logLevel") or table.text("verbose")
    if text and text.lower() not in _LEVELS:
        logger.error("%s: no such log level (got %r, wanted one of %s)", table.name, text, ", ".join(_LEVELS))
    return _LEVELS.get(text.lower())


def _plain_http_hosts(table: Table) -> frozenset[str]:
    mirrors = table.values.get("mirrorRegistry") or []
    hosts = set()
    for mirror in mirrors if isinstance(mirrors, list) else [mirrors]:
        if not (isinstance(mirror, dict) and isinstance(mirror.get("host"), str)):
            raise table.wrong("mirrorRegistry", mirror, "a list of {host, insecure}")
        if mirror.get("insecure") is True:
            hosts.add(mirror["host"])
    return frozenset(hosts)
