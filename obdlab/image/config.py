"""config.v1.json: the layers of an image, in the original's keys (overlaybd per-image configuration)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from obdlab.errors import ObdlabError
from obdlab.localfile import read_regular
from obdlab.plain import Table
from obdlab.system.newfile import replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

#: Names of a layer file in a directory: unpacked by containerd, sealed in place, or committed.
COMMIT_FILE, SEALED_FILE = "overlaybd.commit", "overlaybd.sealed"
LAYER_FILES = (COMMIT_FILE, ".commit", SEALED_FILE)

_MAX_SIZE = (1 << 64) - 1


# A configuration of 255 lowers takes some 100 KiB.
_MAX_CONFIG = 4 << 20


class ConfigError(ObdlabError, code="config"):
    """An image configuration cannot be read, is not JSON, or has a key of the wrong type."""


@dataclass(frozen=True, slots=True)
class LowerConfig:
    """A read-only layer: a local ``file``, or a file in ``dir``, or else the blob ``digest`` of ``size`` bytes.

    A turboOCI layer also has a target, the local ``target_file`` or else the blob ``target_digest``, with the local
    file ``gzip_index`` if the target is compressed.
    """

    file: str = ""
    dir: str = ""
    digest: str = ""
    size: int = 0
    gzip_index: str = ""
    target_file: str = ""
    target_digest: str = ""
    #: The layer is fetched whole before anything else. Not a key of the original, which ignores it.
    hot: bool = False
    #: The layer's hash tree (:class:`obdlab.formats.hashtree.TreeReference`). As ``hot``, not a key of the original.
    hash_tree: str = ""
    #: Size of the target as stored, 0 if it is not known. As ``hot``, not a key of the original.
    target_size: int = 0
    #: The file with the sums of the target's content (:mod:`obdlab.formats.tarsums`). As ``hot``.
    tar_sums: str = ""

    @property
    def is_turbo(self) -> bool:
        """True for a turboOCI layer: its data is in a target."""
        return bool(self.target_file or self.target_digest or self.gzip_index)

    @property
    def remote_target(self) -> str:
        """Digest of the target if it must be fetched, else empty."""
        return "" if self.target_file else self.target_digest

    def local_file(self) -> str | None:
        """Return the file on this machine that the layer is read from, None if it must be fetched."""
        # As in the original, the first existing file counts, even if it is damaged.
        candidates = [self.file] if self.file else []
        if self.dir:
            candidates += [os.path.join(self.dir, name) for name in LAYER_FILES]
        return next((path for path in candidates if os.path.exists(path)), None)

    def to_json(self) -> dict[str, Any]:
        """Return the layer with the original's keys in the original's order, without the empty ones."""
        values = {
            "gzipIndex": self.gzip_index,
            "file": self.file,
            "digest": self.digest,
            "targetFile": self.target_file,
            "targetDigest": self.target_digest,
            "targetSize": self.target_size,
            "tarSums": self.tar_sums,
            "size": self.size,
            "dir": self.dir,
            "hot": self.hot,
            "hashTree": self.hash_tree,
        }
        return {key: value for key, value in values.items() if value}


@dataclass(frozen=True, slots=True)
class UpperConfig:
    """The writable layer. ``vsize_gb`` is only a note; the layer's own header counts."""

    index: str = ""
    data: str = ""
    vsize_gb: int = 0

    @property
    def active(self) -> bool:
        """True if there is a writable layer: both paths must be named."""
        return bool(self.index and self.data)

    def to_json(self) -> dict[str, Any]:
        """Return the layer with the original's keys, without the empty ones."""
        values = {"index": self.index, "data": self.data, "vsize": self.vsize_gb}
        return {key: value for key, value in values.items() if value}


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """An image: its lowers from the bottom up, an optional writable upper, and the URL of remote blobs.

    ``repo_blob_url`` is like ``https://host/v2/name/blobs``. ``result_file`` gets "success" or "failed:<reason>"
    when the image is opened.
    """

    repo_blob_url: str = ""
    lowers: tuple[LowerConfig, ...] = ()
    upper: UpperConfig = field(default_factory=UpperConfig)
    result_file: str = ""
    download: Mapping[str, Any] | None = None
    acceleration_layer: bool = False
    record_trace_path: str = ""
    #: A blob of the image's repository with a trace to replay. Not a key of the original, which ignores it.
    trace: LowerConfig = field(default_factory=LowerConfig)

    def to_json(self) -> dict[str, Any]:
        """Return the configuration with the original's keys, order and rule for leaving out empty ones."""
        values: dict[str, Any] = {
            "repoBlobUrl": self.repo_blob_url,
            "lowers": [lower.to_json() for lower in self.lowers],
            "upper": self.upper.to_json(),
            "resultFile": self.result_file,
        }
        if self.download is not None:
            values["download"] = dict(self.download)
        if self.acceleration_layer:
            values["accelerationLayer"] = True
        if self.record_trace_path:
            values["recordTracePath"] = self.record_trace_path
        if self.trace.digest:
            values["trace"] = self.trace.to_json()
        return values

    def report(self, result: str) -> None:
        """Write the result of opening the image to the result file, if one is named; logs a failure to write."""
        if not self.result_file:
            return
        try:
            Path(self.result_file).write_text(result)
        except OSError as error:
            what = "%s: cannot write the result of opening the image (%s)"
            logger.warning(what, self.result_file, error.strerror)

    @classmethod
    def from_json(cls, values: object, *, name: str = "image configuration") -> Self:
        """Read parsed JSON; unknown keys are ignored. Raises ConfigError naming ``name`` and the wrong key."""
        top = Table(values, name, ConfigError)
        upper = top.table("upper")
        return cls(
            repo_blob_url=top.get("repoBlobUrl", str, ""),
            lowers=tuple(map(_lower, top.tables("lowers"))),
            upper=UpperConfig(
                index=upper.get("index", str, ""),
                data=upper.get("data", str, ""),
                vsize_gb=upper.number("vsize", 0, least=0, most=_MAX_SIZE),
            ),
            result_file=top.get("resultFile", str, ""),
            download=top.get("download", dict, None),
            acceleration_layer=top.get("accelerationLayer", bool, False),
            record_trace_path=top.get("recordTracePath", str, ""),
            trace=_lower(top.table("trace")),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a configuration file. Raises ConfigError naming the file, and the key if a key is wrong."""
        name = os.fspath(path)
        return cls.from_json(Table.of_json(read_config(name), name, ConfigError).values, name=name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file of mode 0600, replacing an old one in one step. Raises ConfigError naming the file."""
        target = Path(path)
        text = json.dumps(self.to_json(), separators=(",", ":"))
        try:
            replace_file(target, text.encode(), sync=True)
        except OSError as error:
            raise ConfigError(f"{target}: cannot write the image configuration ({error.strerror})") from error


def digest_of_config(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a configuration file, in hex. Raises as :func:`read_config`."""
    return hashlib.sha256(read_config(path)).hexdigest()


def read_config(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a configuration file. Raises ConfigError if it is unreadable, not a file or too large.

    The path is not trusted: the read must neither wait for a pipe nor read an endless device.
    """
    name = os.fspath(path)
    try:
        data = read_regular(name, _MAX_CONFIG)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name}: cannot read the image configuration ({reason})") from error
    if len(data) > _MAX_CONFIG:
        raise ConfigError(f"{name}: image configuration is larger than {_MAX_CONFIG} bytes")
    return data


def _lower(table: Table) -> LowerConfig:
    return LowerConfig(
        file=table.get("file", str, ""),
        dir=table.get("dir", str, ""),
        digest=table.get("digest", str, ""),
        size=table.number("size", 0, least=0, most=_MAX_SIZE),
        gzip_index=table.get("gzipIndex", str, ""),
        target_file=table.get("targetFile", str, ""),
        target_digest=table.get("targetDigest", str, ""),
        target_size=table.number("targetSize", 0, least=0, most=_MAX_SIZE),
        tar_sums=table.get("tarSums", str, ""),
        hot=table.get("hot", bool, False),
        hash_tree=table.get("hashTree", str, ""),
    )
