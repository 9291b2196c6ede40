"""Running images that cannot be read lazily here, as if they had been pulled the ordinary way.

* No block devices (no /dev/fuse or no loop devices): the image's files are unpacked in user space into a directory,
  which is mounted in the device's place.
* A registry that does not serve parts of blobs: the blobs are fetched whole and checked, into the directories of
  their layers' snapshots. The device then needs no registry.

Both give up the gain of lazy loading, so each is logged and noted in a label of the image's snapshot. Both run in a
separate process, as they may need much memory and the service is to stay small.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices import kinds
from obdlab.errors import ObdlabError, caused_by
from obdlab.registry.errors import RangesIgnoredError
from obdlab.settings.settings import DAEMON_KIND
from obdlab.system import programs
from obdlab.system.locks import directory_locked
from obdlab.system.processes import end_with_parent

if TYPE_CHECKING:
    from obdlab.image.config import ImageConfig, LowerConfig
    from obdlab.registry.client import RegistryClient
    from obdlab.registry.reference import Repository
    from obdlab.settings.settings import Settings

logger = logging.getLogger(__name__)

#: Label of a snapshot: the reason why its image or layer is not read lazily.
LABEL_FALLBACK = "containerd.io/snapshot/obdlab.fallback"
#: Reasons, as in the label and the metric.
NO_DEVICES, NO_RANGES, NOT_OVERLAYBD = "no-block-devices", "registry-without-ranges", "not-overlaybd"
UNPROVEN = "unproven-layer"

#: Pulling a whole image may take long. If the client gives up earlier, its next attempt finds the image there.
_TIMEOUT_S = 3600.0
_CHUNK = 1 << 20


class FallbackError(ObdlabError):
    """The image could be fetched neither lazily nor whole."""


def missing_devices(kind: str = kinds.AUTOMATIC) -> str:
    """Return the reason why block devices of that kind (``Settings.device_kind``) cannot be made here, or ''."""
    return kinds.find(kinds.TCMU if kind == DAEMON_KIND else kind).missing()


def is_without_ranges(error: ObdlabError) -> bool:
    """Return True if an attach failed because the registry serves blobs only whole."""
    return caused_by(error, RangesIgnoredError)


def unpack(config: Path, target: Path, settings: Settings) -> None:
    """Unpack the files of the image that ``config`` describes into the directory ``target``: all of them, or nothing.

    Raises FallbackError.
    """
    _run({"unpack": str(target)}, config, settings)


def fetch_blobs(config: Path, settings: Settings) -> None:
    """Fetch the remote blobs of an image into their layers' directories, checked. Raises FallbackError."""
    _run({"fetch": True}, config, settings)


def _run(what: dict[str, object], config: Path, settings: Settings) -> None:
    request = what | {"config": str(config), "settings": settings.to_json(), "parent": os.getpid()}
    command = [sys.executable, "-m", "obdlab.snapshotter.fallback"]
    try:
        programs.run(command, _TIMEOUT_S, stdin=json.dumps(request).encode())
    except programs.ProgramError as error:
        raise FallbackError(f"{config}: pulling the image whole: {error.last_line}") from error


# -- in the separate process -----------------------------------------------------------------------------------------


def main() -> int:
    """Run the request on standard input; an error is the last line of standard error."""
    from obdlab.image.config import ImageConfig
    from obdlab.settings.settings import Settings

    request = json.load(sys.stdin)
    # End with the service: a restarted service starts the work again, and must not meet its predecessor's process.
    if not end_with_parent(request["parent"]):
        return 1
    try:
        config, settings = ImageConfig.load(request["config"]), Settings.from_json(request["settings"])
        if "unpack" in request:
            _unpack(config, Path(request["unpack"]), settings)
        else:
            _fetch(config, settings)
    except (ObdlabError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def _unpack(config: ImageConfig, target: Path, settings: Settings) -> None:
    from obdlab.image.open import open_image
    from obdlab.snapshotter.trees import delete_tree
    from obdlab.volumes.detect import FileTree
    from obdlab.volumes.extract import Extractor

    unfinished = target.with_name(f"{target.name}.new")
    delete_tree(unfinished)
    try:
        with open_image(replace(config, record_trace_path=""), settings, traces=False) as disk:
            tree = FileTree(disk)
            Extractor(tree, archive=True).copy(tree.root, os.fsencode(unfinished))
        unfinished.rename(target)
    except BaseException:
        delete_tree(unfinished)
        raise


def _fetch(config: ImageConfig, settings: Settings) -> None:
    from contextlib import closing

    from obdlab.image.open import stacked_lowers
    from obdlab.image.registryaccess import open_client
    from obdlab.registry.reference import Repository

    repository = Repository.from_blob_url(config.repo_blob_url)
    with closing(open_client(settings)) as client:
        for lower in stacked_lowers(config):
            if lower.local_file() is not None:
                continue
            if not lower.digest or not lower.dir:
                name = lower.digest or lower.dir or "unnamed"
                raise FallbackError(f"layer {name}: nowhere to be fetched from or to")
            # Several images may have the layer. Two processes that write to one unfinished file leave holes in it.
            with directory_locked(lower.dir, _TIMEOUT_S) as is_alone:
                if not is_alone:
                    raise FallbackError(f"{lower.dir}: another process still fetches this layer")
                if lower.local_file() is None:  # another process may have fetched it meanwhile
                    _fetch_one(client, repository, lower)


def _fetch_one(client: RegistryClient, repository: Repository, lower: LowerConfig) -> None:
    from obdlab.image.config import COMMIT_FILE

    target = Path(lower.dir) / COMMIT_FILE
    unfinished = target.with_name(f".{COMMIT_FILE}.new")
    try:
        with (
            client.stream_blob(repository, lower.digest, lower.size) as stream,
            open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644), "wb") as file,
        ):
            while chunk := stream.read(_CHUNK):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(target)  # its digest was checked at the end of the stream
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    sys.exit(main())
