"""``obdlab image ls``: the files of an image, without mounting it."""

from __future__ import annotations

import stat
import time
from typing import TYPE_CHECKING, Any

from obdlab.cli.image.viewing import PATH_HELP, add_view_options, image_path, opened_tree, shown
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.volumes.tree import Walk

if TYPE_CHECKING:
    import argparse

    from obdlab.volumes.detect import FileInode, FileTree


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = "List files of an overlaybd image (ext4, or EROFS that is not compressed). Needs no root."
    parser.add_argument("path", type=image_path, metavar="IMAGE:/PATH", help=PATH_HELP)
    parser.add_argument("-l", "--long", action="store_true", help="mode, owner, size and time too")
    parser.add_argument("-R", "--recursive", action="store_true", help="all that is below, by path")
    add_json_option(parser, "one JSON object a line, with extended attributes")
    add_view_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List."""
    image, path = args.path
    with opened_tree(image, args) as tree:
        number = tree.find(path, follow=path.endswith(b"/"))
        if not tree.inode(number).is_directory:
            _print(tree, number, path.rsplit(b"/", 1)[-1], args)
            return 0
        bounds = Walk(tree.name)
        bounds.enter(number, b"")
        pending = list(reversed(tree.entries(number).items()))
        while pending:
            name, child = pending.pop()
            _print(tree, child, name, args)
            if args.recursive and tree.inode(child).is_directory:
                bounds.enter(child, name)
                entries = tree.entries(child)
                bounds.count(name, entries)
                pending += [(name + b"/" + inner, number) for inner, number in reversed(entries.items())]
    return 0


def _print(tree: FileTree, number: int, name: bytes, args: argparse.Namespace) -> None:
    inode = tree.inode(number)
    target = tree.readlink(number) if stat.S_ISLNK(inode.mode) else b""
    if args.json:
        print_json(_values(tree, number, inode, name, target))
    elif args.long:
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(inode.mtime_ns // 10**9))
        device = stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode)
        size = "{}, {}".format(*inode.rdev) if device else str(inode.size)
        arrow = f" -> {shown(target)}" if target else ""
        owner = f"{inode.uid:>5} {inode.gid:>5}"
        print(f"{stat.filemode(inode.mode)} {inode.links:>3} {owner} {size:>10} {when} {shown(name)}{arrow}")
    else:
        print(shown(name))


def _values(tree: FileTree, number: int, inode: FileInode, name: bytes, target: bytes) -> dict[str, Any]:
    values: dict[str, Any] = {"name": name.decode(errors="surrogateescape"), "mode": oct(inode.mode)}
    values |= {"uid": inode.uid, "gid": inode.gid, "size": inode.size, "mtime_ns": inode.mtime_ns}
    values |= {"inode": number, "links": inode.links}
    if target:
        values["target"] = target.decode(errors="surrogateescape")
    xattrs = {key.decode(errors="surrogateescape"): value.hex() for key, value in tree.xattrs(number)}
    return values | ({"xattrs": xattrs} if xattrs else {})
