"""Settings as JSON, and values of the wrong type."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.plain import describe, from_plain
from obdlab.settings.settings import Settings, SettingsError


def test_settings_survive_json() -> None:
    settings = Settings(cache_dir=Path("/a b"), credentials_path=Path("/c"), cache_quota=5, download_delay_s=1.5)
    assert Settings.from_json(settings.to_json()) == settings
    assert Settings.from_json(Settings().to_json()) == Settings()
    assert Settings.from_json("{}") == Settings()


def test_every_setting_has_a_type_that_json_can_carry() -> None:
    hints = get_type_hints(Settings)
    for field in fields(Settings):
        assert describe(hints[field.name])
        value = json.loads(Settings().to_json())[field.name]
        assert from_plain(value, hints[field.name]) == getattr(Settings(), field.name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x: not JSON"),
        ("[1]", r"x: not a JSON object \(got list\)"),
        ('{"cache_quota": "4G"}', r"x: cache_quota: wrong value \(got '4G', wanted a whole number\)"),
        ('{"cache_extent_max": -1}', r"cache_extent_max: not below 0 \(got -1\)"),
        ('{"device_readahead_kib": 70000}', r"device_readahead_kib: 0 to 65536 \(got 70000\)"),
        ('{"cache_quota": true}', r"cache_quota: wrong value \(got True, wanted a whole number\)"),
        ('{"cache_quota": 1.0}', r"cache_quota: wrong value \(got 1.0, wanted a whole number\)"),
        ('{"cache_dir": null}', r"cache_dir: wrong value \(got None, wanted a path\)"),
        ('{"cache_dir": "a\\u0000b"}', r"cache_dir: wrong value \(got .*, wanted a path\)"),
        ('{"cache_dir": "\\ud800"}', r"cache_dir: wrong value \(got .*, wanted a path\)"),
        ('{"credentials_path": 3}', r"credentials_path: wrong value \(got 3, wanted a path or null\)"),
        ('{"download_enabled": 1}', r"download_enabled: wrong value \(got 1, wanted true or false\)"),
        ('{"read_deadline_s": NaN}', r"read_deadline_s: wrong value \(got nan, wanted a number\)"),
        ('{"read_deadline_s": 1e999}', r"read_deadline_s: wrong value \(got inf, wanted a number\)"),
        ('{"read_deadline_s": -1}', "x: read_deadline_s, .* must be positive"),
        ('{"cache_unit": 5000}', r"x: cache_unit: .* \(got 5000\)"),
    ],
)
def test_wrong_settings_are_named(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_json(text, name="x")


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (["a", "b"], tuple[str, ...], ("a", "b")),
        ([], tuple[Path, ...], ()),
        (["/a"], tuple[Path, ...], (Path("/a"),)),
        (None, str | None, None),
        (3, float, 3.0),
    ],
)
def test_values(value: object, hint: object, wanted: object) -> None:
    assert from_plain(value, hint) == wanted


@pytest.mark.parametrize(
    ("value", "hint"), [("ab", tuple[str, ...]), ([1], tuple[str, ...]), (1, str | None), (10**400, float)]
)
def test_values_of_the_wrong_type(value: object, hint: object) -> None:
    with pytest.raises(TypeError, match=r"got .*, wanted "):
        from_plain(value, hint)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([field.name for field in fields(Settings)]), _JSON, max_size=3) | _JSON)
def test_any_document_is_read_or_refused(document: object) -> None:
    try:
        settings = Settings.from_json(json.dumps(document))
    except SettingsError:
        return
    assert Settings.from_json(settings.to_json()) == settings


def test_a_setting_of_a_later_version_is_ignored_in_a_record_and_refused_in_a_file() -> None:
    assert Settings.from_json('{"cache_quota": 5, "of_later": 1}') == Settings(cache_quota=5)
    with pytest.raises(SettingsError, match=r"x: no such setting \(got 'cache_dirr', wanted one of cache_dir, "):
        Settings().with_values({"cache_dirr": "/a"}, name="x")
