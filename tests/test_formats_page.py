"""The programs on the page of formats decode what the original wrote: a reader with only that page can."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from obdlab.layers.append import AppendUpper
from obdlab.layers.commit import commit
from tests.layers.golden import GOLDEN, LSMT, manifest
from tests.layers.golden import entry as entry_of_layer

PAGE = (Path(__file__).parents[1] / "docs" / "reference" / "formats.md").read_text()
ZFILES = [e for e in manifest("zfile")["entries"] if ".lz4." in e["file"]]


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(text, "docs/reference/formats.md", "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize("entry", [e for e in ZFILES if e["decoded_size"] < 400_000], ids=lambda entry: entry["file"])
def test_zfiles(program: dict[str, Any], entry: dict[str, Any]) -> None:
    content = program["open_content"]((GOLDEN / "zfile" / entry["file"]).read_bytes())
    assert hashlib.sha256(content).hexdigest() == entry["decoded_sha256"]


@pytest.mark.parametrize("name", ["l1.lz4.lsmt", "l1.lz4tar.lsmt", "l1.plain.lsmt"])
def test_layers_are_unpacked(program: dict[str, Any], name: str) -> None:
    open_content: Callable[[bytes], bytes] = program["open_content"]
    plain = (LSMT / "l1.plain.lsmt").read_bytes()
    content = open_content((LSMT / name).read_bytes())
    # Their messages and UUIDs differ; the data does not.
    assert content[4096:-4096] == plain[4096:-4096]


@pytest.mark.parametrize("name", ["l1.lz4tar.lsmt", "l1.sealed.lsmt", "l2.plain.lsmt", "l2.lz4.lsmt"])
def test_layers_as_disks(program: dict[str, Any], name: str) -> None:
    disk = program["read_disk"]([(LSMT / name).read_bytes()])
    assert hashlib.sha256(disk).hexdigest() == entry_of_layer(name)["decoded_sha256"]


def test_a_stack(program: dict[str, Any]) -> None:
    names = ["l1.plain.lsmt", "l2.plain.lsmt"]
    disk = program["read_disk"]([(LSMT / name).read_bytes() for name in names])
    wanted = next(e for e in manifest("lsmt")["entries"] if e.get("stack") == names)["decoded_sha256"]
    assert hashlib.sha256(disk).hexdigest() == wanted


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_a_writable_layer(program: dict[str, Any], name: str) -> None:
    held = program["read_append_layer"]((LSMT / f"{name}.data").read_bytes(), (LSMT / f"{name}.index").read_bytes())
    disk = b"".join(held.get(sector, bytes(512)) for sector in range((1 << 20) // 512))
    assert hashlib.sha256(disk).hexdigest() == entry_of_layer(f"{name}.data")["decoded_sha256"]


def test_the_example_of_a_layer_is_a_commit(tmp_path: Path) -> None:
    out = io.BytesIO()
    with AppendUpper.create(tmp_path / "data", tmp_path / "index", 16384) as upper:
        upper.write_at(1024, b"A" * 512)
        upper.discard(4096, 4096)
        commit(upper, out)
    data = out.getvalue()
    assert len(data) == 4096 + 512 + 4096 + 4096
    lines = re.findall(
        r"^([0-9a-f]{4})  ((?:[0-9a-f]{4} ?)+)", PAGE.split("### Example: a sealed")[1].split("```")[1], re.MULTILINE
    )
    assert len(lines) == 11
    for offset, hexadecimal in lines:
        assert data[int(offset, 16) :].startswith(bytes.fromhex(hexadecimal))


def test_numbers_of_the_page(program: dict[str, Any]) -> None:
    assert program["crc"](b"123456789") == 0x58E3FA20
    assert program["crc"](b"123456789", 100007) == 0x3C9BD4E0


def test_the_example_is_the_file() -> None:
    data = (GOLDEN / "zfile" / "one.lz4.4.zfile").read_bytes()
    lines = re.findall(
        r"^([0-9a-f]{4})  ((?:[0-9a-f]{4} ?)+)", PAGE.split("### Example: a ZFile")[1].split("```")[1], re.MULTILINE
    )
    shown = set()
    for offset, hexadecimal in lines:
        piece = bytes.fromhex(hexadecimal)
        assert data[int(offset, 16) :].startswith(piece)
        shown.update(range(int(offset, 16), int(offset, 16) + len(piece)))
    header = {at for at in range(0x206) if data[at]}
    assert header <= shown, "lines of zeros only are left out"


FEATURES = (Path(__file__).parents[1] / "docs" / "reference" / "features.md").read_text()
REFERENCES = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", FEATURES)))


@pytest.mark.parametrize(("path", "test"), REFERENCES)
def test_the_tests_that_the_features_name_are_there(path: str, test: str) -> None:
    source = Path(__file__).parents[1] / path
    assert source.is_file()
    assert not test or f"def {test}(" in source.read_text()


def test_every_feature_has_a_test_or_a_reason() -> None:
    rows = [line.split("|")[1:-1] for line in FEATURES.splitlines() if re.match(r"\| A\d", line)]
    assert len(rows) > 15
    for number, feature, here, tests in rows:
        assert "tests/" in tests or here.strip().startswith("no"), f"{number}{feature}"
