"""Converting layouts and looking at the result, for the tests of whole conversions."""

from __future__ import annotations

import subprocess
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions, convert_image
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.registry.client import RegistryClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from obdlab.convert.image import ConvertedImage
    from obdlab.server.client import DeviceService


def convert(source: str, destination: str, options: ConvertOptions, *, deadline_s: float = 60.0) -> ConvertedImage:
    with (
        closing(RegistryClient(request_timeout_s=deadline_s / 3, deadline_s=deadline_s)) as client,
        closing(open_source(source, client)) as image,
        closing(open_destination(destination, client)) as place,
    ):
        return convert_image(image, place, options=options)


def lowers_of(image: ConvertedImage, layout: Path) -> list[LowerConfig]:
    """The layers of an image that was converted into a layout."""
    paths = [ImageLayout(layout).blob_path(layer.digest) for layer in image.manifest.layers]
    return [LowerConfig(file=str(path)) for path in paths]


@contextmanager
def mounted(config: ImageConfig, devices: DeviceService, directory: Path) -> Iterator[Path]:
    """Mount an image; its file system must be clean before and after."""
    directory.mkdir()
    config.save(directory / "config.v1.json")
    target = directory / "mnt"
    target.mkdir()
    device = devices.attach(directory / "config.v1.json")
    try:
        check_file_system(device.path)
        devices.mount(device, target)
        try:
            yield target
        finally:
            subprocess.run(["umount", "--lazy", str(target)], check=True, timeout=60)
    finally:
        devices.detach(device.device_id, force=True)


def check_file_system(device: Path) -> None:
    done = subprocess.run(["e2fsck", "-fn", str(device)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def stacks(lowers: Sequence[LowerConfig]) -> list[ImageConfig]:
    """The image at each depth, from its bottom layer alone to all of it."""
    return [ImageConfig(lowers=tuple(lowers[: depth + 1])) for depth in range(len(lowers))]
