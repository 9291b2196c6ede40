"""Build the image of a recipe: one overlay per layer, tar of each upper directory, an OCI layout.

The work directory keeps finished images by recipe and digest, base file systems, and apt's lists and archives, so
that a second build is quick and an experiment goes on with the image that it began with. An interrupted build leaves
only directories (``obdlab.lab.images.chroot``); the build itself or the next one removes them.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from obdlab.command import command
from obdlab.formats import oci
from obdlab.lab.images.basesystem import make_busybox, make_debian
from obdlab.lab.images.chroot import APT_DIRECTORY, Chroot
from obdlab.lab.images.layertar import LayerFile, settle_times, write_layer
from obdlab.lab.images.lock import (
    LOCK_NAME,
    check_lock,
    compare_lock,
    holds,
    installed_packages,
    read_lock,
    write_lock,
)
from obdlab.lab.images.ocilayout import OciLayout, fetch_layout
from obdlab.lab.images.recipe import BUILDER_VERSION, Recipe, RecipeLayer
from obdlab.lab.testbed.process import LabError, run
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.system.locks import lock_until, try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT_WORK_DIR = Path("/var/lib/obdlab/images")
_CREATED = "2020-07-15T00:00:00Z"
# A build waits this long for another one in the same work directory.
_LOCK_TIMEOUT_S = 1800.0

_APT_CONFIG = f"""\
Dir::State::lists "{APT_DIRECTORY}/lists";
Dir::Cache::archives "{APT_DIRECTORY}/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
APT::Sandbox::User "root";
APT::Keep-Downloaded-Packages "true";
Acquire::Languages "none";
Acquire::Retries "3";
Dpkg::Use-Pty "false";
Dpkg::Options {{ "--force-unsafe-io"; }};
"""


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image in the work directory: its OCI layout, its manifest's digest and its packages."""

    recipe: Recipe
    layout: Path
    digest: str
    packages: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe, layout: Path) -> Self:
        """Describe a finished layout. Raises FormatError, SourceError, LabError or OSError if it is damaged."""
        digest = OciLayout(layout).digest
        return cls(recipe, layout, digest, read_lock(layout / LOCK_NAME))

    @property
    def about(self) -> str:
        """One line with the digest and the comparison of the packages with the recipe's lock."""
        told = compare_lock(self.recipe.locked, self.packages)
        return ", ".join(filter(None, (oci.short_digest(self.digest), told)))

    def facts(self) -> dict[str, Any]:
        """Return the facts about the image that the rows' environment records."""
        return {
            "digest": self.digest,
            "recipe": self.recipe.fingerprint(),
            "packages": list(self.packages),
            "lock": compare_lock(self.recipe.locked, self.packages),
        }


def build_image(
    recipe: Recipe,
    work_dir: Path = DEFAULT_WORK_DIR,
    progress: Callable[[str], None] = lambda line: None,
    registry: RegistryClient | None = None,
    *,
    pin: str = "",
    locked: bool = False,
    newest: bool = False,
) -> BuiltImage:
    """Return an image of the recipe; build it from the archive's present packages if the work directory lacks one.

    An existing image is used without a request to the archive: the one whose digest is ``pin``, else the newest.
    ``locked`` accepts only an image with exactly the packages of the recipe's lock; ``newest`` builds in any case. An
    image that the recipe takes from a registry is fetched by ``registry`` (default: a client without credentials).
    ``progress`` gets a line per step. Building needs root. Raises LabError, FormatError or SourceError, and leaves
    nothing of a failed build behind.
    """
    if locked:
        _check_lockable(recipe)
    found = None if newest else find_image(recipe, work_dir, pin=pin, locked=locked)
    if found is None:  # finished images appear whole, so finding one needs no lock
        work_dir.mkdir(parents=True, exist_ok=True)
        with _locked(work_dir, progress):
            found = None if newest else find_image(recipe, work_dir, pin=pin, locked=locked)
            if found is None:
                return _build(recipe, work_dir, progress, registry, locked=locked, newest=newest)
    progress(f"{recipe.name}: built before: {found.about} ({found.layout})")
    return found


def find_image(
    recipe: Recipe, work_dir: Path = DEFAULT_WORK_DIR, *, pin: str = "", locked: bool = False
) -> BuiltImage | None:
    """Return the image that :func:`build_image` would use without building, or None."""
    found = list_images(recipe, work_dir)
    if locked:
        found = [image for image in found if image.packages == recipe.locked]
    return next((image for image in found if pin and image.digest == pin), found[0] if found else None)


def list_images(recipe: Recipe, work_dir: Path = DEFAULT_WORK_DIR) -> list[BuiltImage]:
    """Return every image of the recipe in the work directory, the newest first."""
    layouts = [layout for layout in work_dir.glob(f"{_stem(recipe)}-*") if (layout / "index.json").is_file()]
    return [BuiltImage.of(recipe, layout) for layout in sorted(layouts, key=_built_ns, reverse=True)]


def update_lock(recipe: Recipe, lock: Path, work_dir: Path, progress: Callable[[str], None]) -> BuiltImage:
    """Build the image from the archive's present packages, write these to ``lock`` and return the image.

    Raises the errors of :func:`build_image`, and LabError for an image from a registry (no packages to lock).
    """
    if recipe.image:
        raise LabError(f"{recipe.name}: an image of a registry has no packages to lock (name it by digest)")
    image = build_image(recipe, work_dir, progress, newest=True)
    write_lock(lock, image.packages)
    return replace(image, recipe=replace(recipe, locked=image.packages))


def _check_lockable(recipe: Recipe) -> None:
    if recipe.image and "@" not in recipe.image:
        raise LabError(f"{recipe.name}: --locked: wanted an image named by digest (got {recipe.image})")
    if not recipe.locked and any(layer.packages for layer in recipe.layers):
        update = command("lab", "dataset", "build", recipe.name, "--update-lock")
        raise LabError(f"{recipe.name}: --locked: the recipe has no {LOCK_NAME} (to make one: {update})")


# Callers hold the work directory's lock.
def _build(
    recipe: Recipe,
    work_dir: Path,
    progress: Callable[[str], None],
    registry: RegistryClient | None,
    *,
    locked: bool,
    newest: bool,
) -> BuiltImage:
    for leftover in work_dir.glob("building-*"):  # of a killed build
        shutil.rmtree(leftover)
    building = Path(tempfile.mkdtemp(prefix="building-", dir=work_dir))
    try:
        made = building / "layout"
        if recipe.image:
            _fetch(recipe, made, progress, registry)
        else:
            _Build(recipe, work_dir, building, progress, locked=locked, newest=newest).run()
        digest = OciLayout(made).digest
        layout = work_dir / f"{_stem(recipe)}-{oci.short_digest(digest).replace(':', '-')}"
        if layout.is_dir():  # an earlier build gave the same image
            (layout / "index.json").touch()
        else:
            made.rename(layout)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    image = BuiltImage.of(recipe, layout)
    progress(f"{recipe.name}: {image.about}")
    return image


def _stem(recipe: Recipe) -> str:
    return f"{recipe.name}-{recipe.fingerprint()}"


def _built_ns(layout: Path) -> int:
    return (layout / "index.json").stat().st_mtime_ns


def _fetch(recipe: Recipe, directory: Path, progress: Callable[[str], None], registry: RegistryClient | None) -> None:
    client = registry or RegistryClient()
    try:
        fetch_layout(client, Reference.parse(recipe.image), directory, recipe.name, progress)
    finally:
        if registry is None:
            client.close()


class _Build:
    # One build of an image. Threads pack finished layers (zlib releases the interpreter lock) during the next layer.

    def __init__(
        self,
        recipe: Recipe,
        work_dir: Path,
        building: Path,
        progress: Callable[[str], None],
        *,
        locked: bool,
        newest: bool,
    ) -> None:
        self._recipe = recipe
        self._work_dir = work_dir
        self._directory = building
        self._progress = progress
        self._locked = locked
        self._newest = newest
        self._layout = OciLayout.create(building / "layout")
        self._chroot = Chroot(building)
        self._began = time.monotonic()
        # File times come from a coarser clock, which may lag behind time.time().
        self._started_s = time.time() - 2
        self._lists_fresh = False

    def run(self) -> None:
        base = self._base()
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="pack") as packers:
            packed: list[Future[LayerFile]] = []
            lowers = ["base"]
            (self._directory / "base").symlink_to(base / "fs")
            for number, layer in enumerate(self._recipe.layers):
                upper = f"layer{number}"
                self._apply(layer, number, lowers, upper)
                packed.append(packers.submit(self._pack, upper))
                lowers.append(upper)
            packages = installed_packages(self._directory / lower for lower in reversed(lowers))
            if self._locked:
                check_lock(self._recipe.name, self._recipe.locked, packages)
            files = [self._base_file(base), *(future.result() for future in packed)]
        write_lock(self._layout.root / LOCK_NAME, packages)
        self._finish(files)
        total = sum(file.size for file in files)
        self._progress(
            f"{self._recipe.name}: {len(files)} layers, {total / 1e6:.1f} MB compressed, "
            f"{time.monotonic() - self._began:.0f} s"
        )

    def _base(self) -> Path:
        # All recipes share the packed base and its tree, so that every image has the same base layer, bit for bit.
        name = f"base-{self._recipe.base}" + (f"-{self._recipe.suite}" if self._recipe.base == "debian" else "")
        base = self._work_dir / f"{name}-{BUILDER_VERSION}"
        if not self._keeps(base):
            began = time.time()
            self._progress(f"{name}: making the base file system")
            made = self._directory / "newbase"
            (made / "fs").mkdir(parents=True)
            if self._recipe.base == "debian":
                make_debian(made / "fs", self._recipe.suite)
            else:
                make_busybox(made / "fs", self._directory / "busybox")
            settle_times(made / "fs", self._started_s)
            file = write_layer(made / "fs", made / "layer.tar.gz", self._started_s)
            (made / "digests").write_text(f"{file.digest} {file.size} {file.diff_id}")
            if base.is_dir():  # finished images have their own copy of the layer
                base.rename(self._directory / "oldbase")
            made.rename(base)
            self._progress(f"{name}: {file.size / 1e6:.1f} MB compressed, {time.time() - began:.1f} s")
        if self._recipe.base == "debian":
            self._prepare_apt()
        return base

    # A base is made again for the archive's present packages, or if it has others than the lock.
    def _keeps(self, base: Path) -> bool:
        if self._newest or not base.is_dir():
            return False
        return not self._locked or holds(self._recipe.locked, installed_packages([base / "fs"]))

    def _prepare_apt(self) -> None:
        apt = self._work_dir / f"apt-{self._recipe.suite}"
        for name in ("lists/partial", "archives/partial"):
            (apt / name).mkdir(parents=True, exist_ok=True)
        # apt inside the image uses the host's settings for reaching archives (proxies, checks).
        acquire = run(["apt-config", "dump", "Acquire"]) if shutil.which("apt-config") else ""
        (apt / "apt.conf").write_text(acquire + _APT_CONFIG)
        (self._directory / "apt").symlink_to(apt)

    def _base_file(self, base: Path) -> LayerFile:
        digest, size, diff_id = (base / "digests").read_text().split()
        shutil.copyfile(base / "layer.tar.gz", self._layout.blob_path(digest))
        return LayerFile(digest, int(size), diff_id)

    def _apply(self, layer: RecipeLayer, number: int, lowers: list[str], upper: str) -> None:
        began = time.time()
        refresh = bool(layer.packages) and not self._lists_fresh
        self._chroot.run_layer(layer, lowers, upper, refresh_lists=refresh)
        self._lists_fresh |= refresh
        shutil.rmtree(self._directory / "work")
        shutil.rmtree(self._directory / "stage")
        what = layer.comment or ", ".join(layer.packages) or "files and commands"
        count = len(self._recipe.layers)
        self._progress(f"{self._recipe.name}: layer {number + 1}/{count}: {what} ({time.time() - began:.1f} s)")

    def _pack(self, upper: str) -> LayerFile:
        target = self._directory / f"{upper}.tar.gz"
        file = write_layer(self._directory / upper, target, self._started_s)
        target.rename(self._layout.blob_path(file.digest))
        return file

    def _finish(self, files: list[LayerFile]) -> None:
        layers = [oci.Descriptor(oci.OCI_LAYER_GZIP, file.digest, file.size) for file in files]
        config = self._layout.add_document(oci.OCI_CONFIG, oci.to_json(_config_document(self._recipe, files)))
        self._layout.finish(config, layers, self._recipe.name, host_platform())


def _config_document(recipe: Recipe, files: list[LayerFile]) -> dict[str, Any]:
    config = recipe.config
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    settings: dict[str, Any] = {
        "Env": [path, *(f"{key}={value}" for key, value in config.environment)],
        "WorkingDir": config.working_directory,
    }
    for key, value in (("Entrypoint", config.entrypoint), ("Cmd", config.command)):
        if value:
            settings[key] = list(value)
    if config.user:
        settings["User"] = config.user
    if config.ports:
        settings["ExposedPorts"] = {port: {} for port in config.ports}
    comments = [f"base: {recipe.base}", *(layer.comment for layer in recipe.layers)]
    return {
        "created": _CREATED,
        "architecture": host_platform().architecture,
        "os": "linux",
        "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [file.diff_id for file in files]},
        "history": [{"created": _CREATED, "created_by": comment} for comment in comments],
    }


@contextmanager
def _locked(work_dir: Path, progress: Callable[[str], None]) -> Iterator[None]:
    with (work_dir / "lock").open("a") as lock:
        if not try_lock(lock.fileno()):
            progress(f"waiting for another build in {work_dir}")
            if not lock_until(lock.fileno(), time.monotonic() + _LOCK_TIMEOUT_S, longest_pause_s=0.2):
                raise LabError(f"{work_dir}: locked by another build for {_LOCK_TIMEOUT_S:g} s")
        yield
