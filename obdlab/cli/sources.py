"""The images that commands read: in registries and stores, as configurations, and as local layer files."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_registry_options, registry_from, settings_from
from obdlab.errors import DeviceError, ObdlabError, SourceError
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.blob import Blob
    from obdlab.convert.endpoints.endpoint import ImageSource
    from obdlab.formats.oci import Platform
    from obdlab.image.config import ImageConfig, LowerConfig
    from obdlab.layers.stack import Stack
    from obdlab.server.client import DeviceService
    from obdlab.settings.settings import Settings

SOURCE_HELP = (
    "image: HOST/NAME:TAG, oci:DIR[:TAG], oci-archive:FILE[:TAG] or containerd:[NAMESPACE:]NAME; or the path of a "
    "config.v1.json; or paths of local layers, bottom first (separate arguments or joined by commas)"
)
#: Below the run directory: configurations made for images that are given without one.
_IMAGES = "images"
_CONFIG = "config.v1.json"
#: Between two tries to reach a registry.
_PAUSE_S = 2.0
_CONTAINERD = "/run/containerd/containerd.sock"


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for access to images."""
    add_registry_options(parser)
    add_containerd_option(parser)


def add_containerd_option(parser: argparse._ActionsContainer) -> None:
    """Add the option for containerd's socket."""
    parser.add_argument(
        "--containerd",
        default=os.environ.get("CONTAINERD_ADDRESS", _CONTAINERD),
        metavar="SOCKET",
        help="of containerd:... (default: $CONTAINERD_ADDRESS or %(default)s)",
    )


def config_of(source: Sequence[str], args: argparse.Namespace) -> tuple[Path, str | None]:
    """Return the image configuration that ``source`` names, and a device id if it was made here.

    Layers in an archive or in containerd are copied beside the cache directory, until :func:`forget_config`. Raises
    DeviceError, ConfigError or the error of the registry or store.
    """
    from obdlab.server.rundir import RunDir

    names = _names(source)
    if _is_config(names):
        return Path(names[0]), None
    if _is_stored(source):
        with _opened_store(source[0], args) as image:
            digest = image.find(_platform(args), overlaybd=True)[0].digest
            device_id = f"image-{hashlib.sha256(f'{image.name}@{digest}'.encode()).hexdigest()[:16]}"
            config = _stored_config(image, args, _copies(settings_from(args), args.run_dir) / device_id)
    else:
        config, device_id = _named_config(names, args)
    run = RunDir(args.run_dir)
    run.create()
    directory = run.path / _IMAGES / device_id
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _CONFIG
    config.save(path)
    return path, device_id


# Also returns the device's id. Blobs of turboOCI layers are unpacked beside the cache directory, under the id.
def _named_config(names: Sequence[str], args: argparse.Namespace) -> tuple[ImageConfig, str]:
    copies = _copies(settings_from(args), args.run_dir)
    new = copies / f".new-{os.getpid()}"
    try:
        config = _made_config(names, args, new)
        text = json.dumps(config.to_json(), sort_keys=True).replace(str(new), "")
        device_id = f"image-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if new.exists():
            config = replace(config, lowers=tuple(_moved(lower, new, copies / device_id) for lower in config.lowers))
            with suppress(OSError):  # it is there already, with the same files
                new.rename(copies / device_id)
        return config, device_id
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _moved(lower: LowerConfig, before: Path, after: Path) -> LowerConfig:
    names = (lower.file, lower.gzip_index, lower.tar_sums)
    file, index, sums = (name.replace(str(before), str(after)) for name in names)
    return replace(lower, file=file, gzip_index=index, tar_sums=sums)


def made_config_path(run_dir: Path, device_id: str) -> Path:
    """Return the path of the configuration that :func:`config_of` makes for a device id."""
    return run_dir.absolute() / _IMAGES / device_id / _CONFIG


@contextmanager
def image_config(source: Sequence[str], args: argparse.Namespace) -> Iterator[ImageConfig]:
    """Give the image configuration that ``source`` names, for the block. Raises as :func:`config_of`.

    Layers in an archive or in containerd are copied to files below /var/tmp, which are removed at the end.
    """
    from obdlab.image.config import ImageConfig

    names = _names(source)
    if _is_config(names):
        yield ImageConfig.load(names[0])
        return
    if not _is_stored(source):
        with tempfile.TemporaryDirectory(prefix="obdlab-image-", dir="/var/tmp") as place:
            yield _made_config(names, args, Path(place))
        return
    with tempfile.TemporaryDirectory(prefix="obdlab-image-", dir="/var/tmp") as place:
        with _opened_store(source[0], args) as image:
            config = _stored_config(image, args, Path(place))
        yield config


@contextmanager
def opened_image(source: Sequence[str], args: argparse.Namespace) -> Iterator[Blob]:
    """Open the image that ``source`` names, with its writable layer, without fetching ahead. Copies no layers."""
    from obdlab.image.open import open_image

    if _is_stored(source):
        with opened_disk(source, args) as disk:
            yield disk
        return
    with image_config(source, args) as config:
        # Looking writes neither a trace nor the result file.
        config = replace(config, result_file="", record_trace_path="")
        with open_image(config, settings_from(args), traces=False) as opened:
            yield opened


@contextmanager
def opened_layers(source: Sequence[str], args: argparse.Namespace) -> Iterator[Stack]:
    """Open the disk that ``source`` names, its writable layer among its layers, all of them only for reading."""
    from obdlab.convert.endpoints.forms import names_image
    from obdlab.layerfiles.disks import open_disk

    if len(source) == 1 and names_image(source[0]):
        with opened_disk(source, args) as disk:
            yield disk
        return
    with open_disk(_names(source), partial(settings_from, args)) as disk:
        yield disk


def is_local(name: str) -> bool:
    """Return True if a name is that of a config.v1.json, or of layer files joined by commas."""
    names = _names([name])
    return bool(names) and all(Path(each).is_file() for each in names)


@contextmanager
def opened_disk(source: Sequence[str], args: argparse.Namespace) -> Iterator[Stack]:
    """Open the read-only layers of the image that ``source`` names, without fetching ahead. Copies no layers."""
    from obdlab.image.config import LowerConfig, UpperConfig
    from obdlab.image.open import Image, open_image

    if _is_stored(source):
        from obdlab.convert.endpoints.disks import stored_disk

        with _opened_store(source[0], args) as image, stored_disk(image, _platform(args)) as disk:
            yield disk
        return
    with image_config(source, args) as config:
        config = replace(config, upper=UpperConfig(), result_file="", record_trace_path="", trace=LowerConfig())
        with open_image(config, settings_from(args), traces=False) as opened:
            assert isinstance(opened, Image)  # it has no upper
            yield opened


def forget_config(service: DeviceService, config: Path) -> None:
    """Remove a configuration that :func:`config_of` made, with its copied layers, unless a device uses it."""
    directory = config.absolute().parent
    if directory.parent.resolve() != (service.run_dir.path / _IMAGES).resolve():
        return
    devices = service.list()
    attaching = len(service.run_dir.device_directories()) > len(devices)
    if attaching or any(each.config == config.absolute() for each in devices):
        return
    config.unlink(missing_ok=True)
    with suppress(OSError):  # missing, or holds other files
        directory.rmdir()
    shutil.rmtree(_copies(service.settings, service.run_dir.path) / directory.name, ignore_errors=True)


def remove_copies(settings: Settings, run_dir: Path) -> None:
    """Remove all layers that :func:`config_of` copied for devices of a run directory, which must be detached."""
    shutil.rmtree(_copies(settings, run_dir), ignore_errors=True)


# Beside the cache: layers may be larger than the run directory's file system, which is in memory. Two run directories
# may share a cache.
def _copies(settings: Settings, run_dir: Path) -> Path:
    name = hashlib.sha256(os.fsencode(run_dir.absolute())).hexdigest()[:8]
    return settings.cache_dir.with_name(f"{settings.cache_dir.name}-images") / name


def _names(source: Sequence[str]) -> list[str]:
    return [name for argument in source for name in argument.split(",") if name]


def is_config(name: str) -> bool:
    """Return True if a name is that of a file with a configuration, a config.v1.json."""
    return Path(name).is_file() and _is_json(Path(name))


def _is_config(names: Sequence[str]) -> bool:
    return len(names) == 1 and is_config(names[0])


# The transport alone decides it. _made_config() looks at names without one.
def _is_stored(source: Sequence[str]) -> bool:
    from obdlab.convert.endpoints.forms import in_registry

    return len(source) == 1 and not Path(source[0]).is_file() and not in_registry(source[0])


@contextmanager
def _opened_store(name: str, args: argparse.Namespace) -> Iterator[ImageSource]:
    from obdlab.convert.endpoints.names import open_source

    with (
        closing(registry_from(args)) as client,
        closing(open_source(name, client, containerd=args.containerd)) as image,
    ):
        yield image


def _stored_config(image: ImageSource, args: argparse.Namespace, place: Path) -> ImageConfig:
    from obdlab.cli.progressbar import Bars
    from obdlab.convert.endpoints.disks import config_of_files

    return config_of_files(image, _platform(args), place, Bars(quiet=getattr(args, "quiet", False)))


def _platform(args: argparse.Namespace) -> Platform:
    from obdlab.registry.platform import host_platform

    return getattr(args, "platform", None) or host_platform()


def _made_config(names: Sequence[str], args: argparse.Namespace, place: Path) -> ImageConfig:
    from obdlab.image.config import ImageConfig, LowerConfig

    paths = [Path(name) for name in names]
    if any(name.startswith(("/", "./", "../")) for name in names) or all(path.is_file() for path in paths):
        for path in paths:
            if not path.is_file():
                raise DeviceError(f"{path}: no such layer file")
        return ImageConfig(lowers=tuple(LowerConfig(file=str(path.resolve())) for path in paths))
    if len(names) == 1:
        return _config_from_registry(names[0], args, place)
    missing = ", ".join(str(path) for path in paths if not path.is_file())
    raise DeviceError(f"several sources must be layer files (no such file: {missing})")


def _config_from_registry(name: str, args: argparse.Namespace, place: Path) -> ImageConfig:
    from obdlab.image.from_manifest import fetch_config
    from obdlab.registry.platform import host_platform
    from obdlab.registry.reference import Reference

    client = registry_from(args)
    deadline = time.monotonic() + getattr(args, "timeout", 0.0)
    wanted = getattr(args, "trace", None) is None
    said = False
    try:
        while True:
            try:
                return fetch_config(client, Reference.parse(name), host_platform(), traces=wanted, place=place)
            except SourceError as error:
                _wait_for_registry(error, name, deadline, quietly=said)
                said = True
    except ObdlabError as error:
        if _may_be_a_path(name):
            what = "a directory" if Path(name).is_dir() else "no such file"
            raise DeviceError(f"{name}: {what}, and as the reference of an image: {error}") from error
        raise
    finally:
        client.close()


# Waits until the deadline of mount or attach. Permanent errors, and names that may be mistyped paths, fail at once.
def _wait_for_registry(error: SourceError, name: str, deadline: float, *, quietly: bool) -> None:
    left_s = deadline - time.monotonic()
    if not error.temporary or left_s <= _PAUSE_S or _may_be_a_path(name):
        raise error
    if not quietly:
        print(f"{printable(str(error))}; waiting for the registry, {left_s:.0f} s more at most", file=sys.stderr)
    time.sleep(_PAUSE_S)


# Usual names of layer files, and names without a registry (which would be Docker Hub's).
def _may_be_a_path(name: str) -> bool:
    first, slash, _ = name.partition("/")
    names_registry = bool(slash) and (first == "localhost" or any(character in first for character in ".:["))
    return not names_registry or "./" in name or name.endswith((".obd", ".json", ".lsmt", ".zfile", ".tar"))


def _is_json(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(64).lstrip().startswith(b"{")
