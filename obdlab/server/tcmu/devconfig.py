"""The dev_config of an overlaybd TCMU device: the image's configuration, and the file for the outcome of its opening.

Shared by the daemon, its servers and the makers of devices.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from obdlab.errors import ObdlabError
from obdlab.image.config import ImageConfig

log = logging.getLogger(__name__)

#: The handler's name in dev_config.
HANDLER = "overlaybd"
#: File for the reason of a failed add if the image's configuration names no result file.
DEFAULT_RESULT = "init-debug.log"


def image_of(config: str) -> tuple[Path, str]:
    """Split the handler's part of a dev_config: the image's configuration, and its id for live snapshots."""
    path, _, live_id = config.partition(";")
    return Path(path), live_id


def result_file(config_path: Path) -> Path:
    """Return the file for the outcome of opening an image, as configured or the default beside the configuration."""
    try:
        named = ImageConfig.load(config_path).result_file
    except ObdlabError:
        named = ""
    return config_path.parent / (named or DEFAULT_RESULT)


def open_config(config_path: Path) -> ImageConfig:
    """Read an image's configuration, with a full path of its result file. Raises ConfigError."""
    return replace(ImageConfig.load(config_path), result_file=str(result_file(config_path)))


def report_failure(config_path: Path, reason: str) -> None:
    """Write the reason why an image was not added to its result file, which the device's waiting maker reads."""
    try:
        result_file(config_path).write_text(f"failed:{reason}")
    except OSError as error:
        log.warning("%s: cannot write the reason (%s)", result_file(config_path), error.strerror)


def failure_of(config_path: Path) -> str:
    """Return the reason why an image was not added, or ''. For the device's waiting maker."""
    try:
        text = result_file(config_path).read_text(errors="replace")
    except OSError:
        return ""
    return text.removeprefix("failed:") if text.startswith("failed:") else ""
