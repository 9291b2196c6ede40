"""Every parser of bytes that somebody else wrote, with sound files to start from."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import zstandard

from obdlab.blob import Blob, MemoryBlob
from obdlab.contrib.nbd.connection import Connection, ConnectionLostError
from obdlab.contrib.nbd.export import NbdExport
from obdlab.contrib.nbd.protocol import ALLOCATION, FIXED_NEWSTYLE, Command, Option
from obdlab.contrib.nbd.server import Budget, Client
from obdlab.contrib.original_root.bolt import BoltFile
from obdlab.contrib.original_root.importing import read_snapshots
from obdlab.convert.apply import apply_layer
from obdlab.convert.compare.listing import differences, list_volume
from obdlab.convert.tar.member import Kind
from obdlab.convert.tar.reader import TarStream
from obdlab.convert.tree.erofstree import ErofsTree
from obdlab.convert.tree.memorytree import MemoryTree
from obdlab.convert.tree.target import Ext4Tree
from obdlab.devices.tcmu import netlink, scsi
from obdlab.devices.tcmu import ring as tcmu_ring
from obdlab.devices.tcmu.disk import ScsiDisk
from obdlab.devices.tcmu.uio import UioName
from obdlab.errors import FormatError, ObdlabError
from obdlab.formats import oci
from obdlab.formats.checksum import raw_crc32c
from obdlab.formats.gzipindex import HEADER_SIZE, WINDOW, IndexHeader, parse_table, parse_window, table_bytes
from obdlab.formats.trace import PriorityList, Trace, content_of_layer
from obdlab.image import turboblob
from obdlab.image.config import ImageConfig
from obdlab.image.turboblob import unpack
from obdlab.layerfiles.diskimport import disk_size
from obdlab.layerfiles.partitions import find_root
from obdlab.layers.append import AppendUpper
from obdlab.layers.gziptarget import GzipTarget
from obdlab.layers.lsmt import open_layer
from obdlab.layers.spancache import SpanCache
from obdlab.layers.stack import Stack
from obdlab.layers.tarwrap import open_tarwrap
from obdlab.layers.warp import WarpLayer
from obdlab.layers.zfile import open_zfile
from obdlab.layers.zstdtarget import ZstdTarget
from obdlab.layers.zstdwriter import ZstdIndexWriter
from obdlab.registry.auth import parse_challenges
from obdlab.registry.credentials import Credentials, _service_credentials
from obdlab.registry.mirrors import parse_hosts
from obdlab.registry.reference import Reference
from obdlab.registry.tls import TLSOptions, tls_of_host
from obdlab.settings.original import parse as parse_settings
from obdlab.settings.settings import Settings
from obdlab.traces.profile import File, Profile, Read
from obdlab.traces.scripts import commands_in, names_in, unwrapped
from obdlab.traces.shellvariables import Variables
from obdlab.volumes.erofs.volume import Volume as ErofsVolume
from obdlab.volumes.ext4.mkfs import make_filesystem
from obdlab.volumes.ext4.volume import Volume
from tests.contrib.nbd.speaking import go, meta, option, request
from tests.contrib.original_root.boltsamples import bolt_file, snapshots
from tests.convert.layouts import directory, hardlink, member, tar_bytes
from tests.convert.torture import gnu_only_layer
from tests.devices.blobs import MemoryWritable
from tests.devices.tcmu import speaking as tcmu
from tests.layers.golden import GOLDEN, target_tar
from tests.layers.lsmt_samples import sealed_bytes
from tests.layers.zfile_samples import compress
from tests.volumes.erofs.samples import file_system_of
from tests.volumes.ext4.samples import MemoryDisk, large_directory, small_file_system

_MOST_READ = 4 << 20
_STEP = 256 << 10


@dataclass(frozen=True)
class Target:
    """A parser, and files that it takes."""

    parse: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    #: Whether it refuses anything: some take what they understand.
    strict: bool = True


def read_all(blob: Blob) -> None:
    # As a reader would, but an honest 8 EiB of zeros is not read to its end.
    size = blob.size
    for offset in range(0, min(size, _MOST_READ), _STEP):
        length = min(_STEP, size - offset)
        assert len(blob.read_at(offset, length)) == length
    if size > _MOST_READ:
        assert len(blob.read_at(size - 4096, 4096)) == 4096


def _zfile(data: bytes) -> None:
    read_all(open_zfile(MemoryBlob(data)))


def _tar(data: bytes) -> None:
    read_all(open_tarwrap(MemoryBlob(data)))


def _layer(data: bytes) -> None:
    read_all(Stack([open_layer(MemoryBlob(data))]))


def _stack(data: bytes) -> None:
    bottom = open_layer(MemoryBlob(_golden("lsmt/l1.plain.lsmt")))
    read_all(Stack([bottom, open_layer(MemoryBlob(data))]))


def _warp(data: bytes) -> None:
    read_all(Stack([open_layer(MemoryBlob(data), kind=partial(WarpLayer, target_tar("plain.tar")))]))


def _gzip_index(data: bytes) -> None:
    # With a right CRC, or nearly everything would be refused for it.
    data = data[:329] + raw_crc32c(data[:329]).to_bytes(4, "little") + data[333:]
    gz = MemoryBlob(_golden("turbooci/good.tar.gz"))
    read_all(GzipTarget(gz, MemoryBlob(data), spans=SpanCache(4 << 20)))


def _gzip_index_seeds() -> list[bytes]:
    # The second one is not compressed, so that changes reach the fields of entries.
    sound = _golden("turbooci/good.gzip.meta")
    header = IndexHeader.from_bytes(sound, index_size=len(sound))
    table = parse_table(sound[header.index_start :], header)
    starts = [333 + WINDOW * number for number in range(len(table))]
    windows = [parse_window(sound[row["window"] :][: row["length"]], header) for row in table]
    rows = [
        (int(row["content"]), int(row["stored"]), start, int(row["bits"]), WINDOW)
        for row, start in zip(table, starts, strict=True)
    ]
    plain = b"".join(windows) + table_bytes(rows)
    size = HEADER_SIZE + len(plain)
    changed = replace(header, windows_compressed=False, index_size=size, index_start=size - len(rows) * 29)
    return [sound, changed.to_bytes() + plain]


def _gzip_target(data: bytes) -> None:
    index = _golden("turbooci/good.gzip.meta")
    blob = MemoryBlob(data)
    header = IndexHeader.from_bytes(index, index_size=len(index))
    if blob.size != header.compressed_size:  # else the size alone would tell
        index = replace(header, compressed_size=blob.size).to_bytes() + index[HEADER_SIZE:]
    read_all(GzipTarget(blob, MemoryBlob(index), spans=SpanCache(4 << 20)))


def _zstd_seeds() -> list[bytes]:
    text = _golden("turbooci/good.gzip.meta")
    frames = [
        zstandard.ZstdCompressor(write_checksum=sums).compress(text[at:]) for at, sums in ((0, True), (9, False))
    ]
    return [frames[0], frames[1] + bytes.fromhex("502a4d1803000000") + b"toc" + frames[0]]


def _zstd_layer(data: bytes) -> None:
    writer = ZstdIndexWriter(blob="layer")
    size = 0
    for piece in writer.decompressed(io.BytesIO(data)):
        size += len(piece)
        if size > 4 << 20:
            return
    read_all(ZstdTarget(MemoryBlob(data), MemoryBlob(writer.to_bytes()), spans=SpanCache(4 << 20)))


def _zstd_index_seeds() -> list[bytes]:
    writer = ZstdIndexWriter()
    for _piece in writer.decompressed(io.BytesIO(_zstd_seeds()[1])):
        pass
    return [writer.to_bytes()]


def _zstd_index(data: bytes) -> None:
    if len(data) >= 40:  # else the CRC alone would tell
        crc = zlib.crc32(data[40:], zlib.crc32(data[:32]))
        data = data[:32] + crc.to_bytes(4, "little") + data[36:]
    stored = _zstd_seeds()[1]
    target = ZstdTarget(MemoryBlob(stored), MemoryBlob(data), spans=SpanCache(4 << 20))
    for at in (0, target.size // 2, target.size - 1):
        target.read_at(at, min(4096, target.size - at))


def _turbo_blob(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "new"
        try:
            unpack(io.BytesIO(data), place, blob="blob")
        except ObdlabError:
            assert not place.exists()
            raise
        assert {path.name for path in place.iterdir()} <= set(turboblob._NAMES)


def _append_log(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        index = Path(name) / "index"
        index.write_bytes(data)
        content = Path(name) / "data"
        content.write_bytes(_golden("lsmt/l1.data"))
        with AppendUpper.open(content, index) as upper:
            read_all(Stack([upper]))


def _qcow2(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        disk_size(file.name, "qcow2")


def _partitions(data: bytes) -> None:
    disk = MemoryBlob(data)
    find_root(disk, 1)
    with suppress(FormatError):  # no, or several, roots
        find_root(disk)


def _partition_seeds() -> list[bytes]:
    from tests.layerfiles.partitioned import gpt_disk, mbr_disk

    parts = [(64, 64, 0x83), (128, 64, 0x82)]
    mbr = mbr_disk(512, parts, logical=[(300, 10), (320, 10)], base=256)
    return [mbr, gpt_disk(512, [(64, 127, "linux"), (128, 191, "other")])]


def _config(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        config = ImageConfig.load(file.name)
    assert ImageConfig.from_json(config.to_json()) == config


def _manifest(data: bytes) -> None:
    document = oci.parse_manifest(data)
    assert oci.parse_manifest(document.to_bytes()) == document


def _image_config(data: bytes) -> None:
    oci.chain_ids(oci.Config.parse(data).diff_ids)


def _credentials(data: bytes) -> None:
    Credentials.parse(data)


def _credentials_answer(data: bytes) -> None:
    _service_credentials(data, "asking").find("h", "x")


def _service_config(data: bytes) -> None:
    settings = parse_settings(data, "overlaybd.json", Settings()).settings
    assert Settings.from_json(settings.to_json()) == settings


def _host_certificates(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "host"
        directory.mkdir()
        (directory / "hosts.toml").write_bytes(data)
        tls_of_host(TLSOptions(certs_dirs=(Path(name),)), "host")


def _challenges(data: bytes) -> None:
    parse_challenges(data.decode("latin-1"))


def _reference(data: bytes) -> None:
    reference = Reference.parse(data.decode("utf-8", "surrogateescape"))
    assert Reference.parse(str(reference)) == reference


def _layer_tar(data: bytes) -> None:
    stream = TarStream(io.BytesIO(data), "layer")
    for found in stream:
        if found.kind is Kind.FILE:
            assert sum(len(piece) for _, piece in stream.data(found)) <= found.size
    stream.drain()


def _layer_applied(data: bytes) -> None:
    # To a file system, which is then sound and holds what the same layer makes in memory.
    disk, memory = MemoryDisk(2 << 20), MemoryTree()
    make_filesystem(disk, inode_ratio=4096)
    tree = Ext4Tree(disk)
    apply_layer(io.BytesIO(data), "layer", tree)
    tree.finish()
    apply_layer(io.BytesIO(data), "layer", memory)
    assert differences(list_volume(Volume(disk)), memory.listing()) == []


def _on_ext4_base(data: bytes) -> None:
    disk = MemoryDisk(len(data))
    disk.data[:] = data
    _apply_to(Ext4Tree(disk))


def _on_erofs_base(data: bytes) -> None:
    disk = MemoryDisk(len(data) + (1 << 20))
    disk.data[: len(data)] = data
    _apply_to(ErofsTree(disk, fresh=False))


# A layer that touches what the samples of both file systems hold: adds, links, replaces, changes and removes.
def _apply_to(tree: Ext4Tree | ErofsTree) -> None:
    try:
        apply_layer(io.BytesIO(_layer_on_base(tree)), "layer", tree)
        tree.finish()
    except OSError as error:  # as the kernel says of what cannot be done, on a disk that is full above all
        assert error.errno is not None


def _layer_on_base(tree: Ext4Tree | ErofsTree) -> bytes:
    names = sorted(tree.names(b""))[:8]
    members = [member("new", b"n" * 5000), directory("new-directory")]
    for number, raw in enumerate(names):
        name = raw.decode("utf-8", "surrogateescape")
        seen = tree.look(raw)
        if seen is not None and seen.is_directory:
            members += [directory(name, mode=0o700, xattrs={"user.changed": b"v" * 300}), member(f"{name}/in", b"x")]
        elif seen is not None and seen.format == stat.S_IFREG:
            members.append(hardlink(f"link{number}", name))
        if number % 3 == 2:
            members.append(member(f".wh.{name}"))
    return tar_bytes(members)


@cache
def _golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def _goldens(*names: str) -> Callable[[], list[bytes]]:
    return lambda: [_golden(name) for name in names]


def _zfile_seeds() -> list[bytes]:
    text = _golden("zfile/text.bin")[:20_000]
    made = [
        compress(text, 4096 << n, kind, verify=crc)
        for n in (0, 4)
        for kind in ("lz4", "zstd")
        for crc in (True, False)
    ]
    return [*made, compress(text, overwrite_header=False), _golden("zfile/empty.lz4.4.zfile")]


def _layer_seeds() -> list[bytes]:
    names = ("l2.plain.lsmt", "l1.lz4tar.lsmt", "l2.lz4.lsmt", "l1.sealed.lsmt", "c1.empty.lsmt", "l1.zstd16.lsmt")
    return [_golden(f"lsmt/{name}") for name in names]


def _turbo_blob_seeds() -> list[bytes]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("ext4.fs.meta", ".turbo.ociv1", "gzip.meta"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    return [out.getvalue()]


def _warp_seeds() -> list[bytes]:
    rows = [(0, 1, 8, False, 0), (1, 2, 1, False, 1), (5, 1, 9, True, 0), (7, 150, 2, False, 1)]
    lowered = [(0, 1, 8, False, 4), (3, 9, 0, False, 5)]
    return [
        *(sealed_bytes(some, bytes(1024), 1 << 20) for some in (rows, lowered)),
        _golden("turbooci/plain.tar.ext4.fs.meta"),
    ]


def _config_seeds() -> list[bytes]:
    lowers = [{"file": "/a", "digest": "sha256:" + "1" * 64, "size": 5, "dir": "/d"}, {"dir": "/e"}]
    full = {
        "repoBlobUrl": "https://host/v2/a/blobs",
        "lowers": lowers,
        "upper": {"index": "/i", "data": "/d", "vsize": 64},
        "resultFile": "/r",
        "download": {"enable": True, "delay": 3},
        "accelerationLayer": True,
        "recordTracePath": "/t",
    }
    return [json.dumps(full).encode(), b'{"lowers":null}', b"{}"]


def _credential_seeds() -> list[bytes]:
    entries = {"a.example": {"auth": "dXNlcjpwYXNz"}, "https://b.example/v1/": {"username": "u", "password": "p"}}
    return [json.dumps({"auths": entries}).encode()]


def _answer_seeds() -> list[bytes]:
    return [b'{"traceId":"1","success":true,"data":%b}' % seed for seed in _credential_seeds()]


def _service_config_seeds() -> list[bytes]:
    original = {
        "logConfig": {"logLevel": 1, "logPath": "/l"},
        "cacheConfig": {"cacheType": "file", "cacheDir": "/c", "cacheSizeGB": 4, "refillSize": 262144},
        "credentialConfig": {"mode": "http", "path": "http://h/a", "timeout": 2},
        "download": {"enable": True, "delay": 600, "delayExtra": 30, "maxMBps": 100},
        "p2pConfig": {"enable": True, "address": "http://localhost:1/x"},
        "certConfig": {"certFile": "/c", "keyFile": "/k"},
    }
    return [json.dumps(original).encode(), Settings().to_json().encode()]


def _host_certificate_seeds() -> list[bytes]:
    return [b'ca = "/a.crt"\nclient = [["/a.cert", "/a.key"]]\n[host."https://host"]\nskip_verify = true\n']


def _challenge_seeds() -> list[bytes]:
    return [
        b'Bearer realm="https://a.example/token",service="s",scope="repository:a/b:pull", Basic realm="x"',
        b"Basic",
    ]


def _reference_seeds() -> list[bytes]:
    return [b"registry.example:5000/a/b:tag@sha256:" + b"1" * 64, b"[::1]:5000/name", b"host.example/name:tag"]


def _tar_seeds() -> list[bytes]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, pax in (
            ("etc", tarfile.DIRTYPE, {}),
            ("etc/passwd", tarfile.REGTYPE, {"SCHILY.xattr.user.a": "b", "mtime": "1.5"}),
            ("etc/link" * 30, tarfile.SYMTYPE, {}),
            ("etc/hard", tarfile.LNKTYPE, {}),
            ("etc/.wh.gone", tarfile.REGTYPE, {}),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.pax_headers, info.linkname = kind, pax, "etc/passwd"
            info.size = 1000 if name == "etc/passwd" else 0
            tar.addfile(info, io.BytesIO(b"x" * 1000))
    return [out.getvalue(), _golden("ext4/layer2.tar"), gnu_only_layer()]


def _applied_seeds() -> list[bytes]:
    return [_tar_seeds()[0], gnu_only_layer()]


def _ext4(data: bytes) -> None:
    volume = Volume(MemoryBlob(data))
    _visit(volume, volume.extents)


def _erofs(data: bytes) -> None:
    volume = ErofsVolume(MemoryBlob(data))
    _visit(volume, lambda inode: list(volume.places(inode)))


def _visit(volume: Volume | ErofsVolume, places: Callable[[Any], object]) -> None:
    for _, number, inode in volume.walk():
        volume.xattrs(inode)
        if inode.is_directory:
            volume.entries(number)
        elif stat.S_ISLNK(inode.mode):
            volume.readlink(inode)
        elif stat.S_ISREG(inode.mode):
            places(inode)
            volume.read(inode, 0, _STEP)


@cache
def _ext4_seeds() -> list[bytes]:
    return [small_file_system(), large_directory()]


@cache
def _erofs_seeds() -> list[bytes]:
    layer = _tar_seeds()[0]
    return [file_system_of(layer), file_system_of(layer, layer)]


def _bolt(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with BoltFile(Path(file.name)) as bolt:
            read_snapshots(bolt)


def _hosts(data: bytes) -> None:
    parse_hosts(data, "hosts.toml")


def _hosts_seeds() -> list[bytes]:
    text = (
        'server = "https://a"\n[host."https://b:5000/c"]\ncapabilities = ["pull", "resolve"]\noverride_path = true\n'
    )
    return [text.encode(), (text + '[host."https://b:5000/c".header]\nx-a = ["b", "c"]\n').encode()]


class _Spoken(Connection):
    """A client that has said all it will."""

    def __init__(self, data: bytes) -> None:
        self._said = io.BytesIO(data)

    def receive(self, length: int, timeout_s: float, *, may_idle: bool = False) -> bytearray:
        data = bytearray(self._said.read(length))
        if len(data) < length:
            raise ConnectionLostError("client is gone")
        return data

    def send(self, parts: list[bytes], timeout_s: float) -> None:
        assert sum(map(len, parts)) <= _MOST_READ


def _nbd(data: bytes) -> None:
    disk = MemoryWritable(1 << 16)
    export = NbdExport(disk, "disk", extents=lambda _, length: [(length, True)])
    client = Client(_Spoken(data), export, Budget(1 << 26))
    if client.negotiate():
        while client.next_request():
            pass
    assert len(disk.data) == disk.size == 1 << 16


def _nbd_seeds() -> list[bytes]:
    hello, bye = FIXED_NEWSTYLE.to_bytes(4, "big"), request(Command.DISCONNECT)
    changes = [
        request(Command.WRITE, 512, 512, data=bytes(512), flags=1),
        request(Command.TRIM, 0, 4096),
        request(Command.WRITE_ZEROES, 100, 5000, flags=2),
        request(Command.FLUSH),
    ]
    structured = (
        option(Option.STRUCTURED_REPLY) + meta(ALLOCATION, number=Option.LIST_META_CONTEXT) + meta(ALLOCATION)
    )
    asks = [request(Command.READ, 0, 4096), request(Command.BLOCK_STATUS, 0, 1 << 16)]
    return [
        hello + go(b"disk", Option.INFO) + option(Option.LIST) + option(Option.ABORT),
        hello + option(Option.EXPORT_NAME, b"disk") + b"".join(changes) + bye,
        hello + structured + go() + b"".join(asks) + bye,
    ]


def _tcmu_ring(data: bytes) -> None:
    memory = bytearray(data)
    ring = tcmu_ring.Ring(memory)
    for command in ring.take():
        assert all(tcmu.is_data(memory, begin, length) for begin, length in tcmu.data_of(command))
        ring.complete(command[0], 0)
    ring.take()


# A command, as long as its group says, and what comes with it.
def _scsi(data: bytes) -> None:
    cdb, content = data.ljust(24, b"\0")[: tcmu.length_of(data)], data[16:]
    disk = ScsiDisk(MemoryWritable(1 << 16), serial="0123456789abcdef", description="overlaybd//config")
    if not cdb:
        return
    if cdb[0] in scsi.WRITES:
        disk.write(cdb, content)
    elif cdb[0] in scsi.READS:
        transfer = scsi.transfer_of(cdb)
        assert len(disk.read(transfer.lba, transfer.blocks, 4096)) <= 4096
    else:
        assert len(disk.execute(cdb, content)) <= 4096
    assert disk.blob.size == 1 << 16


def _tcmu_events(data: bytes) -> None:
    for event in netlink.parse_events(data, tcmu.FAMILY):
        UioName.parse(event.name)


def _trace(data: bytes) -> None:
    trace = Trace.from_bytes(data)
    assert Trace.from_bytes(trace.to_bytes()).reads() == trace.reads()


def _trace_seeds() -> list[bytes]:
    return [content_of_layer(_golden("image/acceleration-layer.tar")), Trace.from_reads([(0, 0, 512)]).to_bytes()]


def _priority_list(data: bytes) -> None:
    PriorityList.from_bytes(data)


def _profile(data: bytes) -> None:
    # Compressed, or nearly everything would be refused for that.
    profile = Profile.from_bytes(zstandard.ZstdCompressor().compress(data))
    assert Profile.from_bytes(profile.to_bytes()).files == profile.files
    for file in profile.files:
        for read in file.reads:
            list(read.ranges())


def _shell(data: bytes) -> None:
    variables = Variables({"HOME": "/srv", "PATH": "/bin:/usr/bin"})
    variables.name_script("/opt/app/run.sh")
    for words in commands_in(data.decode(errors="surrogateescape"), variables):
        assert words
        assert all(len(word) <= 4096 for word in words)
        unwrapped(words)
    for name, value in variables.environment().items():
        assert variables.values(name)[0] == value
    list(names_in(data))


_SCRIPTS = (
    b"""#!/bin/sh
PRG="$0"; DIR=`dirname "$PRG"`
[ -z "$JAVA_HOME" ] && JAVA_HOME=/usr/lib/jvm
. "$DIR/env.sh"
eval exec "\\"$JAVA_HOME/bin/java\\"" -cp "$DIR/a.jar:${LIB:-/lib}/b.jar" "$@"
""",
    b"""
: ${D=/usr/lib/R}
for each in /a "${D%/*}"; do
  if test -x $each; then exec ${each##*/} $(cd "$D" && pwd); fi
done
""",
)


def _profile_seeds() -> list[bytes]:
    file = File("/usr/bin/a1", [0, 1], [1], [Read(1, 9000, 5, [0, 1, 1, 1])])
    made = Profile(["one", "two"], [file], made="so").to_bytes()
    return [zstandard.ZstdDecompressor().decompress(made, max_output_size=1 << 20)]


TARGETS = {
    "nbd": Target(_nbd, _nbd_seeds),
    "tcmu-ring": Target(_tcmu_ring, tcmu.ring_seeds),
    "scsi": Target(_scsi, tcmu.scsi_seeds),
    "tcmu-events": Target(_tcmu_events, tcmu.event_seeds, strict=False),
    "zfile": Target(_zfile, _zfile_seeds),
    "tar-wrap": Target(_tar, _goldens("zfile/text.lz4.4.tar.zfile", "image/acceleration-layer.tar")),
    "layer": Target(_layer, _layer_seeds),
    "warp": Target(_warp, _warp_seeds),
    "gzip-index": Target(_gzip_index, _gzip_index_seeds),
    "gzip-target": Target(_gzip_target, _goldens("turbooci/good.tar.gz")),
    "zstd-layer": Target(_zstd_layer, _zstd_seeds),
    "zstd-index": Target(_zstd_index, _zstd_index_seeds),
    "turbo-blob": Target(_turbo_blob, _turbo_blob_seeds),
    "stack": Target(_stack, _layer_seeds),
    "append-log": Target(_append_log, _goldens("lsmt/l1.index", "lsmt/l2.index", "lsmt/c1.index")),
    "qcow2": Target(
        _qcow2, lambda: [b"QFI\xfb" + bytes((0, 0, 0, 3)) + bytes(16) + (1 << 30).to_bytes(8, "big") + bytes(80)]
    ),
    "partitions": Target(_partitions, _partition_seeds),
    "config": Target(_config, _config_seeds),
    "manifest": Target(_manifest, _goldens("image/manifest.json", "image/manifest.with-trace.json")),
    "image-config": Target(_image_config, _goldens("image/config.json", "image/config.with-trace.json")),
    "credentials": Target(_credentials, _credential_seeds),
    "credentials-answer": Target(_credentials_answer, _answer_seeds),
    "service-config": Target(_service_config, _service_config_seeds),
    "host-certificates": Target(_host_certificates, _host_certificate_seeds),
    "challenges": Target(_challenges, _challenge_seeds, strict=False),
    "hosts": Target(_hosts, _hosts_seeds),
    "reference": Target(_reference, _reference_seeds),
    "layer-tar": Target(_layer_tar, _tar_seeds),
    "layer-applied": Target(_layer_applied, _applied_seeds),
    "ext4": Target(_ext4, _ext4_seeds),
    "erofs": Target(_erofs, _erofs_seeds),
    "ext4-base": Target(_on_ext4_base, _ext4_seeds),
    "erofs-base": Target(_on_erofs_base, _erofs_seeds),
    "bolt": Target(_bolt, lambda: [bolt_file(snapshots()), bolt_file(snapshots(1))]),
    "trace": Target(_trace, _trace_seeds),
    "acceleration-layer": Target(content_of_layer, _goldens("image/acceleration-layer.tar")),
    "profile": Target(_profile, _profile_seeds),
    "shell": Target(_shell, lambda: list(_SCRIPTS), strict=False),
    "priority-list": Target(_priority_list, lambda: [b"/bin/sh\n/usr/lib/\n/opt/x*\n"]),
}

#: What a parser may raise.
ALLOWED = (ObdlabError,)
