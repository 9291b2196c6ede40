"""The messages between clients, device host, keepers and device servers: typed values, each a line of JSON.

A request is recognised by its ``op``, any other message by its mark: the name of its first field, which no other kind
on the same connection has. Processes of other versions are among the peers: a field that is added gets a default, and
fields of later versions are ignored. Clients use this module, so it imports no part that opens images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec

from obdlab.devices.device import DeviceStatistics
from obdlab.errors import DeviceError, ObdlabError, restored
from obdlab.server.rundir import DeviceRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Causes of an error that its message carries; a chain is as long as the layers of a failing call.
_MOST_CAUSES = 8

Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=86400.0)]


class Message(msgspec.Struct, frozen=True):
    """A message."""


# -- failures --------------------------------------------------------------------------------------------------------


class Cause(Message, frozen=True):
    """An error that caused another one."""

    code: str
    text: str


class Failed(Message, frozen=True):
    """The request failed, or the server cannot serve. A process of an earlier version sends the text alone."""

    error: str
    code: str = DeviceError.code
    causes: list[Cause] = []

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Describe an error; one that is not this package's becomes a DeviceError with its type's name."""
        if not isinstance(error, ObdlabError):
            return cls(f"{type(error).__name__}: {error}")
        return cls(str(error), error.code, [Cause(each.code, str(each)) for each in _causes_of(error)])

    def restore(self, before: str = "") -> ObdlabError:
        """Return the error, of the class it had, with its causes; ``before`` is put before its text."""
        cause = None
        for each in reversed(self.causes):
            cause = restored(each.code, each.text, cause)
        return restored(self.code, before + self.error, cause)


def _causes_of(error: ObdlabError) -> Iterator[ObdlabError]:
    for _ in range(_MOST_CAUSES):
        if not isinstance(error.__cause__, ObdlabError):
            return
        error = error.__cause__
        yield error


# -- from a server to its keeper, and from the keeper to the attach --------------------------------------------------


class Description(Message, frozen=True):
    """A server's device."""

    kind: str
    path: str
    size: int
    read_only: bool
    #: Whether the kernel lets another server go on with it.
    can_change_servers: bool
    pid: int = 0
    start_time: int = 0


class Stage(Message, frozen=True):
    """A step of a server's start."""

    stage: str


class Ready(Message, frozen=True):
    """The device is served. Helpers, and the keeper, which reports to the attach, do not describe it."""

    ready: Description | None


class Busy(Message, frozen=True):
    """More processes would help."""

    busy: bool


#: Of a server, on its channel to the keeper.
OF_SERVER = (Failed, Ready, Stage, Busy)
#: Of a keeper, on its pipe to the process that started it.
OF_KEEPER = (Failed, Ready, Stage)


# -- requests to a device host ---------------------------------------------------------------------------------------


class HostRequest(Message, frozen=True, kw_only=True, tag_field="op"):
    """A request. The host gives up after ``timeout_s``."""

    timeout_s: Seconds = 0.0


class Attach(HostRequest, frozen=True, kw_only=True, tag="attach"):
    """Make an image a block device. ``settings`` are as ``Settings.to_json`` wrote them."""

    device_id: str
    config: str
    config_sha256: str
    settings: str
    readahead_kib: int


class Prime(HostRequest, frozen=True, kw_only=True, tag="prime"):
    """Cache the parts of an image that opening it reads, or those that its ``start`` reads in any case.

    ``image`` is an ``ImageConfig`` as JSON.
    """

    image: dict[str, Any]
    settings: str
    start: bool = False


class Upgrade(HostRequest, frozen=True, kw_only=True, tag="upgrade"):
    """Have a device served by the host's code; with ``force`` also if it is already."""

    device_id: str
    force: bool = False


class Keep(HostRequest, frozen=True, kw_only=True, tag="keep"):
    """Have a keeper adopt the sender, the server of a device. The connection becomes their channel."""

    device_id: str
    server: Description


OF_HOST_CLIENT = (Attach, Upgrade, Keep, Prime)


class Stale(Message, frozen=True):
    """The installed code is not the host's: the client is to start another host."""

    stale: bool


class Attached(Message, frozen=True):
    """The device of an attach."""

    device: DeviceRecord


class Upgraded(Message, frozen=True):
    """The outcome of an upgrade: False if there was nothing to do."""

    upgraded: bool


class Kept(Message, frozen=True):
    """A keeper has adopted the server."""

    kept: bool


class Primed(Message, frozen=True):
    """The parts are cached. This message is empty."""


#: Of a device host; the message without a mark last.
OF_HOST = (Failed, Stale, Attached, Upgraded, Kept, Primed)


# -- requests to a server's control socket, and to a snapshotter's counters ------------------------------------------


class ControlRequest(Message, frozen=True, tag_field="op"):
    """A request about a running device."""


class GetStatistics(ControlRequest, frozen=True, tag="statistics"):
    """Ask for the counters of all processes of a device."""


class GetCounters(ControlRequest, frozen=True, tag="counters"):
    """Ask for the counters of one process."""


class Mounted(ControlRequest, frozen=True, tag="mounted"):
    """Report that a device that is a file was mounted."""


class TraceStart(ControlRequest, frozen=True, tag="trace-start"):
    """Record reads from now on."""


class TraceStop(ControlRequest, frozen=True, tag="trace-stop"):
    """Stop recording, and write the trace to a file."""

    path: str


class Flush(ControlRequest, frozen=True, tag="flush"):
    """Bring written data to stable storage."""


class Collect(ControlRequest, frozen=True, tag="gc"):
    """Free overwritten data."""


class Resize(ControlRequest, frozen=True, tag="resize"):
    """Grow the device."""

    size: int


class TakeSnapshot(ControlRequest, frozen=True, tag="snapshot"):
    """Go on in the writable layer that the file ``config`` names."""

    config: str


class Graduate(ControlRequest, frozen=True, tag="graduate"):
    """Put the unpacked file of this name in the server's place."""

    name: str


OF_CONTROL_CLIENT = (
    GetStatistics,
    GetCounters,
    Mounted,
    TraceStart,
    TraceStop,
    Flush,
    Collect,
    Resize,
    TakeSnapshot,
    Graduate,
)


class Step(Message, frozen=True):
    """A step of a long request. The step "begun" has no amount."""

    step: str
    done: int = 0
    total: int = 0


class Progress(Message, frozen=True):
    """A request's progress, before its result."""

    progress: Step


class Result(Message, frozen=True):
    """The result of a request: a value that its sender knows the type of (``wire.typed``)."""

    result: Any


class Tables(Message, frozen=True):
    """The counters of a snapshotter."""

    table: dict[str, dict[str, float]]


#: Of a control socket.
OF_CONTROL = (Failed, Result, Progress)


# -- results ---------------------------------------------------------------------------------------------------------


class Done(Message, frozen=True):
    """Nothing to report."""


@dataclass(frozen=True, slots=True)
class ServerStatistics(DeviceStatistics):
    """The counters of a device; ``source`` has those of its image, if that has any."""

    source: dict[str, float] | None = None


class Counters(Message, frozen=True):
    """The counters of one process. Missing ones are no reason to doubt a process of another version."""

    server: str = ""
    table: dict[str, dict[str, float]] = {}
    #: Age of each request under way.
    under_way_s: tuple[float, ...] = ()
    threads: int = 0
    ages_s: dict[str, float] = {}


class Resized(Message, frozen=True):
    """The size before."""

    before: int


class Recorded(Message, frozen=True):
    """A trace's reads, their bytes, and the reads that came after it was full. A helper reports the last alone."""

    reads: int = 0
    size: int = 0
    left_out: int = 0


class Switched(Message, frozen=True):
    """How long requests waited while the kernel changed to the unpacked file."""

    paused_s: float
