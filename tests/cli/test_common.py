"""Options that commands share."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.cli import common
from obdlab.cli.main import main
from obdlab.registry.credentials import CredentialsError
from obdlab.settings.settings import Settings, SettingsError
from tests import capabilities


def credentials() -> Path | None:
    return settings().credentials_path


def settings(*arguments: str) -> Settings:
    parser = argparse.ArgumentParser()
    common.add_runtime_options(parser)
    common.add_registry_options(parser)
    return common.settings_from(parser.parse_args(arguments))


def test_default_credentials_are_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert credentials() is None
    path = tmp_path / ".docker" / "config.json"
    path.parent.mkdir()
    path.write_text("{}")
    assert credentials() == path
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "other"))
    assert credentials() is None


def test_default_credentials_that_cannot_be_read_are_not_there(tmp_path: Path) -> None:
    capabilities.require("root")
    # Of root's home nobody may see even what is in it. Asked in a child, since a process cannot become root again.
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker" / "config.json").write_text("{}")
    tmp_path.chmod(0o700)
    asked = "import os; from obdlab.cli import common; os.setuid(65534); print(common._default_credentials())"
    environment = {key: value for key, value in os.environ.items() if key != "DOCKER_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-c", asked],
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_credentials_asked_for_must_be_readable(tmp_path: Path) -> None:
    args = argparse.Namespace(credentials=tmp_path / "none.json", plain_http=[])
    with pytest.raises(CredentialsError, match=r"none\.json: cannot read credentials: No such file"):
        common.registry_from(args)


def test_options_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OBDLAB_CACHE_DIR", "OBDLAB_CACHE_QUOTA", "OBDLAB_SETTINGS"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "settings.json"
    file.write_text('{"cache_dir": "/of/file", "cache_quota": 5, "credentials_path": "/c", "readahead_max": 7}')
    from_file = settings("--settings", str(file))
    assert (from_file.cache_dir, from_file.cache_quota) == (Path("/of/file"), 5)
    assert from_file.credentials_path == Path("/c")
    assert settings("--config", str(file)) == from_file
    monkeypatch.setenv("OBDLAB_SETTINGS", str(file))
    assert settings() == from_file
    monkeypatch.setenv("OBDLAB_CACHE_DIR", "/of/environment")
    monkeypatch.setenv("OBDLAB_CACHE_QUOTA", "1M")
    assert (settings().cache_dir, settings().cache_quota) == (Path("/of/environment"), 1 << 20)
    given = settings("--cache-dir", "/of/option", "--cache-quota", "2M", "--credentials", "/d", "--download")
    assert (given.cache_dir, given.cache_quota, given.readahead_max) == (Path("/of/option"), 2 << 20, 7)
    assert (given.credentials_path, given.download_enabled) == (Path("/d"), True)
    monkeypatch.setenv("OBDLAB_CACHE_QUOTA", "much")
    with pytest.raises(SettingsError, match=r"\$OBDLAB_CACHE_QUOTA: .*much"):
        settings()


def test_config_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "overlaybd.json"
    file.write_text('{"ioEngine": 1, "cacheConfig": {"cacheType": "file", "cacheSizeGB": 9}, "what": 1}')
    assert main(["config", "check", str(file)]) == 0
    shown = capsys.readouterr()
    assert "* cache_quota = 9663676416\n" in shown.out
    assert "  cache_unit = " in shown.out
    assert "overlaybd.json: what: not known, has no effect\n" in shown.err
    assert main(["config", "check", "--json", str(file)]) == 0
    ours = tmp_path / "ours.json"
    ours.write_text(capsys.readouterr().out)
    assert settings("--settings", str(ours)).cache_quota == 9 << 30
    file.write_text('{"cacheConfig": {"cacheSizeGB": "9"}}')
    assert main(["config", "check", str(file)]) == 1
    assert "cacheConfig.cacheSizeGB: wrong value (got '9', wanted a whole number)" in capsys.readouterr().err
