"""Options that commands share."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.cli import common
from obdlab.registry.credentials import CredentialsError


def credentials() -> Path | None:
    parser = argparse.ArgumentParser()
    common.add_registry_options(parser)
    found: Path | None = parser.parse_args([]).credentials
    return found


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
    if os.geteuid() != 0:
        pytest.skip("becoming nobody needs root")
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
