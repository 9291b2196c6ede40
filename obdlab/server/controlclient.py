"""Sends requests to a device server's control socket (``obdlab.server.controlsocket`` answers them).

A module apart from the answering side, as clients do not need the imports for opening images, which take long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from obdlab.errors import DeviceError
from obdlab.server import wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Answer = dict[str, Any]
    Tell = Callable[[dict[str, Any]], None]

CONTROL_NAME = "control.sock"
#: A client sends its request at once and takes the answer; a slower client is dropped.
PEER_TIMEOUT_S = 5.0


def ask(
    directory: Path,
    op: str,
    arguments: dict[str, Any] | None = None,
    *,
    silence_s: float = 5.0,
    progress: Tell | None = None,
    socket_name: str = CONTROL_NAME,
) -> Answer:
    """Ask the server of the device at ``directory``, or one of its helpers; return the result.

    Raises DeviceError if the server is missing, sends nothing for ``silence_s``, or refuses (with its reason).
    """
    who = f"device {directory.name}"
    try:
        with wire.connect(directory / socket_name, min(silence_s, PEER_TIMEOUT_S)) as connection:
            wire.send(connection, {"op": op} | (arguments or {}))
            messages = wire.Messages(connection)
            while "progress" in (answer := messages.receive(silence_s)):
                if progress is not None:
                    progress(answer["progress"])
    except (OSError, DeviceError) as error:
        raise wire.NoAnswerError(f"{who}: its server does not answer: {error}") from error
    if "result" in answer:
        return answer["result"]  # type: ignore[no-any-return]
    raise DeviceError(f"{who}: {answer.get('error', 'an answer without result')}")
