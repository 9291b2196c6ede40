from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from obdlab.convert.workdir import work_directory
from obdlab.errors import SourceError

if TYPE_CHECKING:
    from pathlib import Path

_WORKS = """
import sys, time
from pathlib import Path
from obdlab.convert.workdir import work_directory
with work_directory(Path(sys.argv[1])) as directory:
    (directory / "sub").mkdir()
    (directory / "sub" / "000.obd").write_bytes(b"1")
    print(directory, flush=True)
    time.sleep(120)
"""


def test_leftovers_of_killed_conversions_go_others_stay(tmp_path: Path) -> None:
    (tmp_path / "obdlab-convert-file").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "obdlab-convert-link").symlink_to("elsewhere")
    with subprocess.Popen([sys.executable, "-c", _WORKS, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        left = os.fsdecode(process.stdout.readline().strip())
        with work_directory(tmp_path) as directory, work_directory(tmp_path) as other:
            assert directory != other
            assert os.path.exists(f"{left}/sub/000.obd")  # in use
        assert not directory.exists()
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert os.path.exists(left)
    with work_directory(tmp_path):
        assert not os.path.exists(left)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "obdlab-convert-file", "obdlab-convert-link"]


def test_no_place_to_work(tmp_path: Path) -> None:
    with (
        pytest.raises(SourceError, match="cannot make a work directory: No such file"),
        work_directory(tmp_path / "x"),
    ):
        pass
