"""One image of ``obdlab image convert-list``: ``python -m obdlab.cli.image.convert_one``, started by it.

Standard input brings the job, pickled by the parent process, which keeps it open as long as it wants the result.
Standard output gets one line of JSON.
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

from obdlab.convert.batch.job import LENGTH_BYTES, Outcome
from obdlab.errors import FormatError, ObdlabError, SourceError

if TYPE_CHECKING:
    from obdlab.convert.platforms import ConvertedIndex


def main() -> int:
    """Convert what standard input names; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    length = int.from_bytes(sys.stdin.buffer.read(LENGTH_BYTES), "big")
    args: argparse.Namespace = pickle.loads(sys.stdin.buffer.read(length))
    threading.Thread(target=_end_when_abandoned, daemon=True).start()
    try:
        outcome = _convert(args)
    except ObdlabError as error:
        blob = error.blob if isinstance(error, SourceError | FormatError) else ""
        temporary = isinstance(error, SourceError) and error.temporary
        outcome = Outcome(error=str(error), temporary=temporary, blob=blob)
    except KeyboardInterrupt:
        return 130
    sys.stdout.buffer.write(outcome.to_line())
    sys.stdout.buffer.flush()
    return 1 if outcome.error else 0


def _convert(args: argparse.Namespace) -> Outcome:
    from obdlab.cli.image.convert import convert
    from obdlab.cli.imageoptions import image_client
    from obdlab.convert.endpoints.names import check_apart

    check_apart(args.source, args.destination)
    with image_client(args) as client:
        return _outcome_of(convert(args, client))


def _outcome_of(converted: ConvertedIndex) -> Outcome:
    return Outcome(
        digest=converted.digest,
        layers=sum(len(image.layers) for image in converted.images),
        source_size=sum(layer.source_size for image in converted.images for layer in image.layers),
        size=sum(image.size for image in converted.images),
    )


def _end_when_abandoned() -> None:
    # Not through Python's buffer: this thread would hold its lock at exit.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
