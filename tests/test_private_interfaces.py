"""Private interfaces of libraries that obdlab relies on: all of them are known, and still do what is relied on.

A library may change what it does not document in any release. Then a test here fails with what has to be looked at,
before a user's deadline or check silently does nothing. `make newest` runs this with the newest versions.
"""

from __future__ import annotations

import importlib
import inspect
import io
import pkgutil
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import urllib3

import obdlab
from obdlab.convert.tar.reader import TarStream
from obdlab.registry import transport
from obdlab.registry.transport import Transport

#: Methods of obdlab's classes that replace a private one of a library's class, with where and of what.
KNOWN = {
    ("obdlab.convert.tar.reader", "_frombuf", "tarfile.TarInfo"),
    ("obdlab.convert.tar.reader", "_proc_member", "tarfile.TarInfo"),
    ("obdlab.convert.tar.reader", "_proc_pax", "tarfile.TarInfo"),
    ("obdlab.registry.transport", "_new_conn", "urllib3.connection.HTTPConnection"),
    ("obdlab.registry.transport", "_validate_conn", "urllib3.connectionpool.HTTPConnectionPool"),
    ("obdlab.registry.transport", "_validate_conn", "urllib3.connectionpool.HTTPSConnectionPool"),
}
# Only some releases of Python have it (obdlab.convert.tar.reader says which).
_NOT_EVERYWHERE = {("obdlab.convert.tar.reader", "_frombuf", "tarfile.TarInfo")}


def _classes() -> Iterator[type]:
    for info in pkgutil.walk_packages(obdlab.__path__, "obdlab."):
        if info.name.endswith("__main__") or "._pb" in info.name:
            continue
        module = importlib.import_module(info.name)
        for _, found in inspect.getmembers(module, inspect.isclass):
            if found.__module__ == info.name:
                yield found


def _private(names: Iterator[str] | dict[str, object]) -> set[str]:
    return {name for name in names if name.startswith("_") and not name.startswith("__") and "__" not in name}


def test_every_private_method_that_is_replaced_is_known() -> None:
    found = set()
    for one in _classes():
        ours = [base for base in one.__mro__ if base.__module__.startswith("obdlab")]
        theirs = [base for base in one.__mro__ if not base.__module__.startswith("obdlab") and base is not object]
        for base in theirs:
            if base.__module__ in ("enum", "typing", "abc"):
                continue  # what classes of these kinds hold is made by Python
            for name in _private(dict(vars(base))):
                owners = [own.__module__ for own in ours if callable(getattr(own, name, None)) and name in vars(own)]
                found |= {(owner, name, f"{base.__module__}.{base.__qualname__}") for owner in owners}
    assert found - KNOWN == set(), "found private methods that are replaced; add a test of each here, and to KNOWN"
    assert KNOWN - found - _NOT_EVERYWHERE == set(), (
        f"gone from urllib3 {urllib3.__version__} or Python {sys.version.split()[0]}: see each one's test below"
    )


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class has it
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_urllib3_connects_through_new_conn(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[str] = []
    dial = transport._DialingMixin._dial

    def counted(self: transport._DialingMixin, deadline: float) -> object:
        dialled.append(type(self).__name__)
        return dial(self, deadline)

    monkeypatch.setattr(transport._DialingMixin, "_dial", counted)
    with closing(Transport(silence_s=30.0, user_agent="test")) as sent:
        assert sent.send("GET", address, {}, doing="a test").status == 204
        with pytest.raises(transport.RegistryError):
            sent.send("GET", address.replace("http:", "https:"), {}, doing="a test")
    assert dialled == ["_PlainConnection", "_TLSConnection"], (
        f"urllib3 {urllib3.__version__} does not call _new_conn of its connections: obdlab/registry/transport.py "
        "must bring its sockets (deadlines, dialler, unix socket) to urllib3 in another way"
    )


def test_urllib3_checks_its_connections_through_validate_conn(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(transport._TLSPool, "_validate_conn", lambda self, conn: asked.append("asked"))
    with closing(Transport(silence_s=5.0, user_agent="test")) as sent, pytest.raises(transport.RegistryError):
        sent.send("GET", "https://127.0.0.1:1/", {}, doing="a test")
    assert asked, (
        f"urllib3 {urllib3.__version__} does not call _validate_conn of its pools: obdlab/registry/transport.py must "
        "keep its warnings of unverified certificates away in another way"
    )


def test_tarfile_parses_headers_where_they_are_checked() -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("name" * 60))
    archive.seek(0)
    # It says so itself where the headers are not: "tar headers cannot be checked with this Python".
    assert [member.name for member in TarStream(archive, "archive")] == [b"name" * 60]
    wanted = ("nts", "InvalidHeaderError", "EOFHeaderError", "EmptyHeaderError", "GNU_MAGIC", "GNU_TYPES")
    missing = [name for name in wanted if not hasattr(tarfile, name)]
    assert not missing, (
        f"tarfile of Python {sys.version.split()[0]} has no {missing}: see obdlab/convert/tar/reader.py"
    )
