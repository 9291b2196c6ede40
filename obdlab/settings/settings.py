"""How images are opened on this host: cache, deadlines, credentials. One value, passed down from the program."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self, get_type_hints
from urllib.parse import urlsplit

from obdlab.errors import ObdlabError
from obdlab.plain import Table, from_plain, to_plain
from obdlab.records import known_fields
from obdlab.registry.p2p import P2PAddressError, parse_address

if TYPE_CHECKING:
    from collections.abc import Mapping

KIB = 1 << 10
GIB = 1 << 30

#: Sources of credentials (overlaybd's credentialConfig.mode).
CREDENTIALS_MODES = ("file", "http", "https", "uds")
LOG_FORMATS = ("text", "json")
#: Values of ``verify``.
VERIFICATIONS = VERIFY_OFF, VERIFY_AVAILABLE, VERIFY_REQUIRE = "off", "available", "require"
#: The snapshotter's devices may also be made by an overlaybd TCMU daemon on the same host.
DAEMON_KIND = "overlaybd-tcmu"
_MOST_READAHEAD_KIB = 64 * KIB
_LEAST_SERVER_MEMORY = 256 << 20
LOG_LEVELS = ("debug", "info", "warning", "error")
#: The original's port for metrics.
EXPORTER_PORT = 9863


class SettingsError(ObdlabError, code="settings"):
    """A settings text has an unknown key or a malformed value."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Host-wide settings of the data path. Sizes in bytes, times in seconds."""

    cache_dir: Path = Path("/var/lib/obdlab/cache")
    #: Granularity of the block cache, and the smallest request to a registry.
    cache_unit: int = 16 * KIB
    #: A miss fetches the missing units of the aligned extent around it. A start of pydata takes 1.0 request for each
    #: 256 KiB extent it touches; with units of 64 KiB alone 2.4, and a quarter less bytes.
    cache_extent: int = 256 * KIB
    #: The extent is doubled, up to this, if requests wait long for their answers (another continent, an object store)
    #: and the link is fast; it is halved, down to a quarter, if the link is slow. 0: neither.
    cache_extent_max: int = 1024 * KIB
    #: The cache directory takes at most this much disk, of all processes together; 0: no limit.
    cache_quota: int = 4 * GIB
    #: The cache evicts rather than leave less free on its file system (or less than a 16th of it).
    cache_min_free: int = 1 * GIB
    #: Most that is fetched ahead of a sequential reader; 0 turns read-ahead off. A start of many small reads
    #: (importing pandas) fetches the same with 1 and 4 MiB; a long sequential one gets 1.3 times the rate with 4 MiB
    #: at 1 Gbit/s and 5 ms (``tests/benchmarks/extents.py``, ``remote.py``).
    readahead_max: int = 4096 * KIB
    #: True if the block cache also keeps the decompressed content of the gzip layers that turboOCI images read. It
    #: spares a later process the decompression, and takes as much disk as the content read has.
    cache_decompressed: bool = False
    #: True if the snapshotter fetches the indexes of an image's layers when the image is pulled.
    index_at_pull: bool = True
    #: True if the snapshotter keeps a process that has imported what ``obdlab image pull`` needs, and forks for it.
    prefork_pulls: bool = True
    #: Checking of lazily read layers by hash trees: "off"; "available": layers whose manifest has a tree; "require":
    #: the same, and layers of a registry without a tree are refused (docs/how-to/verify.md).
    verify: str = VERIFY_AVAILABLE
    #: Public keys (PEM) of which one must have signed, with cosign, the manifest of an image that ``obdlab image
    #: pull`` or a device takes from a registry; none: nothing is demanded. Images that other clients pull are theirs.
    signature_keys: tuple[Path, ...] = ()
    #: Trace or priority list to replay whenever an image is opened, in place of the image's own.
    trace_path: Path | None = None
    #: True if the device of a lazily read image completes it: after ``download_delay_s`` the spare time of the link
    #: brings all of it (:mod:`obdlab.cache.policy`), and with ``unpacked_disks`` the device then graduates. Nothing
    #: is fetched over a link that NetworkManager says is metered.
    completion: bool = True
    #: With ``completion``: the spare time of a fast link is used from the first moment on.
    completion_at_once: bool = False
    #: Most bytes that completion fetches in a day (UTC), of all processes that share the cache; 0: no limit.
    completion_bytes_per_day: int = 64 * GIB
    #: True if images in use are fetched whole into the cache, and verified, while no reader waits for other data.
    download_enabled: bool = False
    #: The download begins this long after the image was opened, plus a random part of ``download_delay_extra_s``.
    download_delay_s: float = 300.0
    download_delay_extra_s: float = 30.0
    #: Bandwidth limit of one image's download; 0: no limit.
    download_bytes_per_s: float = 100 * 1024 * KIB
    #: Attempts for a blob that fails.
    download_tries: int = 5
    #: True if read-only devices graduate as soon as all of their image is local and checked, without the delay of
    #: ``completion``, those of local files as well: the image is unpacked to a plain file in the cache directory,
    #: within ``cache_quota``, and the kernel reads that. It costs as much disk as the image has data unpacked, and
    #: each device a second loop device from the beginning (docs/explanation/graduation.md).
    graduation: bool = False
    #: False: no device graduates, not by hand either, and no unpacked disk is opened. The kernel reads such a disk
    #: without comparing it with a digest at each read, so that a change of the file on the host's disk would not be
    #: noticed before the next boot.
    unpacked_disks: bool = True
    #: A read ends with data or an error within this time, in any state of the registry.
    read_deadline_s: float = 120.0
    #: Opening an image ends within this time, so that starting a container reports sooner that a registry is down.
    open_deadline_s: float = 30.0
    #: One HTTP request: time to connect, and longest silence while reading.
    request_timeout_s: float = 30.0
    #: The kind of device for images, as ``obdlab.devices.kinds`` knows them; "auto": the best that the host has; or,
    #: for the snapshotter only, DAEMON_KIND.
    device_kind: str = "auto"
    #: The kernel's read-ahead on devices, and around page faults of files mapped from them, in KiB. With 32 a start
    #: reads a fifth less, which pays on slow links (docs/how-to/prefetch.md).
    device_readahead_kib: int = 128
    #: True if ``obdlab serve snapshotter`` runs the API for live snapshots beside itself.
    snapshot_api: bool = False
    #: Address of ``obdlab serve snapshot-api``: ``http://HOST:PORT``; "": a unix socket in the run directory.
    snapshot_api_address: str = ""
    #: True if the API accepts requests as the original does: without a token, with any verb, from any page.
    snapshot_api_open: bool = False
    #: Most processes that serve one busy read-only device; 0: one per processor, four at most.
    server_processes: int = 0
    #: Most memory that a device-serving process takes for data; 0: no bound. 256 concurrent requests of 1 MiB, with
    #: the bytes read, decompressed and returned for each, need about half of it.
    server_memory: int = 2 * GIB
    #: Directory of containerd's hosts.toml files, which name the mirrors of registries (/etc/containerd/certs.d).
    hosts_dir: Path | None = None
    #: P2P proxy for reading blobs while it is healthy, see :mod:`obdlab.registry.p2p`; "": no proxy.
    p2p_address: str = ""
    #: docker config.json with registry credentials, read again when it changes.
    credentials_path: Path | None = None
    #: "file": ``credentials_path``. Or a service: "http" and "https" at the URL ``credentials_address``, "uds" at the
    #: unix socket of that path; "https" with the client certificate and the CA below, if given.
    credentials_mode: str = "file"
    credentials_address: str = ""
    credentials_timeout_s: float = 1.0
    credentials_client_cert: Path | None = None
    credentials_client_key: Path | None = None
    credentials_server_ca: Path | None = None
    #: CA bundle (PEM) for registries, besides the system's CAs or, with ``tls_ca_only``, in their place.
    tls_ca_path: Path | None = None
    tls_ca_only: bool = False
    #: Client certificate and key (PEM) for registries that have none of their own in ``tls_certs_dirs``.
    tls_client_cert: Path | None = None
    tls_client_key: Path | None = None
    #: docker's and containerd's directories of certificates per host (:mod:`obdlab.registry.tls`).
    tls_certs_dirs: tuple[Path, ...] = (Path("/etc/docker/certs.d"), Path("/etc/containerd/certs.d"))
    #: "host" or "host:port" whose certificates are not verified. Anyone on the path can read and change everything.
    tls_insecure_hosts: tuple[str, ...] = ()
    #: The file of these settings. Its download settings are read again whenever an image is opened.
    settings_path: Path | None = None
    #: The User-Agent in requests to registries.
    user_agent: str = "obdlab"
    #: Device servers write their operations to this file (:mod:`obdlab.observe.audit`); None: no file.
    audit_path: Path | None = None
    #: Bytes of one audit log, and the number of logs kept, the current one included.
    audit_size: int = 10 * 1024 * KIB
    audit_count: int = 3
    #: Log format of device host and servers, "text" or "json", and file (None: host.log in the run directory).
    log_format: str = "text"
    log_path: Path | None = None
    log_size: int = 10 * 1024 * KIB
    log_count: int = 3
    #: "debug", "info", "warning" or "error".
    log_level: str = "info"
    #: ADDRESS:PORT of the snapshotter's metrics, and their path; "": no metrics.
    exporter_listen: str = ""
    exporter_path: str = "/metrics"

    def __post_init__(self) -> None:
        unit = self.cache_unit
        if unit < 4096 or unit & (unit - 1):
            raise SettingsError(f"cache_unit: not a power of two of at least 4096 (got {unit})")
        extent = self.cache_extent
        if extent < 4096 or extent & (extent - 1):
            raise SettingsError(f"cache_extent: not a power of two of at least 4096 (got {extent})")
        if self.cache_extent_max < 0:
            raise SettingsError(f"cache_extent_max: not below 0 (got {self.cache_extent_max})")
        if self.cache_quota < 0 or self.cache_min_free < 0:
            raise SettingsError("cache_quota and cache_min_free must not be negative")
        if min(self.download_delay_s, self.download_delay_extra_s, self.download_bytes_per_s) < 0:
            raise SettingsError("download_delay_s, download_delay_extra_s and download_bytes_per_s: not below 0")
        if self.completion_bytes_per_day < 0:
            raise SettingsError(f"completion_bytes_per_day: not below 0 (got {self.completion_bytes_per_day})")
        if self.download_tries < 1:
            raise SettingsError(f"download_tries: at least 1 (got {self.download_tries})")
        if min(self.read_deadline_s, self.open_deadline_s, self.request_timeout_s) <= 0:
            raise SettingsError("read_deadline_s, open_deadline_s and request_timeout_s must be positive")
        if self.server_memory and self.server_memory < _LEAST_SERVER_MEMORY:
            raise SettingsError(f"server_memory: 0, or at least {_LEAST_SERVER_MEMORY} (got {self.server_memory})")
        if not 0 <= self.device_readahead_kib <= _MOST_READAHEAD_KIB:
            raise SettingsError(f"device_readahead_kib: 0 to {_MOST_READAHEAD_KIB} (got {self.device_readahead_kib})")
        if not 0 <= self.server_processes <= 64:
            raise SettingsError(f"server_processes: 0 to 64 (got {self.server_processes})")
        if self.verify not in VERIFICATIONS:
            raise SettingsError(f"verify: wanted one of {', '.join(VERIFICATIONS)} (got {self.verify!r})")
        if self.p2p_address:
            try:
                parse_address(self.p2p_address)
            except P2PAddressError as error:
                raise SettingsError(f"p2p_address: {error}") from error
        self._check_access()
        if min(self.audit_size, self.audit_count, self.log_size, self.log_count) < 1:
            raise SettingsError("audit_size, audit_count, log_size and log_count: at least 1")
        if self.log_format not in LOG_FORMATS:
            raise SettingsError(f"log_format: wanted one of {', '.join(LOG_FORMATS)} (got {self.log_format!r})")
        if self.log_level not in LOG_LEVELS:
            raise SettingsError(f"log_level: wanted one of {', '.join(LOG_LEVELS)} (got {self.log_level!r})")

    def _check_access(self) -> None:
        mode, address = self.credentials_mode, self.credentials_address
        if mode not in CREDENTIALS_MODES:
            raise SettingsError(f"credentials_mode: wanted one of {', '.join(CREDENTIALS_MODES)} (got {mode!r})")
        if mode in ("http", "https") and not _is_url(address, mode):
            raise SettingsError(f"credentials_address: wanted {mode}://host[:port]/path, without user and password")
        if mode == "uds" and not address.startswith("/"):
            raise SettingsError(f"credentials_address: wanted the absolute path of a socket (got {address!r})")
        if self.credentials_timeout_s <= 0:
            raise SettingsError("credentials_timeout_s must be positive")
        for name in ("tls_client", "credentials_client"):
            if getattr(self, f"{name}_key") is not None and getattr(self, f"{name}_cert") is None:
                raise SettingsError(f"{name}_key: a key without {name}_cert")
        if self.tls_ca_only and self.tls_ca_path is None:
            raise SettingsError("tls_ca_only: wanted a tls_ca_path, since nobody would be trusted")
        if not self.user_agent or not self.user_agent.isascii() or not self.user_agent.isprintable():
            raise SettingsError(f"user_agent: wanted printable ASCII (got {self.user_agent!r})")

    def to_json(self) -> str:
        """Return the settings as one line of JSON, for another process."""
        return json.dumps({field.name: to_plain(getattr(self, field.name)) for field in fields(self)})

    @classmethod
    def from_json(cls, text: str | bytes, *, name: str = "settings") -> Self:
        """Read output of :meth:`to_json`, or part of it. Settings of later versions are left out.

        Raises SettingsError naming ``name`` and the wrong key.
        """
        return cls().with_values(known_fields(cls, Table.of_json(text, name, SettingsError).values), name=name)

    def with_values(self, values: Mapping[str, object], *, name: str) -> Self:
        """Return a copy changed by parsed JSON. Raises SettingsError naming ``name`` and the wrong key."""
        hints = _hints()
        changes = {}
        for key, value in values.items():
            if key not in hints:
                raise SettingsError(f"{name}: no such setting (got {key!r}, wanted one of {', '.join(hints)})")
            try:
                changes[key] = from_plain(value, hints[key])
            except TypeError as error:
                raise SettingsError(f"{name}: {key}: wrong value ({error})") from error
        try:
            return replace(self, **changes)
        except SettingsError as error:
            raise SettingsError(f"{name}: {error}") from error


# Asking for them takes most of the time of reading settings, which each process of a device does.
@cache
def _hints() -> dict[str, object]:
    return get_type_hints(Settings)


def _is_url(text: str, scheme: str) -> bool:
    try:
        parts = urlsplit(text)
        good = parts.scheme == scheme and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return good and "@" not in parts.netloc and not parts.fragment and text.isascii() and text.isprintable()
