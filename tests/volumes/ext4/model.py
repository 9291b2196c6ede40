"""Random changes of a file system, and what it must hold after them."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING

from obdlab.convert.compare.listing import list_volume
from obdlab.volumes.ext4.layout import Inode
from obdlab.volumes.ext4.volume import Volume

if TYPE_CHECKING:
    import random

    from obdlab.blob import Blob
    from obdlab.volumes.ext4.editor import Editor

FILE = Inode(mode=0o100644)
FOLDER = Inode(mode=0o40755, links=2)


def file_of(editor: Editor, content: bytes) -> Inode:
    """Return the inode of a file with this content, which is written."""
    return editor.with_content(FILE, len(content), [(0, content)])


def model_of(disk: Blob) -> dict[bytes, str]:
    """Return each path with its content's digest, "" for a directory, a link's text; without the root."""
    return {
        os.fsencode(path): "" if stat.S_ISDIR(entry.mode) else f"{entry.sha256}{entry.target}{entry.rdev}"
        for path, entry in list_volume(Volume(disk)).items()
        if path != "."
    }


def change(draw: random.Random, editor: Editor, model: dict[bytes, str]) -> None:
    """Add or remove something, in ``model`` as well."""
    folders = [b"", *(name for name, digest in model.items() if not digest)]
    if model and draw.random() < 0.3:
        victim = draw.choice(list(model))
        above, _, name = victim.rpartition(b"/")
        editor.remove(editor.lookup(above) or 0, name)
        for known in [known for known in model if known == victim or known.startswith(victim + b"/")]:
            del model[known]
        return
    above = draw.choice(folders)
    parent = editor.lookup(above) or 0
    for _ in range(draw.choice([1, 1, 1, 40])):
        name = b"n" * draw.randint(1, 255) + b"%d" % draw.randint(0, 99)
        if len(name) > 255 or name in editor.entries(parent):
            continue
        full = above + b"/" + name if above else name
        if draw.random() < 0.3:
            editor.add(parent, name, FOLDER)
            model[full] = ""
        else:
            content = bytes([draw.randint(0, 255)]) * draw.choice([0, 1, 4096, 9000, 70_000])
            editor.add(parent, name, file_of(editor, content))
            model[full] = f"{hashlib.sha256(content).hexdigest()}None"
