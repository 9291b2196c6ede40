"""``python -m tests.figures``: write the figures of all pages from the rows in the repository, or check them."""

from __future__ import annotations

import argparse
import sys

from tests.figures import blocks, page, picture


def main() -> int:
    """Write pages and tables that differ; with ``--check`` only name them, and return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.figures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    made = blocks.figures()
    texts = {path: page.written(path.read_text(), made, path.name) for path in page.pages()} | blocks.files()
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if picture.drawn_from(picture.PATH) != picture.digest():
        print(f"{picture.PATH.relative_to(page.ROOT)}: {'differs from the rows' if args.check else 'drawn'}")
        if args.check:
            return 1
        picture.draw()
    for path in changed:
        print(f"{path.relative_to(page.ROOT)}: {'differs from the rows' if args.check else 'written'}")
        if not args.check:
            path.write_text(texts[path])
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
