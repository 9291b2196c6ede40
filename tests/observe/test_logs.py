"""Structured logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.observe import logs
from obdlab.observe.logs import LogFormatError, LogOptions
from obdlab.registry.errors import RegistryError


@pytest.fixture(autouse=True)
def root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def entries(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_errors_tell_blob_offset_and_tries(tmp_path: Path) -> None:
    logs.set_up(LogOptions(format="json", file=tmp_path / "log"), logging.INFO)
    error = RegistryError("reading blob: registry answered 503", status=503, temporary=True).at("r/x@sha256:00", 7, 4)
    log = logging.getLogger("obdlab.test")
    log.warning("fetching failed: %s", error)
    log.error("%s: %s", "redis", "read failed", extra={"cause": error})
    log.debug("not logged")
    for entry in entries(tmp_path / "log"):
        wanted = {"blob": "r/x@sha256:00", "offset": 7, "tries": 4, "status": 503, "logger": "obdlab.test"}
        assert wanted.items() <= entry.items()
    first, second = entries(tmp_path / "log")
    assert first["level"] == "warning"
    assert first["message"] == (
        "fetching failed: r/x@sha256:00: reading blob: registry answered 503 (after 4 tries) at offset 7"
    )
    assert second["message"] == "redis: read failed"


def test_what_is_odd_stays_one_line_of_json(tmp_path: Path) -> None:
    logs.set_up(LogOptions(format="json", file=tmp_path / "log"), logging.INFO)
    try:
        raise KeyError("of\nlines \udcff")
    except KeyError:
        logging.getLogger("x").exception("two\nlines %s", "\ud800")
    (entry,) = entries(tmp_path / "log")
    assert entry["message"] == "two\nlines \ud800"
    assert "KeyError" in str(entry["trace"])


#: Of C0, C1 and Unicode: line breaks, an escape sequence, a separator, and what reverses the order of a line.
FORGED = "x\r\n2026-01-01 00:00:00,000 1 INFO obdlab: \x1b]0;title\x07\x9b2J\x7f\u2028\u2029\u202e\u2066\t\0end"
ESCAPED = r"x\r\n2026-01-01 00:00:00,000 1 INFO obdlab: \x1b]0;title\x07\x9b2J\x7f\u2028\u2029\u202e\u2066\t\x00end"


def test_a_message_forges_no_line_and_controls_no_terminal(tmp_path: Path) -> None:
    logs.set_up(LogOptions(file=tmp_path / "log"), logging.INFO)
    logging.getLogger("x").info("answered %s", FORGED)
    lines = (tmp_path / "log").read_bytes().decode().split("\n")
    assert [line.partition(" x: ")[2] for line in lines] == [f"answered {ESCAPED}", ""]


def test_a_traceback_keeps_its_lines_and_forges_none(tmp_path: Path) -> None:
    logs.set_up(LogOptions(file=tmp_path / "log"), logging.INFO)
    try:
        raise KeyError("of\nlines") from ValueError(FORGED)
    except KeyError:
        logging.getLogger("x").exception("Bearer\t%s", "t" * 16)
    text = (tmp_path / "log").read_bytes().decode()
    first, title, *lines = text.removesuffix("\n").split("\n")
    assert first.endswith(" ERROR x: Bearer …")
    assert title == rf"ValueError: {FORGED}".split("\n")[0].replace("\r", r"\r")
    assert len(lines) > 4
    assert {line[:2] for line in lines} == {"  "}
    assert text.replace("\n", "").isprintable()


def test_text_rotates(tmp_path: Path) -> None:
    logs.set_up(LogOptions(file=tmp_path / "log", size=200, count=2), logging.INFO)
    for number in range(20):
        logging.getLogger("x").info("message %d", number)
    assert "message 19" in (tmp_path / "log").read_text()
    assert {entry.name for entry in tmp_path.iterdir()} == {"log", "log.1"}


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogFormatError, match=r"wanted one of text, json \(got 'xml'\)"):
        LogOptions(format="xml")
    with pytest.raises(ValueError, match="at least 1"):
        LogOptions(size=0)
    with pytest.raises(OSError, match="none"):
        logs.set_up(LogOptions(file=tmp_path / "none" / "log"), logging.INFO)
