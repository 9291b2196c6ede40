"""Layers that try everything containerd accepts, and random ones."""

from __future__ import annotations

import random
import tarfile
from typing import TYPE_CHECKING

from tests.convert.layouts import Member, directory, hardlink, member, symlink

if TYPE_CHECKING:
    from collections.abc import Callable

# Linux capability set v2 with CAP_NET_BIND_SERVICE; holds NULs.
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
# user::rwx, user:7:r-x, group::r-x, mask::r-x, other::r-x
ACL = bytes.fromhex("02000000 01000700ffffffff 0200050007000000 04000500ffffffff 10000500ffffffff 20000500ffffffff")


def base() -> list[Member]:
    return [
        directory("./", mode=0o700, uid=7),
        directory("etc/", mode=0o755, xattrs={"user.dir": b"1", "trusted.t": b"\xff\x00"}),
        member("etc/passwd", b"root:x:0:0\n", xattrs={"user.a": b"1"}),
        member("etc/setuid", b"#!", mode=0o4755, uid=12, gid=34),
        member("etc/cap", b"\x7fELF", mode=0o755, uid=1000, xattrs={"security.capability": CAPABILITY}),
        directory("usr/"),
        directory("usr/bin/", mode=0o2775, gid=50),
        directory("usr/lib/", mode=0o750, uid=3),
        symlink("bin", "usr/bin", uid=5),
        symlink("lib", "/usr/lib"),
        symlink("loop", "loop"),
        symlink("nowhere", "../../../outside//./x/"),
        member("usr/bin/tool", b"tool" * 5000),
        hardlink("usr/bin/tool2", "usr/bin/tool"),
        hardlink("usr/bin/tool3", "/usr/bin/tool2"),
        hardlink("bin-again", "bin"),
        member("bin/via-link", b"through this layer's own link"),
        symlink("link-attributes", "x", xattrs={"user.x": b"1", "security.foo": b"1"}),
        member("fifo-attributes", kind=tarfile.FIFOTYPE, xattrs={"user.x": b"1"}),
        member("acl", xattrs={"system.posix_acl_access": ACL, "security.selinux": b"a:b:c\0", "nonsense": b"1"}),
        directory("dev/"),
        member("dev/null", kind=tarfile.CHRTYPE, mode=0o666, rdev=(1, 3)),
        member("dev/disk", kind=tarfile.BLKTYPE, mode=0o660, gid=6, rdev=(259, 1048575)),
        member("dev/pipe", kind=tarfile.FIFOTYPE, mode=0o620),
        directory("gone/"),
        directory("gone/deep/"),
        member("gone/deep/file", b"1"),
        directory("opaque/", mode=0o711),
        member("opaque/old", b"1"),
        directory("opaque/kept/", mode=0o700),
        member("opaque/kept/old", b"1"),
        directory("merged/", mode=0o711, xattrs={"user.x": b"1", "user.y": b"2"}),
        member("merged/old", b"1"),
        directory("again/"),
        member("again/old", b"1"),
        directory("to-file/"),
        member("to-file/x", b"1"),
        member("to-dir", b"1"),
        member("n" * 255, b"long name"),
        member("/".join(["d" * 100] * 8) + "/leaf", b"long path"),
        symlink("long-link", "t/" * 400 + "end"),
        member("caf\udce9 raw \udcff", b"name that is not UTF-8"),
        member("unicode-ü-名", b"x", uid=1 << 31, gid=(1 << 32) - 2),
        member("huge-ids", b"x", uid=4000000, gid=4000001),
        member("exact", b"x", pax={"mtime": "1700000001.123456789", "atime": "1600000000.5"}),
        member("before-1970", b"x", pax={"mtime": "-7.5"}),
        member("far-future", b"x", pax={"mtime": "3000000000.25"}),
        member("twice", b"first"),
        member("twice", b"second, longer"),
        member("empty", b""),
        member("without/any/parents/file", b"x"),
        member("dotted/./../dotted//file", b"x"),
        member("/absolute/file", b"x"),
    ]


def middle() -> list[Member]:
    return [
        member(".wh.gone"),
        directory("opaque/", mode=0o755),
        member("opaque/before", b"2"),
        member("opaque/.wh..wh..opq"),
        member("opaque/after", b"2"),
        member("opaque/kept/new", b"2"),
        directory("merged/", mode=0o755, xattrs={"user.x": b"3"}),
        member("merged/new", b"2"),
        member(".wh.again"),
        directory("again/"),
        member("again/new", b"2"),
        member("to-file", b"2", mode=0o600),
        directory("to-dir/"),
        member("to-dir/x", b"2"),
        member("usr/bin/tool", b"changed"),
        member("lib/libz", b"the link of the layer below becomes a directory"),
        member("etc/passwd", b"other\n", uid=9),
        member("etc/.wh.nonexistent"),
        member("new-dir-for/.wh.nothing"),
        directory("etc/"),
        directory("own/", uid=70000, gid=80000),
        symlink("own/link", "target"),
        member("own/target/file", b"parent is made implicitly"),
        member("own/link/second", b"through the link"),
        symlink("own/up", "../../../own/./target/../other"),
        member("own/up/third", b"leaves by .., clamped at the root"),
        member("dev/.wh.null"),
        member("dev/disk", kind=tarfile.CHRTYPE, rdev=(0, 0)),
    ]


def top() -> list[Member]:
    return [
        member("usr/bin/.wh.tool2"),
        member("usr/bin/fresh", b"x"),
        hardlink("usr/bin/fresher", "usr/bin/fresh"),
        directory("merged/.wh.old"),
        symlink("to-dir", "to-file"),
        directory("gone/", mode=0o1777),
        member("gone/reborn", b"3"),
        member("own/.wh..wh..opq"),
        member("etc/cap", b"\x7fELF", mode=0o755),
    ]


def whole_image() -> list[list[Member]]:
    """Four layers, one of them without any member."""
    return [base(), middle(), [], top()]


class RandomImage:
    """Layers drawn from a small world of names, so that they meet each other's traces."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._count = 0

    def layers(self) -> list[list[Member]]:
        return [self._layer(first=number == 0) for number in range(self._random.randint(2, 4))]

    def _layer(self, *, first: bool) -> list[Member]:
        # A name is written once in a layer; what comes below a non-directory is left out (containerd refuses it).
        kinds: dict[str, str] = {}
        members: list[Member] = []
        for _ in range(self._random.randint(3, 14)):
            name = "/".join(self._random.choice("abc") for _ in range(self._random.randint(1, 3)))
            parents = [name[:i] for i, c in enumerate(name) if c == "/"]
            if name in kinds or any(kinds.get(parent, "dir") != "dir" for parent in parents):
                continue
            drawn = self._random.choice(self._makers(kinds, first=first))
            made, kind = drawn(name, kinds)
            # Mostly with their parents, as real layers have them: containerd fails to look up missing ones below a
            # file of another layer.
            if self._random.random() < 0.8:
                members += [self._directory(parent, kinds)[0] for parent in parents if parent not in kinds]
            kinds.update(dict.fromkeys(parents, "dir"))
            kinds[name] = kind
            members.append(made)
        return members

    def _makers(
        self, kinds: dict[str, str], *, first: bool
    ) -> list[Callable[[str, dict[str, str]], tuple[Member, str]]]:
        makers: list[Callable[[str, dict[str, str]], tuple[Member, str]]] = [
            self._file, self._file, self._directory, self._directory, self._symlink, self._fifo,
        ]  # fmt: skip
        if not first:
            makers += [self._whiteout, self._whiteout, self._opaque]
        if any(kind == "file" for kind in kinds.values()):
            makers.append(self._hardlink)
        return makers

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _file(self, name: str, kinds: dict[str, str]) -> tuple[Member, str]:
        data = f"content {self._next()}".encode() * self._random.choice((0, 1, 1000))
        mode = self._random.choice((0o644, 0o4755, 0o600))
        return member(name, data, mode=mode, uid=self._random.choice((0, 1000))), "file"

    def _directory(self, name: str, kinds: dict[str, str]) -> tuple[Member, str]:
        xattrs = {"user.n": str(self._next()).encode()} if self._random.random() < 0.3 else None
        return directory(name, mode=self._random.choice((0o755, 0o1777, 0o700)), xattrs=xattrs), "dir"

    def _symlink(self, name: str, kinds: dict[str, str]) -> tuple[Member, str]:
        return symlink(name, self._random.choice(("a", "/b", "../c", "nothing"))), "link"

    def _fifo(self, name: str, kinds: dict[str, str]) -> tuple[Member, str]:
        return member(name, kind=tarfile.FIFOTYPE), "fifo"

    def _hardlink(self, name: str, kinds: dict[str, str]) -> tuple[Member, str]:
        target = self._random.choice(sorted(path for path, kind in kinds.items() if kind == "file"))
        return hardlink(name, target), "file"

    def _whiteout(self, name: str, kinds: dict[str, str]) -> tuple[Member, str]:
        parent, _, base_name = name.rpartition("/")
        return member(f"{parent}/.wh.{base_name}".lstrip("/")), "whiteout"

    def _opaque(self, name: str, kinds: dict[str, str]) -> tuple[Member, str]:
        return member(f"{name}/.wh..wh..opq"), "dir"
