"""``obdlab serve device-host``: the process that forks device servers. Started on demand; rarely by hand."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli import notify
from obdlab.cli.logoptions import set_up_logs
from obdlab.errors import DeviceError, ObdlabError

if TYPE_CHECKING:
    from obdlab.server.host import Host

_TRIES = 5


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command (hidden: clients start it themselves)."""
    parser.description = "The process that forks device servers. Other commands start it on demand; rarely by hand."
    _add_options(parser)
    parser.set_defaults(run=run, bounded=False)


def _add_options(parser: argparse.ArgumentParser) -> None:
    from obdlab.cli.common import DEFAULT_RUN_DIR
    from obdlab.cli.logoptions import add_log_options

    parser.add_argument("--run-dir", type=Path, default=Path(os.environ.get("OBDLAB_RUN_DIR", DEFAULT_RUN_DIR)))
    parser.add_argument("--replace", action="store_true", help="take the place of a host that listens already")
    parser.add_argument("--detach", action="store_true", help="go to the background once it listens")
    add_log_options(parser, default_file="host.log in the run directory if detached, else standard error")


def run(args: argparse.Namespace) -> int:
    """Listen and serve; with ``--detach`` return as soon as a host listens, this one or another."""
    from obdlab.cli.common import need_root

    need_root("makes block devices")
    # numpy's BLAS would start threads at import; a process that forks must have no other threads.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from obdlab.server.host import Host

    host = Host(args.run_dir)
    if args.detach:
        return _run_detached(host, args)
    if host.bind() or (args.replace and _take_over(host, args.run_dir)):
        set_up_logs(args, logging.INFO)
        notify.ready_without_thread()
        host.run()
    return 0


# A host holds no state: its devices do not notice, and a client that was about to send a request sends it again.
def _take_over(host: Host, run_dir: Path) -> bool:
    from obdlab.server.client import DeviceService
    from obdlab.settings.settings import Settings

    for _ in range(_TRIES):
        DeviceService(run_dir, Settings()).stop_host()
        if host.bind():
            return True
    raise DeviceError(f"{run_dir}: others start device hosts again and again")


# The parent returns when the daemon has reported the result of its start through a pipe.
def _run_detached(host: Host, args: argparse.Namespace) -> int:
    log_path = args.log_file = (args.log_file or args.run_dir / "host.log").absolute()
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
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    try:
        # Standard output and error go to the log, mainly for the traceback of a crash.
        set_up_logs(args, logging.INFO, follow=(1, 2))
        bound = host.bind()
    except (ObdlabError, OSError) as error:
        os.write(writer, str(error).encode())
        return 1
    os.write(writer, b"listening")
    os.close(writer)
    if bound:
        host.run()
    return 0


if __name__ == "__main__":
    own = argparse.ArgumentParser(prog="obdlab serve device-host")
    _add_options(own)
    try:
        sys.exit(run(own.parse_args()))
    except Exception as problem:
        sys.exit(f"{type(problem).__name__}: {problem}")
