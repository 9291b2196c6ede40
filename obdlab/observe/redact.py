"""Secrets that texts quote: signed URLs, users in URLs, Authorization headers. None may reach a log or an error."""

from __future__ import annotations

import logging
import re

_QUERY = re.compile(r"\?[^\s'\"<>?=]*=[^\s'\"<>]*")
_USER = re.compile(r"(?<=://)[^\s/@'\"]+@")
_HEADER = re.compile(r"(authorization['\"]?\s*[:=,]\s*['\"]?(?:[a-z]+\s+)?)[^\s'\",]+", re.IGNORECASE)
_TOKEN = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{16,}")


def redacted(text: str) -> str:
    """Return the text without the queries of URLs, their users, and what authorizes a request."""
    text = _USER.sub("…@", _QUERY.sub("?…", text))
    return _TOKEN.sub(r"\1 …", _HEADER.sub(r"\1…", text))


class Redacting(logging.Filter):
    """Takes secrets out of the records of a logger that is not ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record's message; let all through."""
        record.msg, record.args = redacted(record.getMessage()), ()
        return True
