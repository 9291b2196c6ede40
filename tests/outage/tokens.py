"""A small token server for docker-registry's token mode: real signed tokens, short lives, faults of its own."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.registry.faulty import Answer, Answering, Fault, Server

SERVICE = "outage-lab"
ISSUER = "outage-lab-tokens"
#: docker-registry takes a token for this long after its end.
LEEWAY_S = 60.0


@dataclass
class TokenServer:
    """``promised_s`` is what ``expires_in`` says, ``life_s`` how long the registry really takes a token."""

    directory: Path
    promised_s: float = 300.0
    life_s: float = 300.0
    issued: int = 0
    fault: Fault | None = None
    port: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def certificate(self) -> Path:
        return self.directory / "token.crt"

    @property
    def key(self) -> Path:
        return self.directory / "token.key"

    def registry_auth(self) -> dict[str, object]:
        """The registry's ``auth`` section."""
        return {
            "token": {
                "realm": f"http://127.0.0.1:{self.port}/token",
                "service": SERVICE,
                "issuer": ISSUER,
                "rootcertbundle": str(self.certificate),
            }
        }

    def reset(self) -> None:
        """Back to long-lived tokens, without a fault."""
        self.promised_s = self.life_s = 300.0
        self.fault = None

    def token(self, scope: str) -> str:
        """A token for "repository:<name>:<actions>" (docker's token specification, "JWT")."""
        kind, name, actions = scope.split(":")
        end = time.time() - LEEWAY_S + self.life_s
        certificate = self.certificate.read_text()
        header = {"typ": "JWT", "alg": "RS256", "x5c": ["".join(certificate.split("-----")[2].split())]}
        claims = {
            "iss": ISSUER,
            "sub": "",
            "aud": SERVICE,
            "exp": int(end),
            "nbf": int(end) - 3600,
            "iat": int(end) - 3600,
            "jti": uuid.uuid4().hex,
            "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
        }
        signed = f"{_base64url(json.dumps(header).encode())}.{_base64url(json.dumps(claims).encode())}"
        command = ["openssl", "dgst", "-sha256", "-sign", str(self.key)]
        signature = subprocess.run(command, input=signed.encode(), capture_output=True, check=True).stdout
        return f"{signed}.{_base64url(signature)}"


@contextmanager
def token_server(directory: Path) -> Iterator[TokenServer]:
    """Run one on a free loopback port, with a key of its own."""
    directory.mkdir(parents=True)
    tokens = TokenServer(directory)
    make_key(tokens.key, tokens.certificate, "/CN=tokens")
    server = _TokenHTTPServer(("127.0.0.1", 0), _TokenHandler)
    server.tokens = tokens
    tokens.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield tokens
    finally:
        tokens.closing.set()
        server.shutdown()
        server.hang_up()
        thread.join()
        server.server_close()


def make_key(key: Path, certificate: Path, subject: str, *options: str) -> None:
    """Make a key and a certificate signed by itself, or as more options of ``openssl req -x509`` say."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", subject]
    command += ["-keyout", str(key), "-out", str(certificate), *options]
    subprocess.run(command, check=True, capture_output=True)


class _TokenHTTPServer(Server):
    tokens: TokenServer


class _TokenHandler(Answering):
    server: _TokenHTTPServer

    @property
    def closing(self) -> threading.Event:
        return self.server.tokens.closing

    def do_GET(self) -> None:  # noqa: N802 - http.server looks for this name
        tokens = self.server.tokens
        tokens.issued += 1
        scope = parse_qs(urlsplit(self.path).query)["scope"][0]
        body = json.dumps({"token": tokens.token(scope), "expires_in": tokens.promised_s}).encode()
        answer = Answer(self, 200, {"Content-Type": "application/json"}, body)
        answer.send() if tokens.fault is None else tokens.fault(answer)


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
