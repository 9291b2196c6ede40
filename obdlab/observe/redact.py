"""Removal of secrets from texts: signed URLs, users in URLs, Authorization headers. No log or error may have them."""

from __future__ import annotations

import logging
import re

_QUERY = re.compile(r"\?[^\s'\"<>?=]*=[^\s'\"<>]*")
_USER = re.compile(r"(?<=://)[^\s/@'\"]+@")
_HEADER = re.compile(r"(authorization['\"]?\s*[:=,]\s*['\"]?(?:[a-z]+\s+)?)[^\s'\",]+", re.IGNORECASE)
_TOKEN = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{16,}")


def redacted(text: str) -> str:
    """Return the text without queries of URLs, users in URLs, and values of Authorization headers."""
    text = _USER.sub("…@", _QUERY.sub("?…", text))
    return _TOKEN.sub(r"\1 …", _HEADER.sub(r"\1…", text))


class Redacting(logging.Filter):
    """Removes secrets from the records of a foreign logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the record's message; let every record pass."""
        record.msg, record.args = redacted(record.getMessage()), ()
        return True
