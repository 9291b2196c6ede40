"""Logs for machines and for people, in files of bounded size."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from obdlab.observe.printable import printable, printable_lines
from obdlab.observe.redact import redacted
from obdlab.observe.rotation import RotatingFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TEXT_FORMAT = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
#: Fields of an error that are logged among a message's values.
_ERROR_FIELDS = ("blob", "offset", "tries", "status")


class LogFormatError(ValueError):
    """Unknown log format."""


class TextFormatter(logging.Formatter):
    """Lines for people, without secrets and without characters that forge lines or control a terminal.

    A record is one line. A traceback and the record's ``stack_info`` follow it as indented lines.
    """

    # Not the base class's, which joins the parts before any of them could be escaped.
    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage()
        record.asctime = self.formatTime(record, self.datefmt)
        # Secrets go first: an escaped blank no longer separates a token from the word before it.
        parts = [printable(redacted(self.formatMessage(record)))]
        if record.exc_info:
            parts.append(printable_lines(redacted(self.formatException(record.exc_info))))
        if record.stack_info:
            parts.append(printable_lines(redacted(record.stack_info)))
        return "\n".join(parts)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, pid, process, message; for errors blob, offset, tries."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "process": process_name,
            "message": redacted(record.getMessage()),
        }
        for error in _errors_of(record):
            for name in _ERROR_FIELDS:
                value = getattr(error, name, None)
                if value not in (None, ""):
                    entry[name] = value
        if record.stack_info:
            entry["stack"] = redacted(record.stack_info)
        if record.exc_info:
            entry["trace"] = redacted(self.formatException(record.exc_info))
        return json.dumps(entry, default=str)


#: Process name in JSON lines; a device server uses its device.
process_name = "obdlab"


def set_process_name(name: str) -> None:
    """Set the process name in lines from now on."""
    global process_name
    process_name = name


class RotatingHandler(logging.Handler):
    """Sends records to a :class:`RotatingFile`."""

    def __init__(self, file: RotatingFile) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._file.write(self.format(record).encode(errors="replace") + b"\n")
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Logging options. ``file`` None: to standard error. Each of ``count`` files has about ``size`` bytes."""

    format: str = "text"
    file: Path | None = None
    size: int = 10 << 20
    count: int = 3

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise LogFormatError(f"log format: wanted one of {', '.join(FORMATS)} (got {self.format!r})")
        if self.size < 1 or self.count < 1:
            raise ValueError(f"log rotation: size and count must be at least 1 (got {self.size} and {self.count})")


FORMATS = ("text", "json")


def set_up(options: LogOptions, level: int, *, follow: Sequence[int] = ()) -> None:
    """Write all records of at least ``level`` as ``options`` say, replacing an earlier set up.

    ``follow`` are descriptors that shall refer to the log file, too, through all its rotations. Raises OSError if the
    file cannot be opened.
    """
    global _write
    if options.file is None:
        handler: logging.Handler = logging.StreamHandler()
        _write = _to_standard_error
    else:
        file = RotatingFile(options.file, size=options.size, count=options.count, follow=follow)
        file.write(b"")
        handler = RotatingHandler(file)
        _write = file.write
    handler.setFormatter(JsonFormatter() if options.format == "json" else TextFormatter(TEXT_FORMAT))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def write_at_once(record: logging.LogRecord) -> None:
    """Write a record of any level to the log, also from a signal's handler. Raises OSError.

    It takes no lock and no buffer that the interrupted code may be using.
    """
    handlers = logging.getLogger().handlers
    formatter = handlers[0].formatter if handlers else None
    line = (formatter or TextFormatter(TEXT_FORMAT)).format(record)
    _write(line.encode(errors="replace") + b"\n")


def announce(text: str) -> None:
    """Print a line, and write it to the log file, if there is one, at any level. Raises OSError."""
    print(text, flush=True)
    if _write is not _to_standard_error:
        write_at_once(logging.LogRecord(process_name, logging.INFO, "", 0, text, None, None))


def _to_standard_error(line: bytes) -> None:
    while line:
        line = line[os.write(2, line) :]


# Output of the last set up.
_write: Callable[[bytes], None] = _to_standard_error


# Errors of a record: among its arguments, as "cause" if its text was made earlier, or being handled.
def _errors_of(record: logging.LogRecord) -> list[BaseException]:
    found = [argument for argument in record.args or () if isinstance(argument, BaseException)]
    cause = getattr(record, "cause", None)
    if isinstance(cause, BaseException):
        found.append(cause)
    if record.exc_info and record.exc_info[1] is not None:
        found.append(record.exc_info[1])
    return found
