"""The registry of an experiment: Debian's docker-registry in the experiment's network, with a count of requests.

The counts come from the registry's log: one JSON line per finished request with method, path, status and the bytes
written. An unfinished request is not in the log yet; the link's counters include its bytes.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import socket
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from obdlab.closing import Closing
from obdlab.lab.images.ocilayout import push_layout
from obdlab.lab.testbed.process import Daemon, LabError, run
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Iterable

    from obdlab.lab.testbed.netns import ExperimentNetwork

_BLOB_URI = re.compile(r"/v2/.+/blobs/(sha256:[0-9a-f]{64})")
_MANIFEST_URI = re.compile(r"/v2/.+/manifests/.+")
_SETTLE_S = 0.03
_SETTLE_TIMEOUT_S = 5.0
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Request:
    """One finished request: ``ended_s`` is Unix time, ``written`` the body bytes sent."""

    method: str
    uri: str
    status: int
    written: int
    duration_s: float
    ended_s: float
    user_agent: str

    @property
    def began_s(self) -> float:
        """The Unix time at which the request arrived."""
        return self.ended_s - self.duration_s

    @property
    def blob(self) -> str:
        """The digest of the requested blob; '' if the request is for no blob."""
        match = _BLOB_URI.fullmatch(self.uri)
        return match[1] if match else ""

    @property
    def is_manifest(self) -> bool:
        """True for a request of a manifest."""
        return _MANIFEST_URI.fullmatch(self.uri) is not None


@dataclass(frozen=True, slots=True)
class BlobTraffic:
    """The traffic of one blob. ``ranges`` counts partial answers (206)."""

    requests: int
    ranges: int
    written: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """The traffic of a registry in an interval: GET requests, body bytes, per blob.

    ``round_trip_waits`` is the length of the longest chain of requests in which each arrived after the answer to the
    one before: the number of successive round trips, regardless of parallel requests. ``busy_s`` is the time with at
    least one request under way.
    """

    requests: int
    written: int
    manifest_requests: int
    errors: int
    blobs: dict[str, BlobTraffic]
    round_trip_waits: int = 0
    busy_s: float = 0.0

    @property
    def blob_requests(self) -> int:
        """The number of requests for blobs."""
        return sum(blob.requests for blob in self.blobs.values())

    @property
    def blob_written(self) -> int:
        """The body bytes of blobs."""
        return sum(blob.written for blob in self.blobs.values())

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Self:
        """Sum up requests, without those that push."""
        fetches = [request for request in requests if request.method == "GET"]
        by_blob: dict[str, list[Request]] = defaultdict(list)
        for request in fetches:
            if request.blob and request.status < 400:
                by_blob[request.blob].append(request)
        return cls(
            requests=len(fetches),
            written=sum(request.written for request in fetches),
            manifest_requests=sum(request.is_manifest for request in fetches),
            errors=sum(request.status >= 400 for request in fetches),
            blobs={
                digest: BlobTraffic(
                    len(found), sum(request.status == 206 for request in found), sum(r.written for r in found)
                )
                for digest, found in by_blob.items()
            },
            round_trip_waits=_longest_row(fetches),
            busy_s=_covered_s(fetches),
        )


def _longest_row(requests: list[Request]) -> int:
    # Interval scheduling: taking the request that ends first, then the next that begins after it, is optimal.
    count, free_s = 0, float("-inf")
    for request in sorted(requests, key=lambda request: request.ended_s):
        if request.began_s >= free_s:
            count, free_s = count + 1, request.ended_s
    return count


def _covered_s(requests: list[Request]) -> float:
    total_s, until_s = 0.0, float("-inf")
    for request in sorted(requests, key=lambda request: request.began_s):
        total_s += max(0.0, request.ended_s - max(until_s, request.began_s))
        until_s = max(until_s, request.ended_s)
    return total_s


class RegistryHost(Closing):
    """docker-registry in a network namespace; a context manager. ``directory`` keeps images between runs.

    With ``tls`` a second process serves the same images by HTTPS at ``secure_host``; both write the same log.
    """

    def __init__(self, directory: Path, network: ExperimentNetwork, port: int = 5000, *, tls: bool = False) -> None:
        self.directory = directory
        self.network = network
        self.port = port
        self.tls = tls
        self.log_path = directory / "registry.log"
        self._daemons: list[Daemon] = []

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log_path.unlink(missing_ok=True)
        try:
            self._serve("plain", self.host, {})
            if self.tls:
                make_certificate(self.certificate, self._key, self.network.benchmark_address)
                files = {"certificate": str(self.certificate), "key": str(self._key)}
                self._serve("tls", self.secure_host, {"tls": files})
        except BaseException:
            self.close()
            raise
        return self

    def _serve(self, name: str, host: str, http: dict[str, Any]) -> None:
        config = self.directory / f"{name}.yml"
        # YAML is a superset of JSON.
        config.write_text(json.dumps(self._configuration(host, http), indent=1))
        command = [*self.network.enter, "docker-registry", "serve", str(config)]
        # Another registry may have the address; the log proves that this one listens.
        begun = self._listening()
        daemon = Daemon("docker-registry", command, self.log_path)
        self._daemons.append(daemon)
        daemon.wait_for(lambda: self._listening() > begun and _accepts(host), f"answer on {host}")

    def _listening(self) -> int:
        return self.log_path.read_text(errors="replace").count('"listening on') if self.log_path.exists() else 0

    def close(self) -> None:
        """Stop the registry; its images stay on disk. Idempotent."""
        for daemon in self._daemons:
            daemon.stop()

    @property
    def host(self) -> str:
        """The "address:port" that references to the registry's images begin with."""
        return f"{self.network.address}:{self.port}"

    @property
    def secure_host(self) -> str:
        """The "address:port" with TLS."""
        return f"{self.network.benchmark_address}:{self.port}"

    @property
    def certificate(self) -> Path:
        """The file with the certificate that clients of ``secure_host`` must trust."""
        return self.directory / "tls.crt"

    @property
    def _key(self) -> Path:
        return self.directory / "tls.key"

    def reference(self, name: str, tag: str = "latest", *, secure: bool = False) -> str:
        """Return the reference of an image in this registry; ``secure`` names the TLS host."""
        return f"{self.secure_host if secure else self.host}/{name}:{tag}"

    def push_layout(self, layout: Path, name: str, tag: str = "latest") -> str:
        """Push the first image of an OCI layout directory without the rate limit; return its reference.

        Raises FormatError for a damaged layout, SourceError if the registry refuses.
        """
        reference = Reference.parse(self.reference(name, tag))
        client = RegistryClient()
        try:
            with self.network.unshaped():
                push_layout(layout, client, reference)
        finally:
            client.close()
        return str(reference)

    def preload(self) -> int:
        """Read all stored files into the page cache, so that requests do not wait for the disk; return their size."""
        total = 0
        for path in (self.directory / "data").rglob("*"):
            if path.is_file():
                with path.open("rb", buffering=0) as stream:
                    while chunk := stream.read(_CHUNK):
                        total += len(chunk)
        return total

    def mark(self) -> int:
        """Return a position in the log, after all requests answered before this call.

        The registry logs a request just after sending its last byte, so the call waits until the log has been still
        for 30 ms (at most 5 s).
        """
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        size, still_since = -1, time.monotonic()
        while time.monotonic() < deadline:
            now = self.log_path.stat().st_size
            if now != size:
                size, still_since = now, time.monotonic()
            elif time.monotonic() - still_since >= _SETTLE_S:
                break
            time.sleep(0.005)
        return size

    def wait_for_silence(self, still_s: float, timeout_s: float) -> bool:
        """Wait until the registry has served nothing for ``still_s``. Return False after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        size, still_since = self.log_path.stat().st_size, time.monotonic()
        while (now_s := time.monotonic()) < deadline:
            time.sleep(0.05)
            if (now := self.log_path.stat().st_size) != size:
                size, still_since = now, time.monotonic()
            elif now_s - still_since >= still_s:
                return True
        return False

    def requests(self, begin: int, end: int) -> list[Request]:
        """Return the requests logged between two marks."""
        with self.log_path.open("rb") as stream:
            stream.seek(begin)
            return parse_log(stream.read(end - begin).decode(errors="replace"))

    def traffic(self, begin: int, end: int) -> Traffic:
        """Return the traffic between two marks."""
        return Traffic.of(self.requests(begin, end))

    def _configuration(self, host: str, http: dict[str, Any]) -> dict[str, Any]:
        return {
            "version": "0.1",
            "log": {"level": "info", "formatter": "json", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.directory / "data")},
                "delete": {"enabled": True},
                "maintenance": {"uploadpurging": {"enabled": False}},
            },
            "http": {"addr": host, "secret": secrets.token_hex(16), **http},
            "health": {"storagedriver": {"enabled": False}},
        }


def _accepts(host: str) -> bool:
    address, _, port = host.rpartition(":")
    try:
        socket.create_connection((address, int(port)), timeout=5.0).close()
    except OSError:
        return False
    return True


def make_certificate(certificate: Path, key: Path, address: str) -> None:
    """Write a self-signed server certificate for an IP address, and its key. Raises LabError."""
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30", "-keyout")
    names = ("-subj", "/CN=obdlab lab", "-addext", f"subjectAltName=IP:{address}")
    run(["openssl", "req", "-x509", *new_key, key, "-out", certificate, *names])


def parse_log(text: str) -> list[Request]:
    """Parse docker-registry's JSON log; lines without a finished request are skipped."""
    requests = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a stack trace, or the last line still being written
        if isinstance(entry, dict) and "http.response.status" in entry and "http.request.uri" in entry:
            requests.append(_request(entry))
    return requests


def _request(entry: dict[str, Any]) -> Request:
    return Request(
        method=str(entry.get("http.request.method", "")),
        uri=str(entry["http.request.uri"]),
        status=_number(entry["http.response.status"]),
        written=_number(entry.get("http.response.written", 0)),
        duration_s=parse_duration_s(str(entry.get("http.response.duration", "0s"))),
        ended_s=parse_time_s(str(entry.get("time", ""))),
        user_agent=str(entry.get("http.request.useragent", "")),
    )


def _number(value: object) -> int:
    if type(value) is not int:
        raise LabError(f"registry log: not a number (got {value!r})")
    return value


_UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "µs": 1e-6, "μs": 1e-6, "us": 1e-6, "ns": 1e-9}
_DURATION = re.compile(r"([0-9]+(?:[.][0-9]+)?)(ms|µs|μs|us|ns|h|m|s)")


def parse_duration_s(text: str) -> float:
    """Parse a duration in Go's form ("1.5ms", "1m2.5s") into seconds. Raises LabError."""
    parts = _DURATION.findall(text)
    if "".join(number + unit for number, unit in parts) != text or not parts:
        raise LabError(f"not a duration (got {text!r})")
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)


_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?Z", re.ASCII)


def parse_time_s(text: str) -> float:
    """Return the Unix time of an RFC 3339 time in UTC with any number of decimals. Raises LabError."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise LabError(f"not a time in UTC (got {text!r})")
    try:
        whole = datetime.fromisoformat(match[1]).replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise LabError(f"not a time in UTC (got {text!r})") from None
    return whole + float(match[2] or 0)


def program_version() -> str:
    """Return the output of ``docker-registry --version``; '' if it is not installed."""
    if shutil.which("docker-registry") is None:
        return ""
    return run(["docker-registry", "--version"]).strip()
