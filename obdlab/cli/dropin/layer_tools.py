"""``overlaybd-create``, ``overlaybd-commit`` and ``overlaybd-merge``."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from obdlab.cli.dropin.grammar import Operand, Style, Tool, ToolError, option, switch

if TYPE_CHECKING:
    import argparse

    from obdlab.layerfiles.writing import Packing
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.stack import Stack
    from obdlab.settings.settings import Settings

_GIB = 1 << 30
_VERBOSE = switch("--verbose", help="log more")
#: Where the original's tools look for their service configuration.
SERVICE_CONFIG = "/etc/overlaybd/overlaybd.json"
#: Options of the tools that open images.
CONFIG_FLAGS = (
    option(
        "--service_config_path",
        help=f"service configuration (default: {SERVICE_CONFIG} if it is there)",
        default=SERVICE_CONFIG,
        existing=True,
    ),
    _VERBOSE,
)
_UPLOAD = (
    option("--upload", help="also upload the layer to this URL, https://HOST/v2/NAME/blobs/uploads, meanwhile"),
    option("--upload_bs", help="KB uploaded at once", default=262144),
    option("--cred_file_path", help="docker config.json with credentials", existing=True),
    option("--tls_key_path", help="key of the client certificate", existing=True),
    option("--tls_cert_path", help="client certificate", existing=True),
)
_TURBO = (
    switch("--turboOCI", help="a layer of turboOCI"),
    switch("--fastoci", help="the same by its old name"),
)
_BLOCK_SIZES = (4, 8, 16, 32, 64)


def packing_of(algorithm: str, block_size_kib: int, **more: bool | int) -> Packing:
    """Return the packing of the original's options. Raises ToolError."""
    from obdlab.formats.zfile import ALGORITHMS
    from obdlab.layerfiles.writing import Packing

    if algorithm not in ALGORITHMS:
        raise ToolError(f"invalid '--algorithm' parameters (got {algorithm!r}, wanted {' or '.join(ALGORITHMS)})")
    if block_size_kib not in _BLOCK_SIZES:
        raise ToolError(
            f"invalid '--bs' parameters (got {block_size_kib}, wanted {', '.join(map(str, _BLOCK_SIZES))})"
        )
    return Packing(algorithm, block_size_kib << 10, **more)  # type: ignore[arg-type] # tar and workers


def _create(values: argparse.Namespace) -> int:
    data, index, size = values.data_file, values.index_file, values.vsize * _GIB
    if values.raw:
        from obdlab.layers.rawfile import create_raw

        create_raw(data, index, size)
    elif values.turboOCI or values.fastoci:
        from obdlab.layers.upper import SparseUpper

        SparseUpper.create(data, size, index_path=index).close()
    elif values.s:
        from obdlab.layers.upper import SparseUpper

        SparseUpper.create(data, size, index_path=index, parent_uuid=values.u or None).close()
    else:
        from obdlab.layers.append import AppendUpper

        AppendUpper.create(data, index, size, parent_uuid=values.u or None).close()
    if values.mkfs:
        try:
            _make_filesystem(values)
        except BaseException:
            os.unlink(data)
            os.unlink(index)
            raise
    print("overlaybd-create has created files SUCCESSFULLY")
    return 0


def _make_filesystem(values: argparse.Namespace) -> None:
    from obdlab.layers.rawfile import RawFile
    from obdlab.layers.stack import WritableStack
    from obdlab.layers.upper import open_upper
    from obdlab.volumes.ext4.mkfs import make_filesystem

    if values.raw:
        with closing(RawFile(values.data_file)) as raw:
            make_filesystem(raw)
            raw.flush()
        return
    with WritableStack(None, open_upper(values.data_file, values.index_file)) as disk:
        make_filesystem(disk)
        disk.flush()


CREATE = Tool(
    "overlaybd-create",
    "Makes the two files of an empty writable layer.",
    Style.CLI11,
    _create,
    (
        option("-u", help="UUID of the layer below"),
        switch("-s", help="a sparse layer"),
        *_TURBO,
        switch("--raw", help="a raw disk in place of a layer"),
        switch("--mkfs", help="make an ext4 in it"),
        _VERBOSE,
    ),
    (
        Operand("data_file", "data file to make"),
        Operand("index_file", "index file to make"),
        Operand("vsize", "size of the disk in GiB", number=True),
    ),
)


def _commit(values: argparse.Namespace) -> int:
    from obdlab.layerfiles.disks import open_any_layer

    if values.t and values.upload:
        raise ToolError("-t and --upload exclude each other: a tar begins with its size")
    if values.seal:
        return _seal(values)
    output = values.index_file if values.commit_sealed else values.commit_file
    if not output:
        raise ToolError("no file to commit to")
    if values.turboOCI or values.fastoci:
        digest = _commit_turbo(values, output)
    else:
        with closing(open_any_layer(values.data_file, "" if values.commit_sealed else values.index_file)) as layer:
            digest = _write(layer, values, output)
    print(digest, file=sys.stderr)
    print("overlaybd-commit has committed files SUCCESSFULLY")
    return 0


def _seal(values: argparse.Namespace) -> int:
    from obdlab.layers.upper import open_upper

    with open_upper(values.data_file, values.index_file) as upper:
        upper.seal()
    return 0


def _packing(values: argparse.Namespace) -> Packing:
    from obdlab.layerfiles.writing import Packing

    if not values.z:
        if values.algorithm or values.bs:
            print("WARNING option '--bs' and '--algorithm' will be ignored without '-z'", file=sys.stderr)
        return Packing("")  # the original leaves out the tar, too
    # Without the option, 1 in the original, as many as elsewhere: the bytes are the same.
    more = {"workers": values.compress_threads} if values.compress_threads > 1 else {}
    return packing_of(values.algorithm or "lz4", values.bs or 4, tar=values.t, **more)


def _commit_turbo(values: argparse.Namespace, output: str) -> str:
    from obdlab.layerfiles.turbolayer import commit_turbo_layer

    if values.uuid or values.parent_uuid or values.m or values.upload:
        raise ToolError("a turboOCI layer has neither UUIDs nor message, and is not uploaded by itself")
    commit_turbo_layer(values.data_file, values.index_file, output, _packing(values), force=values.f)
    return ""


def _write(source: Layer | Stack, values: argparse.Namespace, output: str) -> str:
    # Returns the digest of the uploaded blob, "" without an upload.
    from obdlab.layerfiles.writing import write_layer

    names = {"uuid": values.uuid, "parent_uuid": values.parent_uuid or None, "user_tag": values.m}
    packing = _packing(values)
    if values.upload:
        from obdlab.cli.dropin.uploading import write_and_upload

        return write_and_upload(source, output, packing, values, **names)
    write_layer(source, output, packing, force=values.f, **names)
    return ""


COMMIT = Tool(
    "overlaybd-commit",
    "Writes a writable layer as a compact layer file, or seals it in place.",
    Style.CLI11,
    _commit,
    (
        option("-m", help="message kept in the layer"),
        option("--uuid", help="UUID of the layer"),
        option("-p", "--parent-uuid", help="UUID of the layer below"),
        switch("-z", help="compress it to a ZFile"),
        switch("-t", help="put it into a tar (with -z)"),
        switch("-f", help="replace the output"),
        option("--algorithm", help="lz4 (default) or zstd"),
        option("--bs", help="compressed blocks in KB (default: 4)", default=0),
        *_TURBO,
        switch("--seal", help="seal only: data_file is the output"),
        switch("--commit_sealed", help="data_file is sealed, and index_file is the output"),
        option("--compress_threads", help="threads that compress", default=1),
        _VERBOSE,
        *_UPLOAD,
    ),
    (
        Operand("data_file", "data file", existing=True),
        Operand("index_file", "index file", required=False),
        Operand("commit_file", "layer file to make", required=False),
    ),
)


def _merge(values: argparse.Namespace) -> int:
    from obdlab.layerfiles.disks import open_disk
    from obdlab.layerfiles.writing import Packing

    if not values.output:
        raise ToolError("no file to merge to")
    # As the original, which neither writes the header again nor makes a tar.
    packing = packing_of("lz4", 4, rewrite_header=False) if values.compress else Packing("")
    with open_disk([values.image_config_path], partial(service_settings, values)) as disk:
        if values.upload:
            from obdlab.cli.dropin.uploading import write_and_upload

            digest = write_and_upload(disk, values.output, packing, values)
        else:
            from obdlab.layerfiles.writing import write_layer

            write_layer(disk, values.output, packing, force=True)
            digest = ""
    print(digest, file=sys.stderr)
    return 0


def service_settings(values: argparse.Namespace) -> Settings:
    """Return the settings of --service_config_path; the standard ones if the file is missing."""
    from obdlab.settings.original import load
    from obdlab.settings.settings import Settings

    path = values.service_config_path
    return load(path).settings if os.path.exists(path) else Settings()


MERGE = Tool(
    "overlaybd-merge",
    "Writes the disk of an image's configuration as one layer file.",
    Style.CLI11,
    _merge,
    (
        *CONFIG_FLAGS,
        switch("--compress", help="compress it to a ZFile", default=True),
        switch("-t", help="no effect, as in the original"),
        *_UPLOAD,
    ),
    (
        Operand("image_config_path", "config.v1.json", existing=True),
        Operand("output", "layer file to make, or to replace", required=False),
    ),
)
