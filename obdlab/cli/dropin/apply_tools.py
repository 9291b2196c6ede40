"""``overlaybd-apply`` and ``turboOCI-apply``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from obdlab.cli.dropin.grammar import Operand, Style, Tool, ToolError, option, switch
from obdlab.cli.dropin.layer_tools import CONFIG_FLAGS, service_settings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

_HEADERS_ALONE = "layers are read whole here; give the layer itself"


def _apply(values: argparse.Namespace) -> int:
    from obdlab.convert.ontoconfig import apply_as_turbo, apply_to_config, apply_to_raw, opened_tar

    name, config = values.input_path, values.image_config_path
    with opened_tar(name, values.gz_index_path) as pieces:
        tar = _checked(pieces, name, values.checksum)
        if values.raw:
            apply_to_raw(tar, name, config, mkfs=values.mkfs)
        elif values.gz_index_path:
            apply_as_turbo(tar, name, config, service_settings(values), mkfs=values.mkfs)
        else:
            apply_to_config(tar, name, config, service_settings(values), mkfs=values.mkfs)
    print("overlaybd-apply done")
    print(values.checksum, file=sys.stderr)
    return 0


def _checked(pieces: Iterable[bytes], name: str, checksum: str) -> Iterable[bytes]:
    if not checksum:
        return pieces
    from obdlab.convert.decompress import checked

    return checked(pieces, name, checksum)


APPLY = Tool(
    "overlaybd-apply",
    "Applies a layer's tar to the writable layer of an image's configuration.",
    Style.CLI11,
    _apply,
    (
        switch("--raw", help="image_config_path is a raw disk image with a file system"),
        switch("--mkfs", help="make an ext4 before"),
        *CONFIG_FLAGS,
        option("--gz_index_path", help="make a turboOCI layer, and write the index of a gzip layer to this file"),
        option("--checksum", help="digest of the uncompressed tar, sha256:..."),
        switch("--from_qcow2", help="input is a qcow2 disk", refused="use obdlab layer import"),
        switch("--no-extract-rootfs", help="the whole disk of a qcow2", refused="use obdlab layer import"),
    ),
    (
        Operand("input_path", "the layer: a tar, compressed or not, or a pipe", existing=True),
        Operand("image_config_path", "config.v1.json", existing=True),
    ),
)


def _turbo_apply(values: argparse.Namespace) -> int:
    from obdlab.convert.ontoconfig import apply_as_turbo, opened_tar

    if values.fstype not in ("ext4", "erofs"):
        raise ToolError(f"--fstype: wanted ext4 or erofs (got {values.fstype!r})")
    name = values.input_path
    with opened_tar(name, values.gz_index_path) as tar:
        apply_as_turbo(
            tar,
            name,
            values.image_config_path,
            service_settings(values),
            filesystem=values.fstype,
            mkfs=values.mkfs,
        )
    print("turboOCI-apply done")
    return 0


TURBO_APPLY = Tool(
    "turboOCI-apply",
    "Applies a layer's tar to a turboOCI layer, which points into the tar.",
    Style.CLI11,
    _turbo_apply,
    (
        switch("--mkfs", help="make an ext4 before"),
        option("--fstype", help="ext4 or erofs", default="ext4"),
        *CONFIG_FLAGS,
        option("--gz_index_path", help="where the index of a gzip layer goes", default="gzip.meta"),
        switch("--import", help="input_path has headers alone", refused=_HEADERS_ALONE),
        switch("--export", help="write the tar's headers alone", refused=_HEADERS_ALONE),
    ),
    (
        Operand("input_path", "the layer: a tar, compressed by gzip or not", existing=True),
        Operand("image_config_path", "config.v1.json", existing=True),
    ),
)
