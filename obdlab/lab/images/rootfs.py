"""Unpacking an image's layers over each other into a tree, with whiteouts applied."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from obdlab.lab.images.layertar import OPAQUE_WHITEOUT, WHITEOUT_PREFIX
from obdlab.lab.testbed.process import LabError, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from obdlab.lab.images.ocilayout import OciLayout

_LAYER_TIMEOUT_S = 900.0


def unpack_image(image: OciLayout, tree: Path) -> None:
    """Unpack all layers of one of the lab's images into the new directory ``tree``. Needs root; raises LabError."""
    tree.mkdir(parents=True)
    tree.chmod(0o755)
    for layer in image.manifest.layers:
        blob = image.blob_path(layer.digest)
        for hidden in _hidden(blob, tree):
            if hidden.is_dir() and not hidden.is_symlink():
                shutil.rmtree(hidden)
            else:
                hidden.unlink(missing_ok=True)
        # GNU tar keeps owners by number, hard links and extended attributes (file capabilities).
        options = ["--numeric-owner", "-p", "--xattrs", "--xattrs-include=*", "--exclude=.wh.*", "-C", str(tree)]
        run(["tar", *options, "-xzf", blob], timeout_s=_LAYER_TIMEOUT_S)


# The paths that a layer's whiteouts remove from the layers below.
def _hidden(blob: Path, tree: Path) -> Iterator[Path]:
    with tarfile.open(blob, "r|gz") as tar:
        for entry in tar:
            path = PurePosixPath(entry.name)
            if not path.name.startswith(WHITEOUT_PREFIX):
                continue
            if ".." in path.parts or path.is_absolute():
                raise LabError(f"{blob}: {entry.name!r} leads out of the image")
            directory = tree / path.parent
            if not directory.resolve().is_relative_to(tree.resolve()):
                raise LabError(f"{blob}: {entry.name!r} leads out of the image by a link")
            if path.name == OPAQUE_WHITEOUT:
                yield from list(directory.iterdir()) if directory.is_dir() else []
            else:
                yield directory / path.name.removeprefix(WHITEOUT_PREFIX)
