"""Certificates of our own, and the misbehaving registry behind TLS."""

from __future__ import annotations

import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.registry.faulty import FaultyRegistry, Handler, Server


@dataclass(frozen=True)
class Authority:
    """A CA that signs server and client certificates, which it keeps in its directory."""

    directory: Path

    @property
    def certificate(self) -> Path:
        return self.directory / "ca.crt"

    @classmethod
    def make(cls, directory: Path) -> Authority:
        directory.mkdir(parents=True)
        made = cls(directory)
        _openssl("req", "-x509", *_NEW_KEY, directory / "ca.key", "-out", made.certificate, "-subj", "/CN=tests CA")
        return made

    def sign(self, name: str, *options: str, host: str = "IP:127.0.0.1,DNS:localhost") -> tuple[Path, Path]:
        """Make a certificate for ``host`` (a subjectAltName) and its key."""
        cert, key = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        command = [
            "-subj",
            f"/CN={name}",
            "-addext",
            f"subjectAltName={host}",
            "-addext",
            "basicConstraints=CA:FALSE",
        ]
        signer = ["-CA", self.certificate, "-CAkey", self.directory / "ca.key"]
        _openssl("req", "-x509", *_NEW_KEY, key, "-out", cert, *command, *signer, *options)
        return cert, key


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout")


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@contextmanager
def tls_registry(cert: Path, key: Path, *, clients: Path | None = None) -> Iterator[FaultyRegistry]:
    """Run the misbehaving registry with a server certificate; with ``clients`` only for whom that CA has signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients)
    registry = FaultyRegistry()
    server = Server(("127.0.0.1", 0), Handler)
    server.registry = registry
    registry.port = server.server_address[1]
    # The handshake is the handler thread's, when it first reads: a client may break it off.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield registry
    finally:
        registry.closing.set()
        server.shutdown()
        server.hang_up()
        thread.join()
        server.server_close()
