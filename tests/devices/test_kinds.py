"""The registry of device kinds: those of the core, of this package's contrib, and of other packages."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from obdlab import plugins
from obdlab.blob import MemoryBlob
from obdlab.cli import common
from obdlab.cli.main import build_parser
from obdlab.devices import kinds
from obdlab.devices.fuse_loop import FuseLoop
from obdlab.devices.kind import Place, StayingKind, cannot_open
from obdlab.errors import DeviceError
from obdlab.server.host import _warm_up
from obdlab.settings.settings import SettingsError

FOREIGN = """
from obdlab.devices.fuse_loop import FuseLoop

class Foreign(FuseLoop):
    name = "foreign"

KIND = Foreign()
"""


ELSEWHERE = """
calls = []

def devices_of(directory):
    return [directory / "node"]

def take_down(directory, *, timeout_s, force):
    calls.append(("take_down", directory, timeout_s, force))

def abandon(directory):
    calls.append(("abandon", directory))

def DEVICE(blob, directory, *, name, readahead_kib, recover):
    return blob.name, directory, name, readahead_kib, recover
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package with a kind that works and one that cannot be imported."""
    (tmp_path / "foreign_kinds.py").write_text(FOREIGN)
    metadata = tmp_path / "foreign_kinds-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-kinds\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[obdlab.devices]\nforeign = foreign_kinds:KIND\nbroken = foreign_kinds_broken:KIND\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    caches = (plugins._entries, kinds._kind)
    for cache in caches:
        cache.cache_clear()
    yield  # type: ignore[misc]
    for cache in caches:
        cache.cache_clear()
    sys.modules.pop("foreign_kinds", None)


def test_the_core_knows_its_own_and_finds_those_of_contrib() -> None:
    assert kinds.names()[:2] == ["fuse+loop", "tcmu"]
    assert {"fuse+file", "ublk"} <= set(kinds.names())
    assert [kind.name for kind in kinds.every()] == kinds.names()
    assert [kinds.find(name).name for name in kinds.names()] == kinds.names()


@pytest.mark.usefixtures("foreign")
def test_another_package_adds_a_kind(caplog: pytest.LogCaptureFixture) -> None:
    assert {"foreign", "broken"} <= set(kinds.names())
    assert kinds.find("foreign") in kinds.every()
    assert "broken: cannot be imported (foreign_kinds_broken:KIND)" in caplog.text
    with pytest.raises(DeviceError, match="broken: cannot be imported"):
        kinds.find("broken")
    with pytest.raises(DeviceError, match=r"no such kind of device .got 'other', wanted auto or one of .*foreign"):
        kinds.find("other")
    assert build_parser().parse_args(["device", "attach", "--device", "foreign", "x"]).device_kind == "foreign"


def test_a_wrong_kind_is_refused_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["device", "attach", "--device", "nbd", "x"])
    assert "--device: device_kind: wanted one of auto, fuse+loop, tcmu," in capsys.readouterr().err
    (tmp_path / "settings.json").write_text('{"device_kind": "nbd"}')
    args = build_parser().parse_args(["device", "attach", "--settings", str(tmp_path / "settings.json"), "x"])
    with pytest.raises(SettingsError, match=r"device_kind: wanted one of auto, .*overlaybd-tcmu .got 'nbd'"):
        common.settings_from(args)


def test_the_device_host_imports_the_modules_of_kinds_that_this_host_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Present(FuseLoop):
        implementation = "warmed_of_present"

        def missing(self) -> str:
            return ""

    class Missing(FuseLoop):
        implementation = "warmed_of_missing"

        def missing(self) -> str:
            return "no such module in this kernel"

    for module in (Present.implementation, Missing.implementation):
        (tmp_path / f"{module}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("gc.freeze", lambda: None)
    _warm_up((), [Present(), Missing()])
    assert "warmed_of_present" in sys.modules
    assert "warmed_of_missing" not in sys.modules


@pytest.mark.parametrize("name", ["tcmu", "ublk"])
def test_kinds_that_stay_in_the_kernel_have_all_that_is_called(name: str) -> None:
    kind = kinds.find(name)
    assert isinstance(kind, StayingKind)
    assert kind.module.DEVICE.kind == name
    options = inspect.signature(kind.module.DEVICE).parameters
    assert {"name", "readahead_kib", "recover"} <= options.keys()
    for function in (kind.module.devices_of, kind.module.take_down, kind.module.abandon):
        assert next(iter(inspect.signature(function).parameters)) == "directory"


def test_clients_import_a_kind_only_where_the_kernel_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(StayingKind):
        name, fix, control, implementation = "elsewhere", "none", tmp_path / "control", "elsewhere_device"

        def missing(self) -> str:
            return cannot_open(self.control)

    kind = Elsewhere()
    assert kind.missing() == f"{tmp_path}/control: No such file or directory"
    assert kind.devices_of(tmp_path) == []
    kind.take_down(tmp_path)
    (tmp_path / "control").touch()
    assert kind.missing() == ""
    with pytest.raises(ModuleNotFoundError):
        kind.devices_of(tmp_path)
    (tmp_path / "elsewhere_device.py").write_text(ELSEWHERE)
    monkeypatch.syspath_prepend(tmp_path)
    assert kind.devices_of(tmp_path) == [tmp_path / "node"]
    kind.take_down(tmp_path, timeout_s=1.0, force=True)
    kind.take_down(tmp_path)
    kind.give_up(tmp_path)
    place = Place(tmp_path, name="one", readahead_kib=4, path=tmp_path / "node")
    made: object = kind.open(MemoryBlob(b"", ""), place)
    assert made == ("", tmp_path, "one", 4, True)
    assert kind.module.calls == [
        ("take_down", tmp_path, 1.0, True),
        ("take_down", tmp_path, 10.0, False),
        ("abandon", tmp_path),
    ]


def test_a_node_that_cannot_be_opened_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cannot_open(tmp_path / "file") == ""
    assert cannot_open(tmp_path / "file" / "node") == f"{tmp_path}/file/node: Not a directory"
    assert cannot_open(tmp_path) == f"{tmp_path}: Is a directory"


class Other(FuseLoop):
    """A kind that a host may have or miss."""

    def __init__(self, preference: int, trouble: str = "") -> None:
        self.preference = preference
        self._trouble = trouble

    def missing(self) -> str:
        return self._trouble


def test_the_best_kind_outlives_its_servers_then_is_the_preferred_one_of_those_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, usual, better, absent, never = kinds.find("fuse+loop"), Other(1), Other(2), Other(3, "no module"), Other(0)
    monkeypatch.setattr(FuseLoop, "missing", lambda _: "")
    monkeypatch.setattr(FuseLoop, "can_change_servers", lambda _: True)
    monkeypatch.setattr(kinds, "every", lambda: [first, usual, better, absent, never])
    assert kinds.best() is first
    monkeypatch.setattr(FuseLoop, "can_change_servers", lambda _: False)  # before Linux 6.9
    assert kinds.best() is better
    monkeypatch.setattr(kinds, "every", lambda: [first, absent, never])
    assert kinds.best() is first


def test_only_devices_over_fuse_can_have_several_servers() -> None:
    assert {kind.name for kind in kinds.every() if kind.is_shared} == {"fuse+loop", "fuse+file"}
