"""Users, certificates and databases as the original's options name them, as options of obdlab's commands."""

from __future__ import annotations

import base64
import json
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote

from obdlab.cli.dropin.grammar import ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@contextmanager
def credentials_file(user: str, host: str) -> Iterator[list[str]]:
    """Give --credentials for ``user:password`` at a registry, a private file for the block; without user nothing."""
    if not user:
        yield []
        return
    # docker.io's credentials stand under this name in docker's files, too.
    names = [host, "https://index.docker.io/v1/"] if host in ("docker.io", "registry-1.docker.io") else [host]
    entry = {"auth": base64.b64encode((user if ":" in user else f"{user}:").encode()).decode()}
    with tempfile.NamedTemporaryFile("w", prefix="obdlab-credentials-", suffix=".json") as file:
        json.dump({"auths": dict.fromkeys(names, entry)}, file)
        file.flush()
        yield ["--credentials", file.name]


@contextmanager
def certificates_file(paths: Sequence[str]) -> Iterator[list[str]]:
    """Give --tls-ca for any number of files of certificates, joined for the block. Raises ToolError."""
    if not paths:
        yield []
        return
    with tempfile.NamedTemporaryFile("wb", prefix="obdlab-ca-", suffix=".pem") as file:
        for path in paths:
            try:
                with open(path, "rb") as source:
                    file.write(source.read().rstrip(b"\n") + b"\n")
            except OSError as error:
                raise ToolError(f"{path}: cannot be read ({error.strerror})") from error
        file.flush()
        yield ["--tls-ca", file.name]


def database_url(source_name: str) -> str:
    """Return the URL of a database for a data source name of Go's MySQL driver, user:password@tcp(host:port)/name.

    Raises ToolError for another form, without the password.
    """
    account, at, rest = source_name.rpartition("@")
    protocol, opened, place = rest.partition("(")
    address, closed, path = place.partition(")")
    name = path.removeprefix("/").partition("?")[0]
    if not (at and opened and closed and protocol == "tcp" and path.startswith("/") and name):
        raise ToolError("database: wanted user:password@tcp(host:port)/name")
    user, _, password = account.partition(":")
    return f"mysql://{quote(user, safe='')}:{quote(password, safe='')}@{address}/{quote(name, safe='')}"


def host_of(reference: str) -> str:
    """Return the registry's host of an image's name. Raises FormatError."""
    from obdlab.registry.reference import Reference

    return Reference.parse(reference).host
