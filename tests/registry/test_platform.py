"""Platforms by name."""

from __future__ import annotations

import os

import pytest

from obdlab.formats.oci import Platform
from obdlab.registry.platform import PlatformError, host_platform, parse_platform


@pytest.mark.parametrize(
    ("machine", "wanted"),
    [
        ("x86_64", Platform("linux", "amd64")),
        ("aarch64", Platform("linux", "arm64")),
        ("armv7l", Platform("linux", "arm", "v7")),
        ("riscv64", Platform("linux", "riscv64")),
    ],
)
def test_host(monkeypatch: pytest.MonkeyPatch, machine: str, wanted: Platform) -> None:
    told = os.uname_result(("Linux", "host", "6.12", "#1", machine))
    monkeypatch.setattr(os, "uname", lambda: told)
    assert host_platform() == wanted


def test_parse() -> None:
    assert parse_platform("linux/amd64") == Platform("linux", "amd64")
    assert parse_platform("linux/arm/v7") == Platform("linux", "arm", "v7")


@pytest.mark.parametrize("text", ["", "linux", "linux/", "/amd64", "linux//v7", "a/b/c/d"])
def test_malformed(text: str) -> None:
    with pytest.raises(PlatformError, match="wanted os/architecture"):
        parse_platform(text)
