"""config.v1.json: the original's text, both ways; wrong ones refused by key."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.image.config import ConfigError, ImageConfig, LowerConfig, UpperConfig

FULL = ImageConfig(
    repo_blob_url="https://example.com/v2/library/redis/blobs",
    lowers=(
        LowerConfig(digest="sha256:" + "0" * 64, size=4096, dir="/snapshots/1/fs"),
        LowerConfig(file="/layers/2.obd"),
        LowerConfig(gzip_index="/g", target_file="/t", target_digest="sha256:" + "1" * 64),
    ),
    upper=UpperConfig("/w/index", "/w/data", 64),
    result_file="/w/init-debug.log",
    download={"enable": True, "delay": 600},
    acceleration_layer=True,
    record_trace_path="/w/trace",
)
text = st.text(max_size=20)
configs = st.builds(
    ImageConfig,
    repo_blob_url=text,
    lowers=st.lists(
        st.builds(LowerConfig, text, text, text, st.integers(0, (1 << 64) - 1), text, text, text, st.booleans()),
        max_size=4,
    ).map(tuple),
    upper=st.builds(UpperConfig, text, text, st.integers(0, 1 << 40)),
    result_file=text,
    download=st.none() | st.dictionaries(text, st.integers() | st.booleans(), max_size=3),
    acceleration_layer=st.booleans(),
    record_trace_path=text,
)


def test_keys_in_the_original_order(tmp_path: Path) -> None:
    path = tmp_path / "config.v1.json"
    FULL.save(path)
    assert path.read_text() == (
        '{"repoBlobUrl":"https://example.com/v2/library/redis/blobs","lowers":['
        f'{{"digest":"sha256:{"0" * 64}","size":4096,"dir":"/snapshots/1/fs"}},'
        '{"file":"/layers/2.obd"},'
        f'{{"gzipIndex":"/g","targetFile":"/t","targetDigest":"sha256:{"1" * 64}"}}],'
        '"upper":{"index":"/w/index","data":"/w/data","vsize":64},"resultFile":"/w/init-debug.log",'
        '"download":{"enable":true,"delay":600},"accelerationLayer":true,"recordTracePath":"/w/trace"}'
    )


def test_what_is_left_out_when_empty() -> None:
    assert json.dumps(ImageConfig().to_json()) == '{"repoBlobUrl": "", "lowers": [], "upper": {}, "resultFile": ""}'


@settings(deadline=None)
@given(configs)
def test_round_trip(config: ImageConfig) -> None:
    assert ImageConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_saved_in_one_step_and_private(tmp_path: Path) -> None:
    path = tmp_path / "config.v1.json"
    path.write_text("old")
    path.chmod(0o644)
    FULL.save(path)
    assert ImageConfig.load(path) == FULL
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["config.v1.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.v1.json"
    path.mkdir()
    (path / "something").touch()
    with pytest.raises(ConfigError, match="cannot write the image configuration"):
        FULL.save(path)
    assert os.listdir(tmp_path) == ["config.v1.json"]
    with pytest.raises(ConfigError, match=r"nowhere.*No such file"):
        FULL.save(tmp_path / "nowhere" / "config.v1.json")


def test_unknown_keys_and_nulls_are_ignored() -> None:
    assert ImageConfig.from_json({"lowers": None, "upper": None, "new": 1, "resultFile": None}) == ImageConfig()
    assert ImageConfig.from_json({"lowers": [{"file": "/a", "x": []}], "upper": {"y": 2}}) == ImageConfig(
        lowers=(LowerConfig(file="/a"),)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "not a JSON object (got list)"),
        ({"lowers": {}}, "lowers: wrong value (got {}, wanted a list of objects)"),
        ({"lowers": [{}, "x"]}, "lowers[1]: wrong value (got 'x', wanted an object)"),
        ({"lowers": [{"size": "4096"}]}, "lowers[0].size: wrong value (got '4096', wanted a whole number)"),
        ({"lowers": [{"size": True}]}, "lowers[0].size: wrong value (got True, wanted a whole number)"),
        ({"lowers": [{"size": -1}]}, "lowers[0].size: wrong value (got -1, wanted a number from 0 to"),
        ({"lowers": [{"size": 1 << 64}]}, "lowers[0].size: wrong value (got 18446744073709551616, wanted a number"),
        ({"lowers": [{"file": 1}]}, "lowers[0].file: wrong value (got 1, wanted a string)"),
        ({"upper": []}, "upper: wrong value (got [], wanted an object)"),
        ({"upper": {"data": []}}, "upper.data: wrong value"),
        ({"repoBlobUrl": 3}, "repoBlobUrl: wrong value"),
        ({"accelerationLayer": 1}, "accelerationLayer: wrong value (got 1, wanted true or false)"),
        ({"download": "yes"}, "download: wrong value"),
    ],
)
def test_wrong_types_are_named(tmp_path: Path, values: object, message: str) -> None:
    path = tmp_path / "config.v1.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        ImageConfig.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"{} {}"])
def test_not_json(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.v1.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"config\.v1\.json: not JSON"):
        ImageConfig.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone: cannot read .*No such file"):
        ImageConfig.load(tmp_path / "gone")


def test_an_upper_needs_both_paths() -> None:
    assert UpperConfig("/i", "/d").active
    assert not UpperConfig("/i").active
    assert not UpperConfig(data="/d").active


keys = st.sampled_from(
    ["repoBlobUrl", "lowers", "upper", "resultFile", "download", "accelerationLayer", "file", "dir", "digest", "size"]
)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=15,
)


@settings(deadline=None)
@given(documents)
def test_any_json_is_read_or_refused(document: object) -> None:
    try:
        config = ImageConfig.from_json(document)
    except ConfigError:
        return
    assert ImageConfig.from_json(config.to_json()) == config


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.truncate(os.open(tmp_path / "huge", os.O_CREAT | os.O_RDWR), 1 << 40)
    for path, reason in [
        ("/dev/zero", "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "huge", "larger than"),
        (tmp_path, "Is a directory"),
        ("a\0b", "null byte"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            ImageConfig.load(path)
