"""TLS configuration: CA bundles and client certificates, for all hosts or one.

Per host, docker's and containerd's directories are read: ``<directory>/<host[:port]>/`` with ``*.crt`` (CAs to trust
besides the others), ``*.cert`` and ``*.key`` (client certificate), or containerd's ``hosts.toml`` (``ca``,
``client``, ``skip_verify`` of the server, at the top or in the ``[host."https://..."]`` table of that host).
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import canonical_host

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_MAX_FILE = 1 << 20
_MAX_HOST = 255
_MOST_FILES = 256


@dataclass(frozen=True, slots=True)
class TLSOptions:
    """Options for all hosts, and directories of options for single hosts.

    ``ca_path``, PEM, is trusted besides the system's CAs, or in their place with ``ca_only``. Certificates of
    ``insecure_hosts`` ("host" or "host:port") are not verified: anyone on the path can read and change everything.
    """

    ca_path: Path | None = None
    ca_only: bool = False
    client_cert: Path | None = None
    client_key: Path | None = None
    certs_dirs: tuple[Path, ...] = ()
    insecure_hosts: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class HostTLS:
    """Options of one host. Hosts without options of their own are equal, and share a context."""

    ca_paths: tuple[Path, ...] = ()
    ca_only: bool = False
    client: tuple[Path, Path] | None = None
    verify: bool = True


def tls_of_host(options: TLSOptions, host: str) -> HostTLS:
    """Return the options of ``host`` ("name" or "name:port"). Raises RegistryError if its files are malformed."""
    cert, key = options.client_cert, options.client_key
    found = HostTLS(
        ca_paths=() if options.ca_path is None else (options.ca_path,),
        ca_only=options.ca_only,
        client=None if cert is None else (cert, key or cert),
        verify=not {host, host.rpartition(":")[0] or host} & options.insecure_hosts,
    )
    for directory in _directories(options, host):
        if not (directory / "hosts.toml").is_file():
            found = _with_files(found, directory)
    for path in _hosts_files(options):
        own = path.parent.name in (host, canonical_host(host))
        found = _with_hosts_toml(found, path, host, own=own)
    if not found.verify:
        logger.warning("%s: its certificate is not verified, since the settings say so", host)
    return found


def make_context(tls: HostTLS) -> ssl.SSLContext:
    """Return a context that verifies certificate and name. Raises RegistryError naming the file that is unusable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if tls.ca_only else ssl.create_default_context()
    if hasattr(ssl, "VERIFY_X509_STRICT"):
        # The default from Python 3.13 on; refuses private CAs that curl, docker and older Pythons accept.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for path in tls.ca_paths:
        try:
            context.load_verify_locations(path)
        except OSError as error:  # ssl.SSLError is one
            raise RegistryError(f"{path}: not a usable CA bundle ({_reason(error)})") from error
    if tls.client is not None:
        cert, key = tls.client
        try:
            # Without a password argument OpenSSL would ask for one at the terminal.
            context.load_cert_chain(cert, key, password="")
        except OSError as error:
            raise RegistryError(f"{cert}, {key}: not a usable client certificate ({_reason(error)})") from error
    return context


def _directories(options: TLSOptions, host: str) -> Iterator[Path]:
    # The host is not trusted: it must not lead out of the directory.
    if not host or "/" in host or host.startswith(".") or len(host) > _MAX_HOST:
        return
    for name in dict.fromkeys((canonical_host(host), host)):
        for base in options.certs_dirs:
            if (base / name).is_dir():
                yield base / name


def _with_files(found: HostTLS, directory: Path) -> HostTLS:
    try:
        names = sorted(directory.iterdir())
    except OSError as error:
        raise RegistryError(f"{directory}: cannot look for certificates ({error.strerror})") from error
    authorities = tuple(path for path in names if path.suffix == ".crt")
    client = found.client
    for cert in names:
        if cert.suffix == ".cert":
            key = cert.with_suffix(".key")
            if not key.is_file():
                raise RegistryError(f"{cert}: no key beside it (wanted {key.name})")
            client = (cert, key)
    return replace(found, ca_paths=found.ca_paths + authorities, client=client)


# Returns all files, since a registry's file may also configure its mirrors.
def _hosts_files(options: TLSOptions) -> list[Path]:
    files = (path for base in options.certs_dirs if base.is_dir() for path in sorted(base.glob("*/hosts.toml")))
    return list(islice(files, _MOST_FILES))


def _with_hosts_toml(found: HostTLS, path: Path, host: str, *, own: bool) -> HostTLS:
    import tomllib  # most hosts have no such file

    try:
        with path.open("rb") as file:
            document = tomllib.loads(file.read(_MAX_FILE).decode())
    except (OSError, ValueError, RecursionError) as error:
        if own:
            raise RegistryError(f"{path}: cannot be read ({error})") from error
        logger.warning("%s: cannot be read (%s)", path, error)
        return found
    tables = [document] if own else []
    hosts = document.get("host")
    for url, table in hosts.items() if isinstance(hosts, dict) else ():
        if isinstance(table, dict) and _netloc(url) == host:
            tables.append(table)
    for table in tables:
        authorities = tuple(_path(each, path) for each in _list(table.get("ca"), path, "ca"))
        client = found.client
        for each in _list(table.get("client"), path, "client"):
            pair = each if isinstance(each, list) and len(each) == 2 else [each, each]
            cert, key = _path(pair[0], path), pair[1]
            client = (cert, _path(key, path) if key else cert)
        skip = table.get("skip_verify", False)
        if not isinstance(skip, bool):
            raise RegistryError(f"{path}: skip_verify: wrong value (got {skip!r}, wanted true or false)")
        found = replace(found, ca_paths=found.ca_paths + authorities, client=client, verify=found.verify and not skip)
    return found


def _list(value: object, path: Path, key: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    raise RegistryError(f"{path}: {key}: wrong value (got {type(value).__name__}, wanted a path or a list)")


def _path(value: object, path: Path) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise RegistryError(f"{path}: wrong value (got {value!r}, wanted a path)")
    return path.parent / value


def _netloc(url: str) -> str:
    try:
        return urlsplit(url if "://" in url else f"https://{url}").netloc
    except ValueError:
        return ""


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "no PEM file").lower().replace("_", " ")
    return error.strerror or str(error)
