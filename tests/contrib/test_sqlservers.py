"""Databases of converted layers on real PostgreSQL and MariaDB servers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.convert.database import DatabaseError, open_database
from obdlab.convert.endpoints.layout import ImageLayout
from tests import capabilities
from tests.contrib.databases import mariadb, postgresql
from tests.convert.test_reuse import BASE, contract, convert, image_of, many_writers, member, options, reused

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from obdlab.convert.image import ConvertOptions

__all__ = ["options"]


@pytest.mark.slow
@pytest.mark.parametrize("server", [postgresql, mariadb])
def test_shared_database(
    server: Callable[[], AbstractContextManager[str]], options: ConvertOptions, tmp_path: Path
) -> None:
    capabilities.require_package("sqlalchemy")
    with server() as url:
        many_writers(url)
        contract(url)
        shared = replace(options, database=url)
        source = image_of(tmp_path / "source", BASE, [member("top", b"1")])
        first = convert(source, f"oci:{tmp_path / 'out'}:a", shared)
        assert reused(convert(source, f"oci:{tmp_path / 'out'}:b", shared)) == ["image was there"] * 2
        ImageLayout(tmp_path / "out").blob_path(first.layers[1].built.digest).unlink()
        assert reused(convert(source, f"oci:{tmp_path / 'out'}:b", shared)) == ["was there", ""]
    with pytest.raises(DatabaseError, match=r"127\.0\.0\.1"):
        convert(source, f"oci:{tmp_path / 'out'}:b", shared)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://nobody:secret@127.0.0.1:1/x", r"postgresql\+psycopg://nobody:\*\*\*@127.0.0.1:1/x: .*refused"),
        ("postgres://nobody:secret@127.0.0.1:1/x", r"postgresql\+psycopg://nobody:\*\*\*@127.0.0.1:1/x: .*refused"),
        ("mysql://nobody:secret@127.0.0.1:1/x", r"nobody:\*\*\*@.*"),
    ],
)
def test_servers_that_cannot_be_reached(url: str, message: str) -> None:
    capabilities.require_package("sqlalchemy")
    with pytest.raises(DatabaseError, match=message) as caught:
        open_database(url)
    assert "secret" not in str(caught.value)
