"""Conversions that add a layer of what a start will likely read."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.convert.endpoints.names import open_source
from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from tests.convert.layouts import make_layout, member, symlink
from tests.registry.server import RegistryServer, registry_server

__all__ = ["registry_server"]

PROGRAM = Path("/usr/bin/env")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    members = [
        member("usr/bin/env", PROGRAM.read_bytes(), mode=0o755),
        member("unread", b"u" * 3_000_000),
        symlink("bin/sh", "../usr/bin/env"),  # the image's command
    ]
    return f"oci:{make_layout(tmp_path_factory.mktemp('suggested') / 'source', [members]).root}"


def convert(source: str, destination: str, work: Path, *options: str, status: int = 0) -> None:
    common = ["--database", "none", "--work-dir", str(work), "--vsize-gib", "1"]
    assert main(["image", "convert", *common, *options, source, destination]) == status


def layers(name: str) -> tuple[oci.Descriptor, ...]:
    with closing(RegistryClient()) as client, closing(open_source(name, client)) as image:
        return image.manifest(host_platform(), overlaybd=True).layers


def test_the_layer_is_hot_small_and_changes_no_file(
    source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"oci:{tmp_path / 'image'}:v1"
    convert(source, name, tmp_path, "--json", "--suggest", "--dump-manifest", str(tmp_path / "manifest"))
    printed = json.loads(capfd.readouterr().out)
    *_, top = layers(name)
    assert len(layers(name)) == 2
    assert top.annotations[oci.HOT_LAYER] == "yes"
    assert top.size < PROGRAM.stat().st_size + 200_000
    assert printed["digest"] == oci.digest_of((tmp_path / "manifest").read_bytes())
    assert main(["image", "verify", source, name]) == 0
    assert not list(tmp_path.glob("obdlab-*"))
    # Again, and without: the same names the same image each time.
    convert(source, name, tmp_path, "-q", "--suggest")
    assert capfd.readouterr().out.strip().splitlines()[-1] == printed["digest"]
    convert(source, name, tmp_path, "-q")
    assert len(layers(name)) == 1


@pytest.mark.registry
def test_an_image_in_a_registry_gets_it_too(
    source: str, registry_server: RegistryServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"{registry_server.host}/suggested:v1"
    convert(source, name, tmp_path, "--suggest")
    assert "files that a start likely reads" in capfd.readouterr().err
    assert layers(name)[-1].annotations[oci.HOT_LAYER] == "yes"
    assert not list(tmp_path.iterdir())


def test_an_image_that_starts_nothing_stays_without(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    empty = make_layout(tmp_path / "source", [[member("data", b"d" * 100_000)]])
    name = f"oci:{tmp_path / 'image'}:v1"
    convert(f"oci:{empty.root}", name, tmp_path, "--suggest")
    assert "no start is known of it" in capfd.readouterr().err
    assert len(layers(name)) == 1


@pytest.mark.parametrize(
    "options",
    [["--referrer"], ["--platform", "all"], ["--as", "turbo-oci", "--fs", "both"]],
    ids=lambda each: each[0],
)
def test_what_it_cannot_be_combined_with(
    source: str, tmp_path: Path, options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    convert(source, f"oci:{tmp_path / 'image'}:v1", tmp_path, "--suggest", *options, status=2)
    assert "--suggest is" in capfd.readouterr().err
