"""The first file system of the virtual machine: busybox, the modules that reach the host's files, and an init."""

from __future__ import annotations

import lzma
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from tests.vm.kernel import VmError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.vm.kernel import Kernel

# What is needed to mount the host's files; everything else is loaded from there by modprobe.
_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
_DIRECTORIES = ("bin", "dev", "proc", "sys", "host", "memory", "root", "modules")
_INIT = Path(__file__).with_name("init.sh")


def build_initramfs(kernel: Kernel) -> bytes:
    """Return the archive (cpio "newc", as the kernel unpacks it). Raises VmError if busybox is missing."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise VmError("busybox: not installed (Debian package busybox-static)")
    content = Path(busybox).read_bytes()
    if b"/ld-linux" in content[:4096]:
        raise VmError(f"{busybox}: not static (Debian package busybox-static)")
    archive = _Archive()
    for name in _DIRECTORIES:
        archive.add(name, b"", stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", content, stat.S_IFREG | 0o755)
    archive.add("init", _INIT.read_bytes(), stat.S_IFREG | 0o755)
    for number, path in enumerate(_modules_in_order(kernel)):
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        name = path.name.removesuffix(".xz")
        archive.add(f"modules/{number:02}-{name}", data, stat.S_IFREG | 0o644)
    return archive.finish()


# A line of modules.dep is "module: what it needs, the first needed last". What is built in has no line.
def _modules_in_order(kernel: Kernel) -> list[Path]:
    needs = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[_module_name(path)] = [*reversed(others.split()), path]
    built_in = {_module_name(line) for line in (kernel.modules / "modules.builtin").read_text().splitlines()}
    ordered: dict[str, None] = {}
    for name in _MODULES:
        if name not in needs and name not in built_in:
            raise VmError(f"kernel {kernel.release} has no module {name}")
        ordered.update(dict.fromkeys(needs.get(name, ())))
    return [kernel.modules / path for path in ordered]


def _module_name(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")


class _Archive:
    # cpio(5), "New ASCII Format": 13 numbers of 8 hexadecimal digits, name and data each padded to 4 bytes.
    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, name: str, data: bytes, mode: int) -> None:
        self._count += 1
        encoded = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        numbers = (self._count, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08x" % number for number in numbers)
        self._parts += self._padded(header + encoded)
        self._parts += self._padded(data)

    def finish(self) -> bytes:
        self.add("TRAILER!!!", b"", 0)
        return b"".join(self._parts)

    @staticmethod
    def _padded(data: bytes) -> Iterator[bytes]:
        yield data
        yield bytes(-len(data) % 4)
