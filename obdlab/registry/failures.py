"""Errors of registries, and the only place that decides if trying again may help."""

from __future__ import annotations

import http.client

from obdlab.observe.redact import redacted
from obdlab.registry.errors import RegistryError

#: Exceptions of a failed exchange; each becomes a RegistryError.
TRANSPORT_ERRORS = (OSError, http.client.HTTPException)


class ConnectError(OSError):
    """No connection could be made; the text names the address and the cause."""


def is_temporary_status(status: int) -> bool:
    """Return True if a request answered with this HTTP status may succeed later."""
    # 501 says that the server lacks the function (RFC 9110 section 15.6.2).
    return status in (408, 425, 429) or (status >= 500 and status != 501)


def from_exception(error: Exception, doing: str) -> RegistryError:
    """Return the error for an exchange that failed with an exception."""
    # A URL or header that cannot be sent, and a certificate that does not fit, stay so.
    permanent = isinstance(error, ValueError | http.client.InvalidURL)
    timed_out = isinstance(error, TimeoutError)
    text = "no answer in time" if timed_out else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return RegistryError(f"{doing}: {redacted(text)[:300]}", temporary=not permanent, timed_out=timed_out)
