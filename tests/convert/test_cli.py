from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from obdlab.convert.layout import ImageLayout
from tests.convert.layouts import make_layout, member

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.service.client import DeviceService


@pytest.mark.kernel
def test_prints_table_and_digest(
    devices: DeviceService, work_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = make_layout(tmp_path / "source", [[member("a", b"1" * 100_000)], [member("b", b"2")]])
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"), "--work-dir", str(work_dir)]
    options = ["--algorithm", "zstd", "--block-size-kib", "16", "--vsize-gib", "1"]
    assert main(["convert", str(layout.root), f"oci:{tmp_path / 'out'}:v1", *options, *places]) == 0
    printed = capsys.readouterr()
    (entry,) = ImageLayout(tmp_path / "out").select("v1")
    assert printed.out == f"{entry.digest}\n"
    table = printed.err.splitlines()
    assert table[-5].split()[:2] == ["layer", "source"]
    assert table[-1] == f"stored as oci:{tmp_path / 'out'}:v1"


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_layout(tmp_path / "source", [[member("a")]])
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["convert", f"oci:{tmp_path / 'source'}:other", f"oci:{tmp_path / 'out'}", *places]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("obdlab convert: ")
    assert line.endswith("OCI layout has no such tag (got latest, wanted other)")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--vsize-gib", "0"],
        ["--vsize-gib", "x"],
        ["--platform", "linux"],
        ["--block-size-kib", "5"],
        ["--algorithm", "gz"],
    ],
)
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", "a", "b", *wrong])
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err
