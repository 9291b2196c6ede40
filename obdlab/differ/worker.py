"""The differ's work on one layer, in a process of its own (:mod:`obdlab.differ.jobs`).

Bytes come from containerd's content store and are checked against their digest, and nothing is kept of a layer whose
bytes failed a check. Results are written below a work directory, which the service owns.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from obdlab.containerd.client import Containerd
from obdlab.containerd.content import CHUNK
from obdlab.convert.apply import ApplyError
from obdlab.convert.decompress import decompressed
from obdlab.convert.endpoints.layout import digest_of_file
from obdlab.convert.layer import LayerBuilder, LayerOptions, layer_uuid, pieces_file
from obdlab.differ.uppertar import upper_tar
from obdlab.errors import FormatError, ObdlabError, SourceError
from obdlab.formats.oci import BLOB_DIGEST, BLOB_FS_TYPE, BLOB_SIZE, OVERLAYBD_VERSION, VERSION_NATIVE
from obdlab.formats.zfile.layout import HEADER_SIZE, is_zfile
from obdlab.image.config import COMMIT_FILE, ImageConfig
from obdlab.image.open import Image, open_image
from obdlab.layerfiles.disks import open_any_layer
from obdlab.layerfiles.writing import Packing, write_packed
from obdlab.layers.commit import commit
from obdlab.layers.lsmt import open_layer
from obdlab.layers.stack import Stack
from obdlab.layers.tarwrap import TarWrapWriter, read_window
from obdlab.localfile import LocalFile
from obdlab.server.protection import bound_memory
from obdlab.settings.settings import Settings
from obdlab.snapshotter.overlaybd import LAYER_HEAD, is_layer
from obdlab.system.processes import end_with_parent
from obdlab.volumes.detect import FileTree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.layers.lsmt import Layer

#: Bytes beyond those of the interpreter: a layer, or the image below it, with as many segments as are allowed.
_MEMORY = 4 << 30
#: A larger compressed layer has its blocks compressed in a second process.
_LARGE = 8 << 20
UNCOMPRESSED = "containerd.io/uncompressed"


def main() -> int:
    """Do the job on standard input and print its answer."""
    request = json.load(sys.stdin)
    # End with the service: no other process knows of this one.
    if not end_with_parent(request["parent"]):
        return 1
    bound_memory(_MEMORY)
    try:
        answer = _JOBS[request["job"]](request)
    except ApplyError as error:
        answer = {"unsupported": str(error)}
    except ObdlabError as error:
        answer = {"error": error.code, "text": str(error)}
    except MemoryError:
        answer = {"unsupported": f"needs more memory than a layer may take ({_MEMORY >> 20} MiB)"}
    except OSError as error:
        answer = {"error": SourceError.code, "text": str(error)}
    print(json.dumps(answer))
    return 0


# -- a layer of the content store as the file of a snapshot ----------------------------------------------------------


def unpack(request: dict[str, Any]) -> dict[str, Any]:
    """Write the layer blob ``digest`` to the work directory, as a block layer.

    An overlaybd layer is kept as it is. If the request names a ``filesystem``, an ordinary one becomes a block layer
    on the image ``below``. Answers with file, digest and size of the uncompressed tar, and whether it was ``made``.
    """
    name, digest, work = f"layer {request['digest']}", request["digest"], Path(request["work"])
    with Containerd(request["containerd"], request["namespace"]) as client:
        source = io.BufferedReader(pieces_file(client.content.stream(digest, request["size"])), CHUNK)
        tar = _Summed(decompressed(source, name))
        head = tar.peek(LAYER_HEAD)
        target = work / COMMIT_FILE
        if is_layer(head):
            _write(tar, target)
            open_layer(LocalFile(target)).close()  # a snapshot with a file that is no layer would mount nowhere
        elif request["filesystem"]:
            target, _ = _build(request, name, tar.rest(), layer_uuid(request["chain_id"] or digest))
        else:
            return {"unsupported": f"{name}: an ordinary layer"}
        while source.read(CHUNK):  # to the check of the blob's digest; a decompressor may leave bytes
            pass
        _sync(target)
        return {"file": str(target), "digest": tar.digest, "size": tar.size, "made": not is_layer(head)}


# Returns the layer and its file system.
def _build(request: dict[str, Any], name: str, tar: Iterator[bytes], uuid: str) -> tuple[Path, str]:
    options = LayerOptions(filesystem=request["filesystem"])
    with ExitStack() as ended:
        lowers: list[Layer] = []
        if request["below"]:
            config = replace(ImageConfig.load(request["below"]), result_file="", record_trace_path="")
            image = open_image(config, Settings.from_json(request["settings"]), traces=False)
            ended.enter_context(image)
            assert isinstance(image, Image)
            lowers = list(image.layers)
            try:
                options = replace(options, virtual_size=image.size, filesystem=FileTree(image).kind)
            except FormatError as error:
                raise ApplyError(f"{name}: the image below cannot get further layers: {error}") from error
        large = request["size"] > _LARGE
        builder = ended.enter_context(LayerBuilder(Path(request["work"]), options, large=large))
        for lower in lowers:
            builder.add_lower(lower)
        parent_uuid = lowers[-1].uuid if lowers else None
        built = builder.build([(name, tar)], uuid=uuid, parent_uuid=parent_uuid).result()
    assert built.path is not None
    return built.path, options.filesystem


def _write(tar: _Summed, target: Path) -> None:
    with target.open("xb") as file:
        for piece in tar.rest():
            file.write(piece)


# The snapshot's row will be on stable storage, so its layer must be, too.
def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class _Summed:
    """The pieces of an uncompressed tar, whose beginning may be looked at; sums what is taken."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._head = b""
        self._sha256 = hashlib.sha256()
        self.size = 0

    @property
    def digest(self) -> str:
        return f"sha256:{self._sha256.hexdigest()}"

    def peek(self, size: int) -> bytes:
        while len(self._head) < size and (piece := next(self._pieces, None)) is not None:
            self._head += piece
        return self._head[:size]

    def rest(self) -> Iterator[bytes]:
        head, self._head = self._head, b""
        if head:
            yield self._sum(head)
        for piece in self._pieces:
            yield self._sum(piece)

    def _sum(self, piece: bytes) -> bytes:
        self._sha256.update(piece)
        self.size += len(piece)
        return piece


# -- a snapshot's layer as a blob of the content store ---------------------------------------------------------------


def pack(request: dict[str, Any]) -> dict[str, Any]:
    """Store a layer's ``file`` (and ``index``), packed, as a blob of the content store with ``labels``.

    The layers ``inits`` below it are merged into it. A file that is packed already is stored as it is. Answers with
    digest, size and annotations.
    """
    return _store(request, _packed(request["file"], request["index"], request["inits"], Path(request["work"])))


def change(request: dict[str, Any]) -> dict[str, Any]:
    """Make a layer of an overlay's ``upper`` directory on the image ``below``, and store it as :func:`pack` does."""
    name = f"overlay {request['upper']}"
    path, filesystem = _build(request, name, upper_tar(Path(request["upper"])), str(uuid4()).upper())
    return _store({**request, "filesystem": filesystem}, path)


def _store(request: dict[str, Any], path: Path) -> dict[str, Any]:
    digest, size = digest_of_file(path), path.stat().st_size
    notes = {
        OVERLAYBD_VERSION: VERSION_NATIVE,
        BLOB_DIGEST: digest,
        BLOB_SIZE: str(size),
        BLOB_FS_TYPE: request["filesystem"],
    }
    # Builders read the diff ID from the label.
    labels = {**request["labels"], UNCOMPRESSED: digest}
    with Containerd(request["containerd"], request["namespace"]) as client, path.open("rb") as file:
        client.under(request["lease"]).content.ingest(digest, size, iter(lambda: file.read(CHUNK), b""), labels)
    return {"digest": digest, "size": size, "annotations": notes}


def _packed(path: str, index: str, inits: list[str], work: Path) -> Path:
    target = work / COMMIT_FILE
    if inits:
        stack = Stack([*(open_any_layer(init) for init in inits), open_any_layer(path, index)])
        uuid = stack.layers[-1].uuid
        with closing(stack), target.open("xb") as output:
            write_packed(output, Packing(tar=True), lambda sink: commit(stack, sink, uuid=uuid), name=path)
        return target
    with LocalFile(path) as file:
        if read_window(file) is not None:
            open_layer(file).close()
            return Path(path)
        if is_zfile(file.read_at(0, min(HEADER_SIZE, file.size)), blob=path):
            with target.open("xb") as output, TarWrapWriter(output) as wrapped:
                for at in range(0, file.size, CHUNK):
                    wrapped.write(file.read_at(at, min(CHUNK, file.size - at)))
            return target
    with closing(open_any_layer(path, index)) as layer, target.open("xb") as output:
        write_packed(output, Packing(tar=True), lambda sink: commit(layer, sink, uuid=layer.uuid), name=path)
    return target


_JOBS = {"unpack": unpack, "pack": pack, "change": change}


if __name__ == "__main__":
    sys.exit(main())
