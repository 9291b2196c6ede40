"""``python -m tests.vm``: fetch the kernel, or run a command in the virtual machine."""

from __future__ import annotations

import argparse
import sys

from tests.vm.kernel import VmError, get_kernel
from tests.vm.machine import run


def main() -> int:
    """Run one command; return its exit status, or 124 if the machine did not get that far."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    subcommands = parser.add_subparsers(dest="command", required=True)
    fetch = subcommands.add_parser("fetch", help="have the kernel in the cache; prints where")
    fetch.add_argument("--newest", action="store_true", help="also if an older one is there")
    runner = subcommands.add_parser("run", help="boot, run a command on this checkout, power off")
    runner.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="give up then (default: %(default)g)"
    )
    runner.add_argument("--module", action="append", default=[], help="kernel module to load first; repeatable")
    runner.add_argument("--memory", type=int, default=3072, metavar="MIB", help="default: %(default)s")
    runner.add_argument("--console", action="store_true", help="print the kernel's messages at the end")
    runner.add_argument("argv", nargs="+", metavar="COMMAND", help="after --: the command and its arguments")
    args = parser.parse_args()
    try:
        if args.command == "fetch":
            print(get_kernel(newest=args.newest).image)
            return 0
        done = run(args.argv, modules=args.module, timeout_s=args.timeout, memory_mib=args.memory, echo=sys.stdout)
    except VmError as error:
        print(f"vm: {error}", file=sys.stderr)
        return 124
    except KeyboardInterrupt:
        return 130
    if args.console:
        print(done.console, file=sys.stderr)
    return done.status


if __name__ == "__main__":
    sys.exit(main())
