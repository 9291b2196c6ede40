"""Images as one file: downloaded whole and mounted by the kernel, with an overlay for the container's writes.

No daemon, no snapshotter, no unpacking: the lower bound for the cost of a full download.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from obdlab.formats import oci
from obdlab.lab.baselines.adapter import Adapter, first_line
from obdlab.lab.images.ocilayout import OciLayout, push_layout
from obdlab.lab.images.rootfs import unpack_image
from obdlab.lab.testbed.process import run
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.system import mount

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.lab.baselines.adapter import Source
    from obdlab.lab.images.recipe import Probe
    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.lab.testbed.startedcontainer import RunningContainer

_CHUNK = 1 << 20
_MOST_CONFIG = 4 << 20
_MAKE_TIMEOUT_S = 1800.0
_TYPE = "application/vnd.obdlab.image-file"


class Erofs(Adapter):
    """A compressed EROFS image, mounted from its file without a loop device."""

    name: ClassVar[str] = "erofs"
    title: ClassVar[str] = "one EROFS file, downloaded whole"
    registry_share: ClassVar[float] = 1.3
    host_share: ClassVar[float] = 1.3
    start_share: ClassVar[float] = 1.3
    programs: ClassVar[dict[str, str]] = {"mkfs.erofs": "erofs-utils"}

    def tag(self, source: Source) -> str:
        """Return the tag of the image with the file."""
        return f"{source.identity}-{self.name}1"

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Make one file of all layers together and push it as an image with that one blob."""
        image = OciLayout(source.layout)
        with tempfile.TemporaryDirectory(dir=source.layout.parent, prefix="file-") as directory:
            tree, file, made = (
                Path(directory, "tree"),
                Path(directory, "file"),
                OciLayout.create(Path(directory, "layout")),
            )
            unpack_image(image, tree)
            self.make(tree, file)
            with file.open("rb") as stream:
                digest = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
            config = made.add_document(oci.OCI_CONFIG, image.blob_path(image.manifest.config.digest).read_bytes())
            blob = oci.Descriptor(_TYPE, digest, file.stat().st_size)
            file.rename(made.blob_path(digest))
            made.finish(config, [blob], source.recipe.name, host_platform())
            push_layout(made.root, client, Reference.parse(reference))

    def make(self, tree: Path, file: Path) -> None:
        """Make the image file of a tree."""
        run(["mkfs.erofs", "--quiet", "-zlz4hc", "-T0", file, tree], timeout_s=_MAKE_TIMEOUT_S)

    def pull(self, host: OwnContainerd, reference: str) -> None:
        """Download the file and mount it."""
        place = self._place(host, reference)
        (place / "lower").mkdir(parents=True)
        with closing(RegistryClient()) as client:
            parsed = Reference.parse(reference)
            manifest = oci.Manifest.parse(client.get_manifest(parsed).data)
            repository, (blob,) = client.repository(parsed), manifest.layers
            config = client.read_blob(repository, manifest.config.digest, manifest.config.size, _MOST_CONFIG)
            (place / "config").write_bytes(config)
            with (
                (place / "file").open("wb") as target,
                client.stream_blob(repository, blob.digest, blob.size) as data,
            ):
                shutil.copyfileobj(data, target, _CHUNK)
        self.mount(place / "file", place / "lower")

    def mount(self, file: Path, target: Path) -> None:
        """Mount the image file read-only."""
        mount.mount(file, target, read_only=True, fs_type="erofs")

    @contextmanager
    def running(self, host: OwnContainerd, reference: str, name: str, probe: Probe) -> Iterator[RunningContainer]:
        """Run a container on an overlay over the mounted file."""
        place = self._place(host, reference)
        with running_on(host, place, (place / "config").read_bytes(), name, probe) as container:
            yield container

    def remove(self, host: OwnContainerd, reference: str) -> None:
        """Unmount the file and delete it."""
        place = self._place(host, reference)
        mount.unmount(place / "lower")
        shutil.rmtree(place, ignore_errors=True)

    def layers(self, host: OwnContainerd) -> Path:
        """Return the directory of downloaded files."""
        return host.files_dir

    def versions(self) -> dict[str, str]:
        """Return the version of mkfs.erofs."""
        return {"mkfs.erofs": first_line("mkfs.erofs", "-V")}

    def _place(self, host: OwnContainerd, reference: str) -> Path:
        return host.files_dir / oci.digest_of(reference.encode()).removeprefix("sha256:")[:16]


class PlainLoop(Erofs):
    """An uncompressed ext4 image on a loop device: the plain block path."""

    name: ClassVar[str] = "loop"
    title: ClassVar[str] = "one ext4 file, downloaded whole"
    registry_share: ClassVar[float] = 3.0
    host_share: ClassVar[float] = 3.0
    start_share: ClassVar[float] = 3.0
    programs: ClassVar[dict[str, str]] = {"mkfs.ext4": "e2fsprogs"}

    def make(self, tree: Path, file: Path) -> None:
        """Make the smallest ext4 file system that holds the tree."""
        used = sum(-(-path.lstat().st_size // 4096) * 4096 + 4096 for path in tree.rglob("*"))
        blocks = (used + used // 8) // 4096 + 4096
        run(["mkfs.ext4", "-q", "-O", "^has_journal", "-m0", "-b4096", "-d", tree, file, str(blocks)],
            timeout_s=_MAKE_TIMEOUT_S)  # fmt: skip
        run(["resize2fs", "-M", file], timeout_s=_MAKE_TIMEOUT_S)

    def mount(self, file: Path, target: Path) -> None:
        """Mount the image by a loop device, which the kernel removes with the mount."""
        run(["mount", "-t", "ext4", "-o", "ro,loop", file, target])

    def versions(self) -> dict[str, str]:
        """Return the version of mkfs.ext4."""
        return {"mkfs.ext4": first_line("mkfs.ext4", "-V")}


@contextmanager
def running_on(
    host: OwnContainerd, place: Path, config_data: bytes, name: str, probe: Probe
) -> Iterator[RunningContainer]:
    """Run a container on an overlay over ``place/lower`` with the image configuration ``config_data``."""
    requested_s = time.time()
    root = place / name
    for part in ("root", "upper", "work"):
        (root / part).mkdir(parents=True)
    options = f"lowerdir={place}/lower,upperdir={root}/upper,workdir={root}/work"
    run(["mount", "-t", "overlay", "overlay", "-o", options, root / "root"])
    try:
        config = oci.Config.parse(config_data).document["config"]
        words = [*_options(config), "--rootfs", str(root / "root"), name]
        command = probe.command or (*config.get("Entrypoint", ()), *config.get("Cmd", ()))
        container = host.start_with(words, command, name, probe, f"a container on {place}/lower", requested_s)
        try:
            yield container
        finally:
            container.remove()
    finally:
        mount.unmount(root / "root")
        shutil.rmtree(root)


def _options(config: dict[str, Any]) -> list[str]:
    # containerd takes these options from an image's configuration by itself.
    words = [word for variable in config.get("Env", ()) for word in ("--env", variable)]
    words += ["--cwd", config.get("WorkingDir") or "/"]
    return words + (["--user", config["User"]] if config.get("User") else [])
