"""Typed messages: what old and later processes send, errors that keep their class, hostile lines."""

from __future__ import annotations

import inspect
import json
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.devices.tcmu.uio import DeviceBusyError
from obdlab.errors import CorruptBlobError, DeviceError, FormatError, ObdlabError, SourceError, caused_by
from obdlab.image.config import ConfigError
from obdlab.image.open import ImageOpenError
from obdlab.layerfiles.snapshot import Snapshot
from obdlab.layers.gc import Collected
from obdlab.registry.errors import RangesIgnoredError, RegistryError
from obdlab.server import messages, wire
from obdlab.server.messages import (
    OF_CONTROL,
    OF_CONTROL_CLIENT,
    OF_HOST,
    OF_HOST_CLIENT,
    OF_KEEPER,
    OF_SERVER,
    Attach,
    Attached,
    Busy,
    Counters,
    Description,
    Done,
    Failed,
    Graduate,
    Keep,
    Message,
    Prime,
    Primed,
    Progress,
    Ready,
    Recorded,
    Resize,
    Resized,
    Result,
    ServerStatistics,
    Stage,
    Stale,
    Step,
    Tables,
    TakeSnapshot,
    Upgrade,
    Upgraded,
)
from obdlab.server.rundir import DeviceRecord
from obdlab.settings.settings import Settings

HERE = Path(__file__).parent
KINDS = {
    "client to host": OF_HOST_CLIENT,
    "client to server": OF_CONTROL_CLIENT,
    "host": OF_HOST,
    "keeper": OF_KEEPER,
    "server": OF_CONTROL,
}
#: Recorded from processes of commit c082ba2, before messages had types: one line of each kind.
EARLIER = [json.loads(line) for line in (HERE / "earlier_messages.jsonl").read_text().splitlines()]


def earlier(sender: str, part: str) -> Message:
    (line,) = [each["line"] for each in EARLIER if each["from"] == sender and part in each["line"]]
    return wire.decode(line.encode(), KINDS[sender])


def part_of(sent: Any, wanted: Any) -> Any:
    """The fields of ``sent`` that an earlier process knows."""
    if isinstance(sent, dict) and wanted:
        return {name: part_of(sent[name], wanted[name]) for name in wanted}
    return sent


@pytest.mark.parametrize("recorded", EARLIER, ids=lambda each: each["line"][:40])
def test_earlier_messages_are_understood(recorded: dict[str, str]) -> None:
    values = json.loads(recorded["line"])
    found = wire.decode(recorded["line"].encode(), KINDS[recorded["from"]])
    sent = json.loads(wire.encode(found))
    assert part_of(sent, values) == values  # an earlier process would find all of it there


def test_earlier_messages_have_their_values() -> None:
    attach = earlier("client to host", '"attach"')
    assert isinstance(attach, Attach)
    assert (attach.device_id, attach.config, attach.readahead_kib) == ("ro", "/images/ro.json", 128)
    assert 0 < attach.timeout_s <= 150
    assert Settings.from_json(attach.settings).cache_unit == 16384
    prime = earlier("client to host", '"prime"')
    assert isinstance(prime, Prime)
    assert prime.image["lowers"] == [{"file": "/images/layer1.obd"}]
    upgrade = earlier("client to host", '"upgrade"')
    assert isinstance(upgrade, Upgrade)
    assert (upgrade.device_id, upgrade.force) == ("ro", False)
    assert earlier("client to server", '"resize"') == Resize(2 << 30)
    assert earlier("client to server", '"snapshot"') == TakeSnapshot("/images/rw2.json")
    attached = earlier("host", '"device"')
    assert isinstance(attached, Attached)
    assert isinstance(attached.device, DeviceRecord)
    assert (attached.device.kind, attached.device.read_only, attached.device.size) == ("fuse+loop", True, 1 << 30)
    assert earlier("host", '"upgraded"') == Upgraded(False)
    assert wire.decode(b'{"stale": true}', OF_HOST) == Stale(True)
    assert wire.decode(b"{}", OF_HOST) == Primed()
    assert earlier("server", '"progress"') == Progress(Step("flushing", 0, 1))
    assert wire.decode(b'{"progress": {"step": "begun"}}', OF_CONTROL) == Progress(Step("begun"))


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ('"slowest_ms"', ServerStatistics),
        ('"under_way_s": [], "threads": 1, "ages_s"', Counters),
        ('{"result": {}}', Done),
        ('"left_out"', Recorded),
        ('"allocated_before"', Collected),
        ('"before"', Resized),
        ('"sealed"', Snapshot),
    ],
)
def test_earlier_results_have_their_types(part: str, kind: type[Any]) -> None:
    found = earlier("server", part)
    assert isinstance(found, Result)
    value = wire.typed(found.result, kind)
    assert json.loads(msgspec.json.encode(value)) == found.result


def test_an_error_of_an_earlier_process_has_no_code_and_is_a_device_s() -> None:
    failed = earlier("host", "already attached")
    assert isinstance(failed, Failed)
    error = failed.restore("cannot attach /images/rw.json: ")
    assert type(error) is DeviceError
    assert str(error).startswith("cannot attach /images/rw.json: device ro: already attached")


def test_records_of_devices_are_read_and_written_as_before(tmp_path: Path) -> None:
    (tmp_path / "disk.json").write_text((HERE / "earlier_disk.json").read_text())
    record = DeviceRecord.load(tmp_path)
    assert record is not None
    before = json.loads((HERE / "earlier_disk.json").read_text())
    record.save(tmp_path)
    after = json.loads((tmp_path / "disk.json").read_text())
    assert {name: after[name] for name in before} == before
    for name, value in (("size", "many"), ("helpers", [None]), ("read_only", 1), ("pid", None)):
        (tmp_path / "disk.json").write_text(json.dumps(before | {name: value}))
        assert DeviceRecord.load(tmp_path) is None


def error_of_an_attach() -> ImageOpenError:
    try:
        try:
            raise RangesIgnoredError("GET blob: registry ignores ranges")
        except RegistryError as error:
            raise ImageOpenError(f"cannot open lower 0 of 1 (sha256:0): {error}") from error
    except ImageOpenError as error:
        return error


def test_an_error_keeps_its_class_and_causes() -> None:
    line = wire.encode(Failed.of(error_of_an_attach()))
    failed = wire.decode(line, OF_HOST)
    assert isinstance(failed, Failed)
    error = failed.restore("cannot attach x: ")
    assert type(error) is ImageOpenError
    assert str(error) == "cannot attach x: cannot open lower 0 of 1 (sha256:0): GET blob: registry ignores ranges"
    assert type(error.__cause__) is RangesIgnoredError
    assert caused_by(error, RegistryError)
    assert not caused_by(error, FormatError)
    assert json.loads(line)["error"] == str(error_of_an_attach())  # as an earlier client reads it


def classes(base: type[ObdlabError]) -> set[type[ObdlabError]]:
    found = {base}
    for each in base.__subclasses__():
        found |= classes(each)
    return found


def test_every_error_with_a_code_crosses_and_can_be_shown() -> None:
    coded = [each for each in classes(ObdlabError) if "code" in vars(each) and each is not ObdlabError]
    assert len(coded) > 20
    for kind in coded:
        error = Failed("text", kind.code).restore()
        assert type(error) is kind
        assert str(error) == "text"
        for name, _ in inspect.getmembers(SourceError) if isinstance(error, SourceError) else ():
            getattr(error, name)
    restored = Failed("text", RegistryError.code).restore()
    assert isinstance(restored, RegistryError)
    assert (restored.status, restored.temporary, restored.blob, restored.what) == (None, False, "", "")


def test_codes_stay() -> None:
    """Processes of other versions know them: a code may be added, never changed."""
    assert {
        kind: kind.code
        for kind in (DeviceError, SourceError, FormatError, CorruptBlobError, RegistryError, RangesIgnoredError)
    } == {
        DeviceError: "device",
        SourceError: "source",
        FormatError: "format",
        CorruptBlobError: "format.corrupt",
        RegistryError: "source.registry",
        RangesIgnoredError: "source.registry.ranges-ignored",
    }
    assert (ConfigError.code, ImageOpenError.code, DeviceBusyError.code) == ("config", "image", "device.busy")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("source.registry.of-a-later-version", RegistryError),
        ("source.x.y", SourceError),
        ("unknown", ObdlabError),
        ("", ObdlabError),
        ("format.corrupt", CorruptBlobError),
    ],
)
def test_an_unknown_code_is_the_nearest_known_class(code: str, kind: type[ObdlabError]) -> None:
    assert type(Failed("text", code).restore()) is kind


def test_two_classes_cannot_have_one_code() -> None:
    with pytest.raises(TypeError, match="two classes of errors with the code 'source'"):
        type("Again", (ObdlabError,), {}, code="source")


def test_a_chain_of_causes_is_cut() -> None:
    error = ObdlabError("0")
    for number in range(1, 30):
        above = ObdlabError(str(number))
        above.__cause__ = error
        error = above
    assert [cause.text for cause in Failed.of(error).causes] == [str(number) for number in range(28, 20, -1)]


def test_fields_of_later_versions_are_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    device = msgspec.to_builtins(earlier("host", '"device"').device) | {"of_2031": 1}  # type: ignore[attr-defined]
    found = wire.decode(json.dumps({"device": device, "of_2030": True}).encode(), OF_HOST)
    assert isinstance(found, Attached)
    assert [record.args for record in caplog.records] == [("Attached", "of_2030"), ("DeviceRecord", "of_2031")]


@pytest.mark.parametrize(
    ("line", "kinds", "message"),
    [
        (b'{"op": "attach"}', OF_HOST_CLIENT, "attach request: Object missing required field `device_id`"),
        (b'{"op": "resize", "size": "1G"}', OF_CONTROL_CLIENT, r"resize request: .* `\$.size`"),
        (b'{"op": "resize", "size": true}', OF_CONTROL_CLIENT, r"resize request: .* `\$.size`"),
        (b'{"op": "nothing"}', OF_HOST_CLIENT, r"unknown request \(got 'nothing'\)"),
        (b'{"op": ["attach"]}', OF_HOST_CLIENT, r"unknown request \(got \['attach'\]\)"),
        (b"{}", OF_HOST_CLIENT, r"unknown request \(got None\)"),
        (b'{"unknown": 1}', OF_CONTROL, r"unknown message \(got \['unknown'\]\)"),
        (b'{"error": 7}', OF_HOST, r"Failed message: .* `\$.error`"),
        (b'{"error": "x", "causes": [{"code": 1}]}', OF_HOST, r"Failed message: .*causes"),
        (b"[]", OF_HOST, "no JSON object"),
        (b"NaN", OF_HOST, "no JSON "),
        (b"[" * 300_000, OF_HOST, "no JSON "),
        (b'{"op":' * 100_000, OF_HOST_CLIENT, "no JSON "),
        (b'{"op": "prime", "image": ' + b"[" * 400_000, OF_HOST_CLIENT, "no JSON "),
        (b'{"op": ' + b"9" * 5000 + b"}", OF_HOST_CLIENT, "no JSON|unknown request"),
        (b'\xff{"op": "attach"}', OF_HOST_CLIENT, "no JSON "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_malformed_lines_are_refused(line: bytes, kinds: tuple[type[Message], ...], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        wire.decode(line, kinds)


@pytest.mark.parametrize("value", [float("inf"), -1, 1e300, "5", True, None, [5]])
def test_times_of_requests(value: object) -> None:
    request = {"op": "upgrade", "device_id": "a", "timeout_s": value}
    with pytest.raises(DeviceError, match=r"timeout_s|no JSON"):
        wire.decode(json.dumps(request).encode(), OF_HOST_CLIENT)
    found = wire.decode(json.dumps(request | {"timeout_s": 5}).encode(), OF_HOST_CLIENT)
    assert found == Upgrade(device_id="a", timeout_s=5.0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["op", "error", "code", "causes", "ready", "device", "result", "progress", "stage", "busy"])


@settings(max_examples=60, deadline=None)
@given(
    values=st.dictionaries(keys | st.text(max_size=6), json_values | st.sampled_from(["attach", "keep", "gc"])),
    kinds=st.sampled_from([OF_HOST, OF_HOST_CLIENT, OF_CONTROL, OF_CONTROL_CLIENT, OF_SERVER, OF_KEEPER, (Tables,)]),
)
def test_any_line_is_one_of_the_kinds_or_refused(values: dict[str, Any], kinds: tuple[type[Message], ...]) -> None:
    try:
        found = wire.decode(json.dumps(values).encode(), kinds)
    except DeviceError:
        return
    assert isinstance(found, kinds)
    assert wire.decode(wire.encode(found), kinds) == found


DESCRIPTION = Description("fuse+loop", "/dev/loop0", 4096, True, True, 7, 8)


@pytest.mark.parametrize(
    ("message", "kinds"),
    [
        (Keep(device_id="a", server=DESCRIPTION, timeout_s=1.0), OF_HOST_CLIENT),
        (Ready(DESCRIPTION), OF_SERVER),
        (Ready(None), OF_SERVER),
        (Busy(True), OF_SERVER),
        (Stage("opening the image"), OF_KEEPER),
        (Graduate("name"), OF_CONTROL_CLIENT),
        (Failed("text", "source", [messages.Cause("config", "why")]), OF_KEEPER),
        (Tables({"reads": {"": 1.5}}), (Tables,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_messages_come_through(message: Message, kinds: tuple[type[Message], ...]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire.send(ours, message)
        assert wire.receive(theirs, 30.0, kinds) == message


def test_messages_are_cut_at_line_ends_and_bounded() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b'{"busy": true}\n{"stage": "a"}\n{"sta')
        received = wire.Messages(theirs, OF_SERVER)
        assert [received.receive(30.0), received.receive(30.0)] == [Busy(True), Stage("a")]
        with pytest.raises(DeviceError, match=r"no answer within 0\.05 s"):
            received.receive(0.05)
        ours.sendall(b'ge": "b"}\n')
        assert received.receive(30.0) == Stage("b")
        ours.sendall(b"{")
        ours.close()
        with pytest.raises(wire.ConnectionLostError, match=r"middle of a message \(got 1 bytes\)"):
            received.receive(30.0)


def test_a_message_without_end_is_refused() -> None:
    lines = wire.Lines()
    lines.add(b"x" * (1 << 20))
    with pytest.raises(DeviceError, match="a message longer than 1048576 bytes"):
        lines.add(b"x")
