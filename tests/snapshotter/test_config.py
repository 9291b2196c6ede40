"""What each key of a configuration file means, and which values it may have."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from obdlab.snapshotter.config import ConfigError, SnapshotterConfig
from obdlab.snapshotter.overlaybd import ImageOptions


def load(directory: Path, **values: Any) -> SnapshotterConfig:
    path = directory / "config.json"
    path.write_text(json.dumps(values))
    return SnapshotterConfig.load(path)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load(tmp_path) == SnapshotterConfig()
    assert load(tmp_path).images == ImageOptions()
    assert SnapshotterConfig().exporter_path == "/metrics"


@pytest.mark.parametrize(
    ("text", "level"),
    [("error", logging.ERROR), ("Info", logging.INFO), ("trace", logging.DEBUG), ("", None), ("loud", None)],
)
def test_log_levels(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, level: int | None) -> None:
    assert load(tmp_path, logLevel=text).log_level == level
    assert load(tmp_path, verbose=text).log_level == level
    assert load(tmp_path, verbose="debug", logLevel=text or "debug").log_level == (level if text else logging.DEBUG)
    assert ("no such log level" in caplog.text) is (text == "loud")


def test_an_exporter_runs_only_if_it_is_enabled(tmp_path: Path) -> None:
    for exporter, listen, path in (
        ({"enable": True}, "0.0.0.0:9863", "/metrics"),
        ({"enable": False, "port": 9000, "uriPrefix": "/m"}, "", "/m"),
        ({"port": 1}, "", "/metrics"),
        ({"enable": True, "port": 65535}, "0.0.0.0:65535", "/metrics"),
        (None, "", "/metrics"),
    ):
        config = load(tmp_path, exporterConfig=exporter)
        assert (config.exporter_listen, config.exporter_path) == (listen, path)


@pytest.mark.parametrize("port", [0, -1, 65536, True, "9863", 1.5])
def test_ports_that_are_none(tmp_path: Path, port: object) -> None:
    with pytest.raises(ConfigError, match=r"port: wrong value .*wanted a (number from 1 to 65535|whole number)"):
        load(tmp_path, exporterConfig={"port": port})


@pytest.mark.parametrize("tenant", [-1, 0, (1 << 31) - 1])
def test_tenants_have_no_effect(tmp_path: Path, tenant: int) -> None:
    assert load(tmp_path, tenant=tenant) == SnapshotterConfig()


@pytest.mark.parametrize("tenant", [-2, 1 << 31, True])
def test_but_they_are_checked(tmp_path: Path, tenant: object) -> None:
    with pytest.raises(ConfigError, match="tenant"):
        load(tmp_path, tenant=tenant)


def test_unknown_keys_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(tmp_path, unheardOf=1, exporterConfig={"enabled": True, "port": 1})
    assert caplog.messages == [
        f"{tmp_path}/config.json: key 'unheardOf' is not known and has no effect",
        f"{tmp_path}/config.json: key 'exporterConfig.enabled' is not known and has no effect",
    ]


def test_one_mirror_or_several(tmp_path: Path) -> None:
    one = {"host": "a:5000", "insecure": True}
    assert load(tmp_path, mirrorRegistry=one).images.plain_http_hosts == {"a:5000"}
    others = [one, {"host": "b"}, {"host": "c", "insecure": "true"}]
    assert load(tmp_path, mirrorRegistry=others).images.plain_http_hosts == {"a:5000"}


def test_labels_name_targets_only_if_allowed(tmp_path: Path) -> None:
    assert not load(tmp_path).images.turbo_targets_by_label
    assert load(tmp_path, contentStore="/c").images.content_store == Path("/c")
    assert load(tmp_path, contentStore="").images.content_store is None
    assert load(tmp_path).images.content_store is None
    assert load(tmp_path, turboTargetsByLabel=True).images.turbo_targets_by_label
    with pytest.raises(ConfigError, match="turboTargetsByLabel"):
        load(tmp_path, turboTargetsByLabel="yes")


def test_the_differ_is_configured(tmp_path: Path) -> None:
    assert (load(tmp_path).containerd, load(tmp_path).convert_layers) == (None, "")
    config = load(tmp_path, containerdAddress="/c.sock", convertLayers="erofs")
    assert (config.containerd, config.convert_layers) == (Path("/c.sock"), "erofs")
    for key, value in (("convertLayers", "xfs"), ("convertLayers", True), ("containerdAddress", "c.sock")):
        with pytest.raises(ConfigError, match=key):
            load(tmp_path, **{key: value})


def test_file_systems_of_turbo_images(tmp_path: Path) -> None:
    assert load(tmp_path).images.turbo_file_systems == ("erofs", "ext4")
    assert load(tmp_path, turboFsType=["ext4"]).images.turbo_file_systems == ("ext4",)
    for wrong in ("ext4", ["xfs"], [1], {}):
        with pytest.raises(ConfigError, match="turboFsType"):
            load(tmp_path, turboFsType=wrong)
