"""Each old name of a command beside its new one: the same output, the same status, and a hint."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.groups import GROUPS, SINGLE
from obdlab.cli.main import main
from obdlab.cli.oldnames import OLD_NAMES
from obdlab.formats.trace import Trace
from tests.convert.layouts import make_layout, member
from tests.layers.golden import GOLDEN

if TYPE_CHECKING:
    from pathlib import Path

EXT4 = GOLDEN / "ext4"

#: Arguments for each old name, in a directory of the files that ``make`` writes; failures are compared too.
ARGUMENTS = {
    "convert": "oci:source oci:made --quiet --database none --work-dir .",
    "convert-list": "list --quiet --database none --work-dir .",
    "compare": "oci:source oci:source --work-dir .",
    "rpull": "127.0.0.1:1/x:1 --address missing.sock --json",
    "inspect": "layer1.obd layer2.obd --json",
    "verify": "layer1.obd layer2.obd --json",
    "ls": "layer1.obd,layer2.obd:/ --json -R",
    "cat": "layer1.obd,layer2.obd:/missing",
    "cp": "layer1.obd:/ copied",
    "pull-blob": "oci:source manifest",
    "create": "data index --vsize 1M --mkfs --uuid 00000000-0000-0000-0000-000000000001",
    "commit": "layer1.obd out.obd",
    "seal": "layer1.obd",
    "merge": "layer1.obd layer2.obd -o merged.obd",
    "gc": "layer1.obd --run-dir run",
    "resize": "layer1.obd --vsize 1G --run-dir run",
    "import": "layer1.tar made.obd",
    "diff": "--old layer1.obd --new layer1.obd layer2.obd --json",
    "zfile": "verify layer1.obd",
    "attach": "missing.obd --run-dir run",
    "detach": "/dev/missing --run-dir run",
    "ls-devices": "--json --run-dir run",
    "mount": "./missing.obd mnt --run-dir run",
    "umount": "mnt --run-dir run",
    "snapshot": "missing --data d --run-dir run",
    "upgrade": "missing --run-dir run",
    "graduate": "missing --run-dir run",
    "tcmu-attach": "missing.json --id x",
    "tcmu-detach": "--help",
    "trace publish": "oci:source --trace trace",
    "trace unpublish": "127.0.0.1:1/x:1",
    "cache ls": "--json --cache-dir cache",
    "snapshotter": "--root root",
    "tcmu": "--help",
    "exporter": "--listen nonsense",
    "snapshot-api": "--help",
    "nbd": "missing.obd --socket s",
    "device-host": "--help",
    "dataset": "list --datasets missing",
    "experiment": "list --json --results missing",
    "experiment report": "missing --results .",
    "evaluate": "--list",
    "report": "--results missing",
}


#: The commands of the first release.
FIRST = (
    "attach cache cat cleanup commit compare config convert convert-list cp create dataset detach device-host diff "
    "doctor evaluate experiment exporter fsck gc graduate import inspect ls ls-devices merge mount nbd pull-blob "
    "report resize rpull seal snapshot snapshot-api snapshotter tcmu tcmu-attach tcmu-detach trace umount upgrade "
    "verify zfile"
)


def make(directory: Path) -> None:
    directory.mkdir()
    for file in ("layer1.obd", "layer2.obd", "layer1.tar"):
        (directory / file).write_bytes((EXT4 / file).read_bytes())
    make_layout(directory / "source", [[member("a", b"text")]])
    (directory / "list").write_text("oci:source oci:listed\n")
    (directory / "trace").write_bytes(Trace.from_reads([(0, 0, 4096)]).to_bytes())


@pytest.mark.parametrize("old", OLD_NAMES, ids=" ".join)
def test_an_old_name_does_what_the_new_one_does(
    old: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ARGUMENTS[" ".join(old)].split()
    new = OLD_NAMES[old]
    found = []
    for name in (new, old):
        make(tmp_path / "place")
        monkeypatch.chdir(tmp_path / "place")
        try:
            status: object = main([*name, *arguments])
        except SystemExit as ended:
            status = ended.code
        printed = capfd.readouterr()
        found.append((status, printed.out, printed.err))
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(tmp_path / "place")
    (status, out, error), (old_status, old_out, old_error) = found
    # The list's table names the seconds that it took.
    if old != ("convert-list",):
        assert old_out == out
    assert old_status == status
    hint, _, rest = old_error.partition("\n")
    assert hint == f"obdlab: '{' '.join(old)}' is now 'obdlab {' '.join(new)}'"
    assert rest == error


def test_new_names_give_no_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layer", "inspect", str(EXT4 / "layer1.obd")]) == 0
    assert capsys.readouterr().err == ""


def test_options_before_an_old_name_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-v", "inspect", str(EXT4 / "layer1.obd")]) == 0
    assert "is now 'obdlab image inspect'" in capsys.readouterr().err


def test_the_commands_of_the_first_release_are_all_there() -> None:
    today = {each.name for each in (*GROUPS, *SINGLE)}
    assert set(FIRST.split()) <= {old[0] for old in OLD_NAMES} | today
