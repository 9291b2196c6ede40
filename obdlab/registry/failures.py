"""Errors of registries, and the only place that decides if trying again may help."""

from __future__ import annotations

import http.client
import json
import logging
import random
import re
import ssl
import time
from typing import TYPE_CHECKING, TypeVar

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError, LocationValueError, NewConnectionError, SSLError

from obdlab.formats.decimal import decimal
from obdlab.observe.counters import REGISTRY_RETRIES
from obdlab.observe.redact import redacted
from obdlab.registry.deadline import IN_FORCE
from obdlab.registry.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Exceptions of a failed exchange from transport and urllib3; each becomes a RegistryError.
TRANSPORT_ERRORS = (HTTPError, OSError, http.client.HTTPException)

_ERROR_BODY_LIMIT = 4096
_POOL = re.compile(r"^[\w.]+\(host=.*?\): ")
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0
_LONGEST_RETRY_AFTER_S = 60.0
_LEAST_TRY_S = 1.0


def is_temporary_status(status: int) -> bool:
    """Return True if a request answered with this HTTP status may succeed later."""
    return status in (408, 425, 429) or status >= 500


def from_response(response: urllib3.BaseHTTPResponse, doing: str) -> RegistryError:
    """Return the error for an unsuccessful answer, and give the connection back."""
    try:
        body = response.read(_ERROR_BODY_LIMIT)
    except TRANSPORT_ERRORS:
        body = b""
    discard(response)
    detail = _error_detail(body)
    return RegistryError(
        f"{doing}: registry answered {response.status}{f' ({detail})' if detail else ''}",
        status=response.status,
        temporary=is_temporary_status(response.status),
        retry_after_s=_retry_after(response.headers.get("Retry-After", "")),
    )


def from_exception(error: Exception, doing: str) -> RegistryError:
    """Return the error for an exchange that failed with an exception."""
    permanent = isinstance(error, LocationParseError | LocationValueError) or (
        isinstance(error, SSLError) and isinstance(error.args[0], ssl.SSLCertVerificationError)
    )
    timed_out = isinstance(error, TimeoutError | urllib3.exceptions.TimeoutError) and not isinstance(
        error, NewConnectionError
    )
    if timed_out:
        text = "no answer in time"
    else:
        # urllib3 puts its pool into messages ("_PlainConnection(host=..., port=...): "); only the rest is of use.
        reason = _POOL.sub("", " ".join(str(error).split()))
        text = f"{type(error).__name__}: {reason}"
    return RegistryError(f"{doing}: {redacted(text)[:300]}", temporary=not permanent, timed_out=timed_out)


def persist(
    attempt: Callable[[], T],
    *,
    deadline: float,
    blob: str,
    offset: int | None = None,
    tries: int | None = None,
    halving: bool = False,
) -> T:
    """Call ``attempt`` until it succeeds, fails permanently, the deadline comes or ``tries`` are used up.

    The deadline, or an earlier one of the thread, holds for all that the thread does meanwhile. With ``halving``,
    each try leaves half of the time that is left to the next one; the last second is not halved.

    Pauses double from 50 ms to 5 s, each shortened by a random part so that many readers do not return in step; a
    registry's Retry-After is kept if the deadline allows. Raises the last RegistryError, with its place.
    """
    outer = IN_FORCE.deadline
    deadline = deadline if outer is None else min(deadline, outer)
    IN_FORCE.deadline = deadline
    tried = 0
    pause = _FIRST_PAUSE_S
    before: RegistryError | None = None
    try:
        while True:
            tried += 1
            if halving and deadline - (now := time.monotonic()) >= 2 * _LEAST_TRY_S:
                IN_FORCE.deadline = now + (deadline - now) / 2
            try:
                return attempt()
            except RegistryError as error:
                delay = max(min(error.retry_after_s, _LONGEST_RETRY_AFTER_S), pause * random.uniform(0.5, 1.0))
                hopeless = not error.temporary or tried == tries or time.monotonic() + delay >= deadline
                if hopeless:
                    raise error.at(blob, offset, tried, before=before) from error
                last = error
                IN_FORCE.deadline = deadline
                log.info("%s (try %d, the next in %.1f s)", error.at(blob, offset, 1), tried, delay)
            time.sleep(delay)
            if time.monotonic() >= deadline:  # a busy machine wakes late, and a try without time says nothing
                raise last.at(blob, offset, tried, before=before) from last
            REGISTRY_RETRIES.add()
            before = before if last.timed_out else last
            pause = min(2 * pause, _LONGEST_PAUSE_S)
    finally:
        IN_FORCE.deadline = outer


def discard(response: urllib3.BaseHTTPResponse) -> None:
    """Finish with a response: keep its connection if little is left of the body, else close it."""
    try:
        left = response.length_remaining
        if left is not None and left <= _ERROR_BODY_LIMIT:
            response.read(_ERROR_BODY_LIMIT + 1)
    except TRANSPORT_ERRORS:
        pass
    response.close()
    response.release_conn()


def _error_detail(body: bytes) -> str:
    # {"errors": [{"code": "...", "message": "..."}]} (OCI distribution specification, "Error Codes")
    try:
        first = json.loads(body)["errors"][0]
        text = f"{first.get('code', '')}: {first.get('message', '')}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return ""
    return redacted("".join(c for c in text if c.isprintable()))[:200].strip(": ")


def _retry_after(text: str) -> float:
    # Registries do not use the other form, a date.
    return float(decimal(text.strip(), 99_999) or 0)
