"""``python -m obdlab``."""

from __future__ import annotations

import sys

from obdlab.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
