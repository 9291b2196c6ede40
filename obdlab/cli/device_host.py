"""``obdlab device-host``: the process that forks device servers. Started on demand; rarely by hand."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from obdlab.service.host import Host

#: Start anew rather than append to a log that has grown past this.
_LOG_LIMIT = 16 << 20


def add(subcommands: Any) -> None:
    """Declare the command (hidden: clients start it themselves)."""
    parser = subcommands.add_parser(
        "device-host",
        description="The process that forks device servers. Other commands start it on demand; rarely by hand.",
    )
    _add_options(parser)
    parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    from obdlab.cli.common import DEFAULT_RUN_DIR

    parser.add_argument("--run-dir", type=Path, default=Path(os.environ.get("OBDLAB_RUN_DIR", DEFAULT_RUN_DIR)))
    parser.add_argument("--detach", action="store_true", help="go to the background once it listens")


def run(args: argparse.Namespace) -> int:
    """Listen and serve; with ``--detach`` return as soon as a host listens, this one or another."""
    # numpy's BLAS would start threads at import; a process that forks must have none.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from obdlab.service.host import Host

    host = Host(args.run_dir)
    if args.detach:
        return _run_detached(host, args.run_dir.absolute() / "host.log")
    if host.bind():
        _serve(host)
    return 0


def _serve(host: Host) -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s", force=True
    )
    host.run()


# The parent returns when the daemon has said through a pipe how its start went.
def _run_detached(host: Host, log_path: Path) -> int:
    reader, writer = os.pipe()
    if os.fork() != 0:
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            answer = stream.read().decode()
        if answer != "listening":
            print(answer or f"ended at once (see {log_path})", file=sys.stderr)
            return 1
        return 0
    os.close(reader)
    os.setsid()
    os.chdir("/")
    _redirect(log_path)
    try:
        bound = host.bind()
    except ObdlabError as error:
        os.write(writer, str(error).encode())
        return 1
    os.write(writer, b"listening")
    os.close(writer)
    if bound:
        _serve(host)
    return 0


def _redirect(log_path: Path) -> None:
    fresh = os.O_TRUNC if log_path.exists() and log_path.stat().st_size > _LOG_LIMIT else 0
    log_file = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | fresh, 0o600)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for source, target in ((null, 0), (log_file, 1), (log_file, 2)):
        os.dup2(source, target)


if __name__ == "__main__":
    own = argparse.ArgumentParser(prog="obdlab device-host")
    _add_options(own)
    try:
        sys.exit(run(own.parse_args()))
    except Exception as problem:
        sys.exit(f"{type(problem).__name__}: {problem}")
