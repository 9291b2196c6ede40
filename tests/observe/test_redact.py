"""Texts without the secrets that they quote."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from obdlab.observe.logs import JsonFormatter, TextFormatter
from obdlab.observe.redact import redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://s.example/x?X-Sig=abc&y=z failed", "https://s.example/x?… failed"),
        ('"GET /x?sig=abc%2B HTTP/1.1" 206', '"GET /x?… HTTP/1.1" 206'),
        ("https://user:pass@h.example/x", "https://…@h.example/x"),
        ("{'Authorization': 'Bearer abcdef'}", "{'Authorization': 'Bearer …'}"),
        ("Authorization: Basic dTpw", "Authorization: Basic …"),
        ("authorization=dTpw", "authorization=…"),
        ("sent Bearer eyJhbGciOiJSUzI1NiJ9.e30.x", "sent Bearer …"),
        ("registry answered 503 (is it up? maybe)", "registry answered 503 (is it up? maybe)"),
        ("host/x@sha256:00 at offset 5", "host/x@sha256:00 at offset 5"),
    ],
)
def test_secrets(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter("%(message)s")])
def test_no_log_line_shows_one(formatter: logging.Formatter, tmp_path: Path) -> None:
    try:
        raise ValueError("https://s.example/x?sig=s3cr3t")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.INFO, "f", 1, "at %s", ("https://s.example/y?sig=s3cr3t",), info)
    line = formatter.format(record)
    assert "s3cr3t" not in line
    assert "ValueError" in line
