"""Asking a device's server for something, at its control socket (``obdlab.service.control`` answers).

Kept apart from the answering: who only asks needs nothing of what opens images, which takes long to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from obdlab.errors import DeviceError
from obdlab.service import wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Answer = dict[str, Any]
    Tell = Callable[[dict[str, Any]], None]

CONTROL_NAME = "control.sock"
#: An asker sends its request at once and takes what it is told; one that does not is dropped.
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
    """Ask the server of the device at ``directory``, or a helper of its; return the result.

    Raises DeviceError if there is no server, it says nothing for ``silence_s``, or it refuses (with its reason).
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
