"""Which failures are worth another try, and which connections are worth keeping."""

from __future__ import annotations

import pytest

from obdlab.registry.failures import RegistryError, from_exception, is_temporary_status


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_a_later_request_may_succeed(status: int) -> None:
    assert is_temporary_status(status)


@pytest.mark.parametrize("status", [200, 301, 400, 401, 403, 404, 405, 409, 416, 418, 426, 428, 431, 451, 499, 501])
def test_another_try_would_get_the_same_answer(status: int) -> None:
    assert not is_temporary_status(status)


def test_an_error_without_particulars_is_no_time_out_and_permanent() -> None:
    error = RegistryError("what")
    assert (error.temporary, error.timed_out, error.status, error.retry_after_s, error.tries) == (
        False,
        False,
        None,
        0.0,
        0,
    )
    assert from_exception(TimeoutError("x"), "reading").timed_out
    assert not from_exception(OSError("x"), "reading").timed_out
