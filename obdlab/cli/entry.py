"""The program ``obdlab``: a pull asks the snapshotter's ready process first, all else is :mod:`obdlab.cli.main`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the process's command line; return its exit status."""
    words = sys.argv[1:]
    if words[:2] == ["image", "pull"] or words[:1] == ["rpull"]:
        from obdlab.cli.prefork import asking

        try:
            status = asking.ask(words) if asking.is_pull(words) else None
        except KeyboardInterrupt:
            print("obdlab image pull: interrupted", file=sys.stderr)
            return 130
        if status is not None:
            return status
    from obdlab.cli.main import main as run

    return run()
