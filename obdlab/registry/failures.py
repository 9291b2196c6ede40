"""Errors of registries, and the only place that decides if trying again may help."""

from __future__ import annotations

import http.client
import json
import logging
import math
import random
import time
from typing import TYPE_CHECKING, TypeVar

from obdlab.call import Call
from obdlab.formats.decimal import decimal
from obdlab.observe.counters import REGISTRY_RETRIES
from obdlab.observe.redact import redacted
from obdlab.registry.answer import TRANSPORT_ERRORS
from obdlab.registry.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.registry.answer import Answer

log = logging.getLogger(__name__)

T = TypeVar("T")

_ERROR_BODY_LIMIT = 4096
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0
_LONGEST_RETRY_AFTER_S = 60.0
_LEAST_TRY_S = 1.0


class ConnectError(OSError):
    """No connection could be made; the text names the address and the cause."""


def is_temporary_status(status: int) -> bool:
    """Return True if a request answered with this HTTP status may succeed later."""
    # 501 says that the server lacks the function (RFC 9110 section 15.6.2).
    return status in (408, 425, 429) or (status >= 500 and status != 501)


def from_response(response: Answer, doing: str) -> RegistryError:
    """Return the error for an unsuccessful answer, and close the answer."""
    try:
        body = response.read(_ERROR_BODY_LIMIT)
    except TRANSPORT_ERRORS:
        body = b""
    response.close()
    detail = _error_detail(body)
    return RegistryError(
        f"{doing}: registry answered {response.status}{f' ({detail})' if detail else ''}",
        status=response.status,
        temporary=is_temporary_status(response.status),
        retry_after_s=_retry_after(response.headers.get("retry-after", "")),
    )


def from_exception(error: Exception, doing: str) -> RegistryError:
    """Return the error for an exchange that failed with an exception."""
    # A URL or header that cannot be sent, and a certificate that does not fit, stay so.
    permanent = isinstance(error, ValueError | http.client.InvalidURL)
    timed_out = isinstance(error, TimeoutError)
    text = "no answer in time" if timed_out else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return RegistryError(f"{doing}: {redacted(text)[:300]}", temporary=not permanent, timed_out=timed_out)


def persist(
    attempt: Callable[[Call], T],
    call: Call,
    *,
    blob: str,
    offset: int | None = None,
    tries: int | None = None,
    halving: bool = False,
) -> T:
    """Call ``attempt`` until it succeeds, fails permanently, the call's deadline comes or ``tries`` are used up.

    ``attempt`` gets the terms of the try. With ``halving``, its deadline leaves half of the time that is left to the
    next try; the last second is not halved.

    Pauses double from 50 ms to 5 s, each shortened by a random part so that many readers do not return in step; a
    registry's Retry-After is kept if the deadline allows. Raises the last RegistryError, with its place.
    """
    deadline = math.inf if call.deadline is None else call.deadline
    tried = 0
    pause = _FIRST_PAUSE_S
    before: RegistryError | None = None
    while True:
        tried += 1
        terms = call
        if halving and math.inf > deadline - (now := time.monotonic()) >= 2 * _LEAST_TRY_S:
            terms = Call(now + (deadline - now) / 2, call.on_wait, call.pace, call.cancellation)
        try:
            return attempt(terms)
        except RegistryError as error:
            delay = max(min(error.retry_after_s, _LONGEST_RETRY_AFTER_S), pause * random.uniform(0.5, 1.0))
            hopeless = not error.temporary or tried == tries or time.monotonic() + delay >= deadline
            if hopeless:
                raise error.at(blob, offset, tried, before=before) from error
            last = error
            log.info("%s (try %d, the next in %.1f s)", error.at(blob, offset, 1), tried, delay)
        time.sleep(delay)
        if time.monotonic() >= deadline:  # a busy machine wakes late, and a try without time says nothing
            raise last.at(blob, offset, tried, before=before) from last
        REGISTRY_RETRIES.add()
        before = before if last.timed_out else last
        pause = min(2 * pause, _LONGEST_PAUSE_S)


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
