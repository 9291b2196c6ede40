"""Sends requests to a device server's control socket (``obdlab.server.controlsocket`` answers them).

A module apart from the answering side, as clients do not need the imports for opening images, which take long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from obdlab.errors import DeviceError
from obdlab.server import wire
from obdlab.server.messages import OF_CONTROL, Failed, Progress, Result, Step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.server.messages import ControlRequest

T = TypeVar("T")

CONTROL_NAME = "control.sock"
#: A client sends its request at once and takes the answer; a slower client is dropped.
PEER_TIMEOUT_S = 5.0


def ask(
    directory: Path,
    request: ControlRequest,
    kind: type[T],
    *,
    silence_s: float = 5.0,
    progress: Callable[[Step], None] | None = None,
    socket_name: str = CONTROL_NAME,
) -> T:
    """Ask the server of the device at ``directory``, or one of its helpers; return the result, a value of ``kind``.

    Raises DeviceError if the server is missing, sends nothing for ``silence_s``, or sends something else. If it
    refuses, raises its error.
    """
    who = f"device {directory.name}"
    try:
        with wire.connect(directory / socket_name, min(silence_s, PEER_TIMEOUT_S)) as connection:
            wire.send(connection, request)
            messages = wire.Messages(connection, OF_CONTROL)
            while isinstance(answer := messages.receive(silence_s), Progress):
                if progress is not None:
                    progress(answer.progress)
    except (OSError, DeviceError) as error:
        raise wire.NoAnswerError(f"{who}: its server does not answer: {error}") from error
    if isinstance(answer, Result):
        return wire.typed(answer.result, kind)
    assert isinstance(answer, Failed)
    raise answer.restore(f"{who}: ")
