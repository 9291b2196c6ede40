"""``python -m tests.shards``: the long tests by shards, and the page that says when each passed last."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.shards import page, table

_ROOT = Path(__file__).parents[2]
_HOST = "kernel or containerd or vm"
# As in the Makefile: tests of the whole host run alone, the others on all processors.
_HALVES = ((f"not ({_HOST})", ("-n", "auto", "--dist", "load")), (_HOST, ("-n", "1")))
# Of a test that states none: full counts take longer than the ordinary tests' 300 s. A shard is done by then.
_TIMEOUT_S = 1500
_NO_TESTS = 5
_END_S = 60.0


def main() -> int:
    """Run what the command line says; return 1 if a test failed or the limit came first."""
    parser = argparse.ArgumentParser(prog="python -m tests.shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the shards, that whose last pass is longest ago first")
    runner = commands.add_parser("run", help="run shards, and note on the page those that pass")
    runner.add_argument("shard", help="a name, 'oldest', or 'all'")
    runner.add_argument("--limit", type=float, metavar="MINUTES", help="give up a shard then, and fail")
    args = parser.parse_args()
    if args.command == "list":
        known = page.passes(page.PAGE.read_text())
        for name in sorted(known, key=lambda name: known[name].passed):
            print(f"{name}  {known[name].passed or 'never'}  {table.named(name).covers}")
        return 0
    try:
        names = _names(args.shard)
    except ValueError as error:
        parser.error(str(error))
    failed = [name for name in names if not _run(name, args.limit)]
    if failed:
        print(f"shards: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _names(which: str) -> list[str]:
    if which == "all":
        return [shard.name for shard in table.SHARDS]
    return [page.oldest(page.PAGE.read_text()) if which == "oldest" else table.named(which).name]


def _run(name: str, limit_min: float | None) -> bool:
    print(f"shards: {name}: {table.named(name).covers}", flush=True)
    begin = time.monotonic()
    deadline = None if limit_min is None else begin + limit_min * 60
    statuses: list[int | None] = []
    for marks, words in _HALVES:
        if None not in statuses:
            statuses.append(_pytest(name, marks, words, deadline))
    minutes = (time.monotonic() - begin) / 60
    if None in statuses:
        print(f"shards: {name}: stopped, not done in its limit of {limit_min:g} minutes", file=sys.stderr)
    passed = set(statuses) <= {0, _NO_TESTS} and 0 in statuses
    print(f"shards: {name}: {'passed' if passed else 'FAILED'} after {minutes:.1f} minutes", flush=True)
    if passed:
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M")
        last = page.Pass(now, _commit(), f"{minutes:.0f}")
        page.PAGE.write_text(page.with_pass(page.PAGE.read_text(), name, last))
        print(f"shards: noted in {page.PAGE.relative_to(_ROOT)}; commit it", flush=True)
    return passed


# Return pytest's exit status, None if the deadline came first.
def _pytest(name: str, marks: str, words: tuple[str, ...], deadline: float | None) -> int | None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "--shard", name, "-m", marks, *words]
    command += ["--timeout", str(_TIMEOUT_S), *_files(table.named(name))]
    with subprocess.Popen(command, cwd=_ROOT, env={**os.environ, "OBDLAB_LONG": "1"}) as process:
        try:
            return process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # so that it says which test it was at
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
            return None


# Only what is needed is collected: all tests take a while, in each process.
def _files(shard: table.Shard) -> list[str]:
    paths = [Path("tests", each.partition("::")[0]) for each in shard.tests]
    return sorted({str(path if (_ROOT / path).exists() else path.parent) for path in paths})


def _commit() -> str:
    words = ["git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
