"""Settings files: the original's overlaybd.json and our own; and the page that documents them."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.plain import describe, to_plain
from obdlab.settings.original import KEYS, at_launch, load, parse
from obdlab.settings.settings import GIB, Settings, SettingsError

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "configuration.md"
DEFAULT = Settings()


def read(document: object) -> Settings:
    return parse(json.dumps(document).encode(), "f.json", DEFAULT).settings


def notes(document: object) -> list[str]:
    return list(parse(json.dumps(document).encode(), "f.json", DEFAULT).notes)


@pytest.mark.parametrize(
    ("document", "changes"),
    [
        (
            {"cacheConfig": {"cacheType": "file", "cacheDir": "/c", "cacheSizeGB": 7}},
            {"cache_dir": Path("/c"), "cache_quota": 7 * GIB},
        ),
        ({"registryCacheDir": "/old", "registryCacheSizeGB": 2}, {"cache_dir": Path("/old"), "cache_quota": 2 * GIB}),
        ({"registryCacheDir": "/old", "cacheConfig": {"cacheType": "file"}}, {}),
        ({"registryCacheDir": "/old", "cacheConfig": {"cacheDir": "/new"}}, {"cache_dir": Path("/old")}),
        ({"cacheConfig": {"refillSize": 131072}}, {"cache_extent": 131072, "cache_extent_max": 0}),
        ({"credentialFilePath": "/cred"}, {"credentials_path": Path("/cred")}),
        (
            {"credentialFilePath": "/a", "credentialConfig": {"mode": "file", "path": "/b"}},
            {"credentials_path": Path("/b")},
        ),
        (
            {"credentialConfig": {"mode": "http", "path": "localhost:19876/auth", "timeout": 2}},
            {
                "credentials_mode": "http",
                "credentials_address": "http://localhost:19876/auth",
                "credentials_timeout_s": 2.0,
            },
        ),
        (
            {
                "credentialConfig": {
                    "mode": "https",
                    "path": "https://h/a",
                    "client_cert_path": "/c",
                    "client_key_path": "/k",
                    "server_ca_path": "/ca",
                }
            },
            {
                "credentials_mode": "https",
                "credentials_address": "https://h/a",
                "credentials_client_cert": Path("/c"),
                "credentials_client_key": Path("/k"),
                "credentials_server_ca": Path("/ca"),
            },
        ),
        (
            {"credentialConfig": {"mode": "uds", "path": "/s"}},
            {"credentials_mode": "uds", "credentials_address": "/s"},
        ),
        ({"logLevel": 0, "logPath": "/l"}, {"log_level": "debug", "log_path": Path("/l")}),
        (
            {
                "logLevel": 0,
                "logPath": "/l",
                "logConfig": {"logLevel": 2, "logPath": "/m", "logSizeMB": 20, "logRotateNum": 5},
            },
            {"log_level": "warning", "log_path": Path("/m"), "log_size": 20 << 20, "log_count": 5},
        ),
        ({"logConfig": {"logLevel": 5}}, {"log_level": "error"}),
        (
            {
                "download": {
                    "enable": True,
                    "delay": 600,
                    "delayExtra": 0,
                    "maxMBps": 1,
                    "tryCnt": 2,
                    "blockSize": 262144,
                }
            },
            {
                "download_enabled": True,
                "download_delay_s": 600.0,
                "download_bytes_per_s": 1048576.0,
                "download_tries": 2,
            },
        ),
        ({"download": {"maxMBps": -1}}, {"download_bytes_per_s": 0.0}),
        ({"enableAudit": False, "auditPath": "/a"}, {}),
        ({"auditPath": "/a"}, {"audit_path": Path("/a")}),
        ({"enableAudit": True}, {"audit_path": Path("/var/log/overlaybd-audit.log")}),
        ({"p2pConfig": {"enable": True}}, {"p2p_address": "http://localhost:9731/accelerator"}),
        ({"p2pConfig": {"enable": True, "address": "localhost:1/x"}}, {"p2p_address": "http://localhost:1/x"}),
        ({"p2pConfig": {"enable": False, "address": "http://localhost:1/x"}}, {}),
        ({"exporterConfig": {"enable": True}}, {"exporter_listen": "0.0.0.0:9863"}),
        (
            {"exporterConfig": {"enable": True, "uriPrefix": "/m", "port": 1, "updateInterval": 3}},
            {"exporter_listen": "0.0.0.0:1", "exporter_path": "/m"},
        ),
        ({"exporterConfig": {"port": 1}}, {}),
        (
            {"certConfig": {"certFile": "/c", "keyFile": "/k"}},
            {"tls_client_cert": Path("/c"), "tls_client_key": Path("/k")},
        ),
        ({"certConfig": {"certFile": "/c", "keyFile": ""}}, {}),
        ({"userAgent": "overlaybd/1"}, {"user_agent": "overlaybd/1"}),
        ({}, {}),
        ({"cache_dir": "/ours", "download_enabled": True}, {"cache_dir": Path("/ours"), "download_enabled": True}),
    ],
)
def test_what_files_lead_to(document: dict[str, Any], changes: dict[str, Any]) -> None:
    got = read(document)
    changed = {
        field.name: getattr(got, field.name)
        for field in fields(Settings)
        if getattr(got, field.name) != getattr(DEFAULT, field.name)
    }
    assert changed == changes


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], r"f\.json: not a JSON object \(got list\)"),
        ({"nothing": 1}, r"f\.json: neither obdlab's settings nor overlaybd's \(got nothing\)"),
        ({"ioEngine": 3}, r"f\.json: ioEngine: wrong value \(got 3, wanted 0, 1 or 2\)"),
        ({"ioEngine": "1"}, r"ioEngine: wrong value \(got '1', wanted a whole number\)"),
        ({"download": []}, r"download: wrong value \(got \[\], wanted an object\)"),
        ({"download": {"enable": 1}}, r"download\.enable: wrong value \(got 1, wanted true or false\)"),
        ({"download": {"tryCnt": 0}}, r"download\.tryCnt: wrong value \(got 0, wanted a number from 1 to"),
        (
            {"cacheConfig": {"cacheType": "ram"}},
            r"cacheConfig\.cacheType: wrong value \(got 'ram', wanted one of file",
        ),
        ({"cacheType": "ram"}, r"cacheType: wrong value \(got 'ram'"),
        ({"cacheConfig": {"refillSize": 5000}}, r"cacheConfig\.refillSize: cache_extent: not a power of two"),
        ({"cacheConfig": {"cacheType": "file", "cacheSizeGB": 0}}, r"cacheConfig\.cacheSizeGB: wrong value \(got 0"),
        ({"credentialFilePath": "cred.json"}, r"credentialFilePath: .* \(got 'cred.json', wanted an absolute path\)"),
        ({"credentialConfig": {"mode": "ftp"}}, r"credentialConfig: credentials_mode: wanted one of file, http"),
        (
            {"credentialConfig": {"mode": "https", "path": "h/a"}},
            r"credentialConfig: credentials_address: wanted https:",
        ),
        ({"credentialConfig": {"mode": "http", "path": "http://u:p@h/"}}, "without user and password"),
        ({"credentialConfig": {"mode": "uds", "path": "s"}}, r"credentials_address: wanted the absolute path of a"),
        (
            {"credentialConfig": {"timeout": 0, "mode": "uds", "path": "/s"}},
            r"credentialConfig\.timeout: wrong value",
        ),
        ({"exporterConfig": {"enable": True, "port": 70000}}, r"exporterConfig\.port: wrong value \(got 70000"),
        ({"p2pConfig": {"enable": True, "address": "ftp://x"}}, r"p2pConfig\.address: p2p_address: "),
        ({"userAgent": "a\nb"}, r"userAgent: user_agent: wanted printable ASCII"),
        ({"cache_dir": "/a", "cacheType": "file"}, r"no such setting \(got 'cacheType'"),
        ({"cache_dir": "relative"}, r"cache_dir: wrong value \(got 'relative', wanted an absolute path\)"),
        ({"tls_certs_dirs": ["a"]}, r"tls_certs_dirs: wrong value \(got 'a', wanted an absolute path\)"),
    ],
)
def test_what_makes_no_sense_is_named(document: object, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read(document)


def test_what_cannot_be_had_is_told() -> None:
    assert notes({"ioEngine": 0, "enableThread": False, "registryFsVersion": "v2"}) == []
    for document, message in (
        ({"ioEngine": 1}, "f.json: ioEngine: files are read by pread"),
        ({"enableThread": True}, "f.json: enableThread: each device is a process"),
        ({"cacheConfig": {"cacheType": "ocf"}}, "f.json: cacheConfig.cacheType: 'ocf' is not there"),
        ({"registryFsVersion": "v1"}, "f.json: registryFsVersion: "),
        ({"gzipCacheConfig": {"enable": True, "cacheSizeGB": 4}}, "f.json: gzipCacheConfig: "),
        ({"certConfig": {"certFile": "/c"}}, "f.json: certConfig: "),
        ({"userAgent": "x", "strange": 1}, "f.json: strange: not known"),
        ({"download": {"strange": 1}}, "f.json: download.strange: not known"),
    ):
        (note,) = notes(document)
        assert note.startswith(message)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "overlaybd.json"
    with pytest.raises(SettingsError, match=r"overlaybd\.json: cannot read the settings .No such file"):
        load(path)
    path.write_bytes(b" " * (2 << 20))
    with pytest.raises(SettingsError, match="larger than"):
        load(path)
    path.write_text('{"cacheConfig": {')
    with pytest.raises(SettingsError, match=r"overlaybd\.json: not JSON"):
        load(path)
    path.write_text('{"userAgent": "x"}')
    monkeypatch.chdir(tmp_path)
    assert load("overlaybd.json").settings.settings_path == path


def test_downloads_are_read_anew_at_each_launch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "overlaybd.json"
    path.write_text('{"userAgent": "before"}')
    settings = load(path).settings
    path.write_text('{"userAgent": "after", "download": {"enable": true, "delay": 1}}')
    now = at_launch(settings, None)
    assert (now.download_enabled, now.download_delay_s, now.user_agent) == (True, 1.0, "before")
    # What the image says wins.
    assert not at_launch(now, {"enable": False}).download_enabled
    assert at_launch(settings, {"enable": True, "delay": 9}).download_delay_s == 9.0
    path.write_text("{")
    assert at_launch(settings, None) == settings
    assert at_launch(settings, {"enable": "yes"}) == settings
    assert "downloading as before" in caplog.text
    assert at_launch(DEFAULT, None) == DEFAULT


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "file", "/a", "http", "uds"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
_TOP = sorted({key.partition(".")[0] for key in KEYS})
_INNER = sorted({key.partition(".")[2] for key in KEYS if "." in key})


@given(
    st.dictionaries(
        st.sampled_from(_TOP), _JSON | st.dictionaries(st.sampled_from(_INNER), _JSON, max_size=4), max_size=4
    )
)
def test_any_document_is_read_or_refused(document: object) -> None:
    try:
        settings = read(document)
    except SettingsError:
        return
    assert Settings.from_json(settings.to_json()) == settings


def _rows(heading: str) -> dict[str, list[str]]:
    text = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {re.sub(r"`", "", row[0]).strip("| "): row[1:] for row in rows}


def test_the_page_has_every_setting_with_its_default() -> None:
    rows = _rows("obdlab's settings")
    hints = get_type_hints(Settings)
    assert list(rows) == [field.name for field in fields(Settings) if field.name != "settings_path"]
    for name, (kind, default, *_rest) in rows.items():
        assert kind == describe(hints[name]), name
        assert default == f"`{json.dumps(to_plain(getattr(DEFAULT, name)))}`", name


def test_the_page_has_every_key_of_the_original() -> None:
    assert set(_rows("The original's overlaybd.json")) == set(KEYS)
