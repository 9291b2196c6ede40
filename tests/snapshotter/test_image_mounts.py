"""How images are mounted, for containers and beside the host's own files: real containers, hostile file systems."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.formats import oci
from obdlab.snapshotter.writable import LABEL_WRITABLE
from tests.containerd_host import NAME, ObdlabHost
from tests.registry.server import RegistryServer, registry_server
from tests.snapshotter import imagefiles
from tests.snapshotter.test_lazy_images import device_mounts, host, run

__all__ = ["host", "registry_server"]

pytestmark = pytest.mark.containerd


@pytest.fixture
def setuid_image(registry_server: RegistryServer) -> str:
    """An image with a shell and a ``su`` that belongs to root, converted."""
    layer = imagefiles.LayerTar()
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
        layer.directory(name)
    layer.add("bin/busybox", imagefiles.busybox_bytes(), mode=0o755)
    layer.add("bin/su", imagefiles.busybox_bytes(), mode=0o4755)
    for applet in ("sh", "id", "cat"):
        layer.add(f"bin/{applet}", kind=tarfile.SYMTYPE, linkname="busybox", mode=0o777)
    layer.add("etc/passwd", b"root::0:0:root:/:/bin/sh\nuser:x:1000:1000:user:/:/bin/sh\n")
    layer.add("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
    plain = imagefiles.push(registry_server.host, "snapshotter/setuid", *imagefiles.image_documents([layer.bytes()]))
    converted = f"{plain}_obd"
    assert main(["image", "convert", plain, converted]) == 0
    return converted


@pytest.mark.parametrize("mode", ["", "dir", "dev"])
def test_su_works_in_a_container(host: ObdlabHost, setuid_image: str, mode: str) -> None:
    """The image's own mount is nosuid and nodev; the root file system that the container gets is neither."""
    host.rpull(setuid_image)
    label = ("--snapshotter-label", f"{LABEL_WRITABLE}={mode}") if mode else ()
    options = ("run", "--rm", "--snapshotter", NAME, *label, "--user", "1000", "--allow-new-privs")
    script = "id -u; /bin/su -c 'id -u' root; cat /null && echo device"
    printed = host.ctr(*options, setuid_image, "suid", "/bin/sh", "-c", script)
    assert printed.split() == ["1000", "0", "device"]


def test_an_image_that_is_mounted_on_the_host(host: ObdlabHost, setuid_image: str, tmp_path: Path) -> None:
    host.rpull(setuid_image)
    target = tmp_path / "view"
    target.mkdir()
    host.ctr("images", "mount", "--snapshotter", NAME, setuid_image, str(target))
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        flags = {fields[4]: set(fields[5].split(",")) for fields in map(str.split, lines)}
        (lower,) = device_mounts(host)
        assert flags[str(lower)] >= {"ro", "nosuid", "nodev"}
        # It may be a container's root file system: containerd's clients set the flags that they were given.
        assert flags[str(target)] & {"ro", "nosuid", "nodev"} == {"ro"}
    finally:
        host.ctr("images", "unmount", "--rm", "--snapshotter", NAME, str(target))


def test_a_hostile_superblock_starts_no_container(
    host: ObdlabHost, registry_server: RegistryServer, tmp_path: Path
) -> None:
    disk, layer = tmp_path / "disk", tmp_path / "layer"
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True, timeout=60)
    subprocess.run(["tune2fs", "-E", "mount_opts=errors=panic", disk], check=True, timeout=60)
    assert main(["layer", "import", str(disk), str(layer)]) == 0
    data = layer.read_bytes()
    annotations = [{oci.BLOB_DIGEST: oci.digest_of(data), oci.BLOB_SIZE: str(len(data))}]
    documents = imagefiles.image_documents([data], annotations, compress=False)
    image = imagefiles.push(registry_server.host, "snapshotter/panic", *documents)
    host.rpull(image)
    for mode in ("", "dir", "dev"):
        options = ("--rm", *(("--snapshotter-label", f"{LABEL_WRITABLE}={mode}") if mode else ()))
        assert "mount options 'errors=panic' in the superblock" in run(
            host, image, "never", "true", *options, check=False
        )
    assert host.snapshotter.devices.list() == []
