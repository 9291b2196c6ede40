"""Causes of errors, and errors of other processes."""

from __future__ import annotations

import errno

import pytest

from obdlab import foreign
from obdlab.errors import (
    CorruptBlobError,
    DeviceError,
    FormatError,
    ObdlabError,
    SourceError,
    caused_by,
    causes,
    of_code,
    restored,
)


def failing() -> None:
    try:
        try:
            raise PermissionError(errno.EACCES, "Permission denied")
        except OSError as error:
            raise SourceError("cannot read", blob="b") from error
    except SourceError:
        raise DeviceError("not attached") from None  # hides the cause, but it was one


def test_causes_come_in_order_and_end() -> None:
    with pytest.raises(DeviceError) as caught:
        failing()
    found = list(causes(caught.value))
    assert [type(each) for each in found] == [DeviceError, SourceError, PermissionError]
    assert caused_by(caught.value, PermissionError)
    assert not caused_by(caught.value, FormatError)
    found[2].__context__ = caught.value  # a ring
    assert len(list(causes(caught.value))) == 3


def test_an_error_passes_through_a_process_that_has_not_imported_its_class() -> None:
    error = restored("source.of-another-process", "cannot read")
    assert type(error) is SourceError
    assert error.code == "source.of-another-process"
    assert SourceError("here").code == "source"


def test_a_restored_error_has_class_text_and_cause() -> None:
    cause = restored("format.corrupt", "damaged")
    error = restored("source", "cannot read", cause)
    assert type(error) is SourceError
    assert isinstance(error, SourceError)
    assert (str(error), error.temporary, error.offset) == ("cannot read", False, None)
    assert isinstance(cause, CorruptBlobError)
    assert (cause.what, cause.got) == ("", None)
    assert caused_by(error, FormatError)


def test_a_class_without_a_code_is_its_base_elsewhere() -> None:
    class PrivateError(SourceError):
        pass

    assert PrivateError.code == "source"
    assert of_code("source") is SourceError
    assert of_code("error") is of_code("nothing.known") is ObdlabError


@pytest.mark.parametrize(
    ("says", "text", "other"),
    [
        # As containerd 1.7, and programs under it, said it.
        (foreign.is_ref_locked, "ref moby/1/layer-x locked for 2s (since 2026-01-01): unavailable", "no space left"),
        (
            foreign.is_proxy_unconnected,
            'rpc error: code = Unavailable desc = connection error: desc = "transport: Error while dialing: refused"',
            "registry.test: no answer in time",
        ),
        (foreign.says_no_space, "tar: ./a: Cannot write: No space left on device", "tar: ./a: Cannot open: denied"),
        (foreign.says_no_space, "cp: error writing: Disk quota exceeded", ""),
    ],
)
def test_texts_of_other_programs(says: object, text: str, other: str) -> None:
    assert callable(says)
    assert says(text)
    assert not says(other)
