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
from collections.abc import Iterator

import obdlab
from obdlab.convert.tar.reader import TarStream

#: Methods of obdlab's classes that replace a private one of a library's class, with where and of what.
KNOWN = {
    ("obdlab.convert.tar.reader", "_frombuf", "tarfile.TarInfo"),
    ("obdlab.convert.tar.reader", "_proc_member", "tarfile.TarInfo"),
    ("obdlab.convert.tar.reader", "_proc_pax", "tarfile.TarInfo"),
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
        f"gone from Python {sys.version.split()[0]}: see each one's test below"
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
