"""Applies layers to a tree that becomes the root directory: ``python -m tests.convert.chrooted ROOT TAR...``"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

from obdlab.convert.apply import apply_layer
from obdlab.errors import ObdlabError


def main() -> int:
    root, *tars = sys.argv[1:]
    with ExitStack() as files:
        opened = [files.enter_context(open(tar, "rb", buffering=0)) for tar in tars]
        os.chroot(root)
        os.chdir("/")
        for number, tar in enumerate(opened):
            try:
                apply_layer(tar, f"layer {number}")
            except ObdlabError as error:
                print(error, file=sys.stderr)
                return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
