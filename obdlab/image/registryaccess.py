"""A registry client with the settings' credentials, certificates, mirrors and proxies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import CredentialsFile, CredentialsService
from obdlab.registry.mirrors import Mirrors
from obdlab.registry.p2p import P2PProxy
from obdlab.registry.tls import TLSOptions
from obdlab.registry.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Collection

    from obdlab.registry.credentials import CredentialSource
    from obdlab.settings.settings import Settings


def open_client(settings: Settings, *, plain_http_hosts: Collection[str] = frozenset()) -> RegistryClient:
    """Return a client configured by ``settings``; it opens nothing before its first use."""
    return RegistryClient(
        credential_source(settings),
        plain_http_hosts=plain_http_hosts,
        request_timeout_s=settings.request_timeout_s,
        deadline_s=settings.read_deadline_s,
        user_agent=settings.user_agent,
        tls=TLSOptions(
            ca_path=settings.tls_ca_path,
            ca_only=settings.tls_ca_only,
            client_cert=settings.tls_client_cert,
            client_key=settings.tls_client_key,
            certs_dirs=settings.tls_certs_dirs,
            insecure_hosts=frozenset(settings.tls_insecure_hosts),
        ),
        mirrors=Mirrors(hosts_dir=settings.hosts_dir),
        p2p=P2PProxy(settings.p2p_address) if settings.p2p_address else None,
        signature_keys=settings.signature_keys,
    )


def credential_source(settings: Settings) -> CredentialSource | None:
    """Return the source of credentials, None if the settings name none."""
    if settings.credentials_mode == "file":
        return None if settings.credentials_path is None else CredentialsFile(settings.credentials_path)
    address, unix_socket = settings.credentials_address, None
    if settings.credentials_mode == "uds":
        address, unix_socket = "http://localhost/auth", Path(settings.credentials_address)
    transport = Transport(
        silence_s=settings.credentials_timeout_s,
        user_agent=settings.user_agent,
        tls=TLSOptions(
            ca_path=settings.credentials_server_ca,
            ca_only=settings.credentials_server_ca is not None,
            client_cert=settings.credentials_client_cert,
            client_key=settings.credentials_client_key,
        ),
        unix_socket=unix_socket,
    )
    return CredentialsService(address, transport, timeout_s=settings.credentials_timeout_s)
