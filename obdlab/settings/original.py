"""Settings from a file: obdlab's own keys, or those of the original's service configuration (overlaybd.json).

The keys show which of the two it is. A missing key leaves its setting as it is. Features that are not available here
are reported as notes; a malformed value is an error that names file and key.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.plain import Table, from_plain
from obdlab.settings.settings import EXPORTER_PORT, GIB, KIB, LOG_LEVELS, Settings, SettingsError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

_MAX_FILE = 1 << 20
_MIB = 1024 * KIB
_CACHE_TYPES = ("file", "ocf", "download")
_AUDIT_PATH = "/var/log/overlaybd-audit.log"
_P2P_ADDRESS = "http://localhost:9731/accelerator"
_SNAPSHOT_ADDRESS = "http://127.0.0.1:9862"
# delayExtra of the original when it is 0 or less.
_DELAY_EXTRA_S = 30.0

#: The original's keys and their types.
KEYS: dict[str, Any] = {
    "registryCacheDir": str,
    "registryCacheSizeGB": int,
    "cacheType": str,
    "credentialFilePath": str,
    "credentialConfig.mode": str,
    "credentialConfig.path": str,
    "credentialConfig.timeout": int,
    "credentialConfig.client_cert_path": str,
    "credentialConfig.client_key_path": str,
    "credentialConfig.server_ca_path": str,
    "ioEngine": int,
    "logLevel": int,
    "logPath": str,
    "logConfig.logLevel": int,
    "logConfig.logPath": str,
    "logConfig.logSizeMB": int,
    "logConfig.logRotateNum": int,
    "download.enable": bool,
    "download.delay": int,
    "download.delayExtra": int,
    "download.maxMBps": int,
    "download.tryCnt": int,
    "download.blockSize": int,
    "enableAudit": bool,
    "auditPath": str,
    "enableThread": bool,
    "p2pConfig.enable": bool,
    "p2pConfig.address": str,
    "exporterConfig.enable": bool,
    "exporterConfig.uriPrefix": str,
    "exporterConfig.port": int,
    "exporterConfig.updateInterval": int,
    "registryFsVersion": str,
    "cacheConfig.cacheType": str,
    "cacheConfig.cacheDir": str,
    "cacheConfig.cacheSizeGB": int,
    "cacheConfig.refillSize": int,
    "cacheConfig.blockSize": int,
    "gzipCacheConfig.enable": bool,
    "gzipCacheConfig.cacheDir": str,
    "gzipCacheConfig.cacheSizeGB": int,
    "gzipCacheConfig.refillSize": int,
    "prefetchConfig.concurrency": int,
    "certConfig.certFile": str,
    "certConfig.keyFile": str,
    "userAgent": str,
    "serviceConfig.enable": bool,
    "serviceConfig.address": str,
}
_SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
_TOP = {key.partition(".")[0] for key in KEYS}


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """The contents of a file: the settings it results in, and notes for its author."""

    settings: Settings
    notes: tuple[str, ...] = ()


def load(path: str | os.PathLike[str], base: Settings | None = None) -> ServiceConfig:
    """Read a settings file of either kind over ``base``. Raises SettingsError naming the file and the key.

    The settings remember the file: its download settings are read again whenever an image is opened.
    """
    path = Path(path).absolute()
    found = parse(_read(path), str(path), base or Settings())
    return replace(found, settings=replace(found.settings, settings_path=path))


def parse(text: bytes, name: str, base: Settings) -> ServiceConfig:
    """Read the text of a settings file of either kind. Raises SettingsError."""
    document = Table.of_json(text, name, SettingsError).values
    ours = document.keys() & {field.name for field in fields(Settings)}
    if ours or not document:
        return ServiceConfig(_with_own(base, document, name))
    if not document.keys() & _TOP:
        raise SettingsError(
            f"{name}: neither obdlab's settings nor overlaybd's (got {', '.join(sorted(document))[:200]})"
        )
    return _Original(document, name).apply(base)


def at_launch(settings: Settings, download: Mapping[str, Any] | None) -> Settings:
    """Return the settings for an image that is being opened, with the current ones of its background download.

    ``download`` is the section in the image's own configuration; without it the settings' file is read again. A file
    that cannot be read (any more) changes nothing.
    """
    try:
        if download is not None:
            return _Original({"download": dict(download)}, "image configuration").apply(settings).settings
        if settings.settings_path is not None:
            now = parse(_read(settings.settings_path), str(settings.settings_path), Settings()).settings
            names = [field.name for field in fields(Settings) if field.name.startswith("download_")]
            return replace(settings, **{name: getattr(now, name) for name in names})
    except SettingsError as error:
        logger.warning("%s; downloading as before", error)
    return settings


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise SettingsError(f"{path}: cannot read the settings ({error.strerror})") from error
    if len(text) > _MAX_FILE:
        raise SettingsError(f"{path}: settings larger than {_MAX_FILE} bytes")
    return text


def _with_own(base: Settings, document: Mapping[str, Any], name: str) -> Settings:
    settings = base.with_values(document, name=name)
    for key in document:
        value = getattr(settings, key)
        for path in value if isinstance(value, tuple) else (value,):
            # Device servers run in another working directory than the command that starts them.
            if isinstance(path, Path) and not path.is_absolute():
                raise SettingsError(f"{name}: {key}: wrong value (got {str(path)!r}, wanted an absolute path)")
    return settings


class _Original:
    # The original's keys, flattened and checked by type. Each section below translates some of them.
    def __init__(self, document: Mapping[str, Any], name: str) -> None:
        self._name = name
        self._values: dict[str, Any] = {}
        self._table = Table(self._values, name, SettingsError)
        self._notes: list[str] = []
        self._changes: dict[str, Any] = {}
        for key, value in document.items():
            if key in _SECTIONS:
                if not isinstance(value, dict):
                    raise self._table.wrong(key, value, "an object")
                for inner, content in value.items():
                    self._take(f"{key}.{inner}", content)
            else:
                self._take(key, value)

    def apply(self, base: Settings) -> ServiceConfig:
        self._cache()
        self._credentials()
        self._logs()
        self._decompressed()
        self._downloads()
        self._services()
        self._unsupported()
        changed = base
        for name, value in self._changes.items():  # one by one, so that an error names its key
            try:
                changed = replace(changed, **value)
            except SettingsError as error:
                raise SettingsError(f"{self._name}: {name}: {error}") from error
        return ServiceConfig(changed, tuple(self._notes))

    def _take(self, key: str, value: object) -> None:
        if key not in KEYS:
            self._note(key, "not known, has no effect")
            return
        try:
            self._values[key] = from_plain(value, KEYS[key])
        except TypeError as error:
            raise SettingsError(f"{self._name}: {key}: wrong value ({error})") from error

    def _set(self, key: str, **settings: Any) -> None:
        self._changes[key] = settings

    def _note(self, key: str, text: str) -> None:
        self._notes.append(f"{self._name}: {key}: {text}")

    def _number(self, key: str, least: int) -> int | None:
        value: int | None = self._table.number(key, least=least, most=(1 << 32) - 1)
        return value

    def _cache(self) -> None:
        kind = self._values.get("cacheConfig.cacheType")
        key, directory, size = "cacheConfig.cacheType", "cacheConfig.cacheDir", "cacheConfig.cacheSizeGB"
        if not kind:  # the old keys count, as in the original
            kind = self._values.get("cacheType") or "file"
            key, directory, size = "cacheType", "registryCacheDir", "registryCacheSizeGB"
        if kind not in _CACHE_TYPES:
            raise self._table.wrong(key, kind, f"one of {', '.join(_CACHE_TYPES)}")
        if kind != "file":
            self._note(key, f"{kind!r} is not there, the block cache of files is used")
        if (path := self._table.path(directory)) is not None:
            self._set(directory, cache_dir=path)
        if (gigabytes := self._number(size, 1)) is not None:
            self._set(size, cache_quota=gigabytes * GIB)
        if (unit := self._number("cacheConfig.refillSize", 1)) is not None:
            self._set("cacheConfig.refillSize", cache_extent=unit, cache_extent_max=0)

    def _credentials(self) -> None:
        mode = self._values.get("credentialConfig.mode")
        if not mode:
            if (path := self._table.path("credentialFilePath")) is not None:
                self._set("credentialFilePath", credentials_path=path, credentials_mode="file")
            return
        settings: dict[str, Any] = {"credentials_mode": mode}
        if mode == "file":
            settings["credentials_path"] = self._table.path("credentialConfig.path")
        else:
            address = self._values.get("credentialConfig.path", "")
            settings["credentials_address"] = (
                f"http://{address}" if mode == "http" and "://" not in address else address
            )
        if (seconds := self._number("credentialConfig.timeout", 1)) is not None:
            settings["credentials_timeout_s"] = float(seconds)
        for key, name in (("client_cert", "client_cert"), ("client_key", "client_key"), ("server_ca", "server_ca")):
            settings[f"credentials_{name}"] = self._table.path(f"credentialConfig.{key}_path")
        self._set("credentialConfig", **settings)

    def _logs(self) -> None:
        level = self._values.get("logConfig.logLevel", self._values.get("logLevel"))
        if level is not None:
            self._set("logLevel", log_level=LOG_LEVELS[min(max(level, 0), 3)])
        if (path := self._table.path("logConfig.logPath") or self._table.path("logPath")) is not None:
            self._set("logPath", log_path=path)
        if (megabytes := self._number("logConfig.logSizeMB", 1)) is not None:
            self._set("logConfig.logSizeMB", log_size=megabytes * _MIB)
        if (count := self._number("logConfig.logRotateNum", 1)) is not None:
            self._set("logConfig.logRotateNum", log_count=count)
        audit = self._table.path("auditPath")
        if self._values.get("enableAudit") is False:
            self._set("enableAudit", audit_path=None)
        elif audit is not None or "enableAudit" in self._values:
            self._set("auditPath", audit_path=audit or Path(_AUDIT_PATH))

    def _decompressed(self) -> None:
        if (enabled := self._values.get("gzipCacheConfig.enable")) is not None:
            self._set("gzipCacheConfig.enable", cache_decompressed=enabled)
        if enabled and ("gzipCacheConfig.cacheDir" in self._values or "gzipCacheConfig.cacheSizeGB" in self._values):
            self._note("gzipCacheConfig", "kept in cacheConfig's directory, within its size")

    def _downloads(self) -> None:
        if (enabled := self._values.get("download.enable")) is not None:
            self._set("download.enable", download_enabled=enabled)
        if (delay := self._number("download.delay", 0)) is not None:
            self._set("download.delay", download_delay_s=float(delay))
        if (extra := self._values.get("download.delayExtra")) is not None:
            self._set("download.delayExtra", download_delay_extra_s=float(extra) if extra > 0 else _DELAY_EXTRA_S)
        if (rate := self._values.get("download.maxMBps")) is not None:
            self._set("download.maxMBps", download_bytes_per_s=float(max(0, rate)) * _MIB)
        if (tries := self._number("download.tryCnt", 1)) is not None:
            self._set("download.tryCnt", download_tries=tries)

    def _services(self) -> None:
        if "p2pConfig.enable" in self._values or "p2pConfig.address" in self._values:
            on = self._values.get("p2pConfig.enable", False)
            address = self._values.get("p2pConfig.address") or _P2P_ADDRESS
            if "://" not in address:
                address = f"http://{address}"
            self._set("p2pConfig.address", p2p_address=address if on else "")
        if self._values.get("exporterConfig.enable"):
            port = self._number("exporterConfig.port", 1) or EXPORTER_PORT
            if port > 65535:
                raise self._table.wrong("exporterConfig.port", port, "a port")
            self._set("exporterConfig.port", exporter_listen=f"0.0.0.0:{port}")
            if prefix := self._values.get("exporterConfig.uriPrefix"):
                self._set("exporterConfig.uriPrefix", exporter_path=prefix)
        cert, key = self._table.path("certConfig.certFile"), self._table.path("certConfig.keyFile")
        if cert is not None and key is not None:
            self._set("certConfig", tls_client_cert=cert, tls_client_key=key)
        elif cert is not None or key is not None:
            self._note("certConfig", "certFile and keyFile only count together, neither is used")
        if agent := self._values.get("userAgent"):
            self._set("userAgent", user_agent=agent)

    def _unsupported(self) -> None:
        engine = self._values.get("ioEngine", 0)
        if not 0 <= engine <= 2:
            raise self._table.wrong("ioEngine", engine, "0, 1 or 2")
        if engine:
            self._note("ioEngine", "files are read by pread, as with 0")
        if self._values.get("enableThread"):
            self._note("enableThread", "each device is a process of its own, whatever this says")
        if self._values.get("registryFsVersion", "v2") != "v2":
            self._note("registryFsVersion", "there is one registry client, which does what v2 does")
        if "prefetchConfig.concurrency" in self._values:
            self._note("prefetchConfig.concurrency", "a replay has at most 8 requests under way, whatever this says")
        if self._values.get("serviceConfig.enable"):
            address = self._values.get("serviceConfig.address") or _SNAPSHOT_ADDRESS
            self._set("serviceConfig.address", snapshot_api=True, snapshot_api_address=address)
            self._note("serviceConfig", "obdlab serve snapshotter listens there, for a token; serve tcmu does not")
