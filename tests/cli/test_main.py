"""The command as a whole: what it offers, and how it says what went wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.convert.endpoints.layout import REF_NAME, ImageLayout
from obdlab.formats.oci import OCI_MANIFEST
from tests import capabilities

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
NOBODY = 65534


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["unknown"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "doctor" in error
    assert "image" in error
    assert "convert-list" not in error  # an old name


@pytest.fixture
def roots_place() -> Iterator[Path]:
    """A directory that everybody may look into and only root may write to (pytest's own are closed)."""
    capabilities.require("root")
    with tempfile.TemporaryDirectory(prefix="obdlab-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(*arguments: str | Path) -> tuple[int, str]:
    """Run the command as nobody, who may not see the checkout: so that all is imported before."""
    script = (
        "import os, sys; import obdlab.convert.image, obdlab.convert.endpoints.names, obdlab.image.open, tqdm\n"
        "import obdlab.registry.client, obdlab.server.cleanup, obdlab.server.client, obdlab.image.from_manifest\n"
        "import obdlab.cli.memorybound\n"
        "from obdlab.cli import main; main.build_parser(); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "snapshotter", "--root", "snapshots", "--address", "s.sock", "--run-dir", "run"),
        ("serve", "device-host", "--run-dir", "run"),
        ("serve", "snapshot-api", "--run-dir", "run"),
        ("serve", "tcmu", "--run-dir", "run"),
        ("device", "tcmu-attach", "config.v1.json", "--id", "x"),
        ("device", "tcmu-detach", "x"),
    ],
    ids=lambda arguments: arguments[1],
)
def test_daemons_that_need_root_refuse_to_start_without(arguments: tuple[str, ...], roots_place: Path) -> None:
    status, error = as_nobody(*arguments)
    assert (status, len(error.splitlines())) == (1, 1), error
    assert error.startswith(f"obdlab {arguments[0]} {arguments[1]}: must be run as root, as it ")
    assert f"(got user {NOBODY})" in error
    assert list(roots_place.iterdir()) == []


def test_without_root_mount_says_that_it_needs_it(roots_place: Path) -> None:
    places = ("--run-dir", roots_place / "run", "--cache-dir", roots_place / "cache")
    work_dir = roots_place / "work"
    work_dir.mkdir(mode=0o777)
    work_dir.chmod(0o777)
    for arguments in (
        ("device", "mount", GOLDEN / "layer1.obd", work_dir / "mnt", *places),
        ("device", "mount", GOLDEN / "layer1.obd", roots_place / "mnt", "--run-dir", work_dir / "run"),
    ):
        status, error = as_nobody(*arguments)
        assert (status, len(error.splitlines())) == (1, 1), error
        (line,) = error.splitlines()
        assert line.startswith("obdlab device mount: ")
        assert line.endswith("Permission denied (most commands need root)")


@pytest.mark.parametrize(("command", "feed"), [("inspect", r"\n"), ("convert", "\n  ")])
def test_the_text_of_an_error_cannot_control_the_terminal(
    command: str, feed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = ["\x1b[2J\x1b]0;title\x07", "\u202eback\nobdlab: all is well"]
    entry = {"mediaType": OCI_MANIFEST, "digest": f"sha256:{'0' * 64}", "size": 2}
    entries = [{**entry, "annotations": {REF_NAME: tag}} for tag in tags]
    layout = ImageLayout.create(tmp_path / "layout")
    (layout.root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    destination = [f"oci:{tmp_path / 'converted'}"] if command == "convert" else []
    assert main(["image", command, str(layout.root), *destination]) == 1
    printed = capsys.readouterr().err
    assert r"\x1b[2J\x1b]0;title\x07" in printed
    assert rf"\u202eback{feed}obdlab: all is well" in printed
    assert printed.replace("\n", "").isprintable()
