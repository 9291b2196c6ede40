"""Records of later versions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from obdlab.records import known_fields


@dataclass
class Record:
    a: int
    b: int = 2


def test_unknown_fields_are_left_out_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        assert Record(**known_fields(Record, {"a": number, "x\x1b[2J" + "y" * 100: 1, "z": 2})) == Record(number)
    (logged,) = [entry.getMessage() for entry in caplog.records]
    assert logged.startswith(r"Record: a later version wrote it; unknown fields are ignored, such as 'x\x1b[2Jyyy")
    assert len(logged) < 120


@pytest.mark.parametrize("values", [[], None, "a", 1])
def test_what_is_no_object_is_refused(values: object) -> None:
    with pytest.raises(TypeError, match="Record: not a JSON object"):
        known_fields(Record, values)
