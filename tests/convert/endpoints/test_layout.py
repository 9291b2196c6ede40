"""A blob file in a layout is read whole or in any steps; its last byte comes only once the digest is right."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.convert.endpoints.layout import VerifiedFile, split_tag
from obdlab.errors import CorruptBlobError, SourceError
from obdlab.formats.oci import Descriptor, digest_of

DATA = bytes(range(256)) * 20


def descriptor(data: bytes = DATA, *, size: int | None = None) -> Descriptor:
    return Descriptor("application/octet-stream", digest_of(data), len(data) if size is None else size)


@given(st.lists(st.integers(0, 2000), max_size=12), st.sampled_from([None, 0, 7]))
def test_any_steps_give_all_bytes(tmp_path: Path, steps: list[int], start: int | None) -> None:
    (tmp_path / "blob").write_bytes(bytes(start or 0) + DATA + (b"after" if start is not None else b""))
    with VerifiedFile(tmp_path / "blob", descriptor(), start) as file:
        found = b""
        for size in steps:
            piece = file.read(size)
            assert len(piece) <= size
            found += piece
            assert file.position == len(found)
        assert found + file.read() == DATA
        assert file.read(10) == file.read() == b""
        assert file.as_blob().read_at(0, len(DATA)) == DATA


def test_the_last_byte_of_wrong_content_does_not_come(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(DATA[:-1] + b"x")
    with VerifiedFile(tmp_path / "blob", descriptor()) as file:
        assert file.read(len(DATA) - 1) == DATA[:-1]
        with pytest.raises(CorruptBlobError, match="wrong content"):
            file.read(1)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 0])
def test_another_size_is_noticed_before_the_first_byte(tmp_path: Path, size: int) -> None:
    (tmp_path / "blob").write_bytes(DATA)
    with pytest.raises(CorruptBlobError, match="wrong size"):
        VerifiedFile(tmp_path / "blob", descriptor(size=size))
    with pytest.raises(SourceError, match="cannot read it"):
        VerifiedFile(tmp_path / "missing", descriptor())


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(DATA)
    with VerifiedFile(tmp_path / "blob", descriptor()) as file:
        (tmp_path / "blob").write_bytes(b"")
        assert file.read(0) == b""
        with pytest.raises(CorruptBlobError, match="became shorter"):
            file.read()


def test_a_blob_has_a_file_of_its_own(tmp_path: Path) -> None:
    path, directory = tmp_path / "blob", tmp_path / "copies"
    path.write_bytes(b"before" + DATA + b"after")
    directory.mkdir()
    with VerifiedFile(path, descriptor(), 6) as file:
        assert file.read(3) == DATA[:3]
        with file.own_file(directory) as own:
            assert own.parent == directory
            assert own.read_bytes() == DATA
    assert list(directory.iterdir()) == []
    with VerifiedFile(path, descriptor(path.read_bytes())) as file, file.own_file(directory) as own:
        assert own == path


@pytest.mark.parametrize("start", [None, 6])
def test_a_damaged_blob_has_no_file_of_its_own(tmp_path: Path, start: int | None) -> None:
    (tmp_path / "blob").write_bytes(bytes(start or 0) + DATA[:-1] + b"x")
    with (
        VerifiedFile(tmp_path / "blob", descriptor(), start) as file,
        pytest.raises(CorruptBlobError, match="wrong content"),
        file.own_file(tmp_path),
    ):
        raise AssertionError("it was given")
    assert [each.name for each in tmp_path.iterdir()] == ["blob"]


def test_a_copy_that_cannot_be_written_names_the_blob(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"-" + DATA)
    with (
        VerifiedFile(tmp_path / "blob", descriptor(), 1, name="archive") as file,
        pytest.raises(SourceError, match="archive: cannot copy it: No such file"),
        file.own_file(tmp_path / "missing"),
    ):
        raise AssertionError("it was given")


@pytest.mark.parametrize(
    ("text", "path", "tag"),
    [
        ("a", "a", None),
        ("a:v1", "a", "v1"),
        ("/x/y:z/w", "/x/y:z/w", None),
        ("a:b:c", "a:b", "c"),
        ("a:", "a:", None),
    ],
)
def test_tags_of_layouts(text: str, path: str, tag: str | None) -> None:
    assert split_tag(text) == (Path(path), tag)
