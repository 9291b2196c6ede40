"""Images in tar archives: those of ``docker save``, and packed OCI layouts (skopeo's oci-archive).

Nothing in an archive is trusted: members are found by name and never unpacked, links lead to other members only, and
bytes read are checked against their digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from obdlab.convert.decompress import decompressed, is_compressed
from obdlab.convert.endpoints.endpoint import ImageSource
from obdlab.convert.endpoints.layout import ImageLayout, VerifiedFile
from obdlab.convert.endpoints.layoutimages import LayoutDestination
from obdlab.convert.tar.forward import MAX_HEADERS_SIZE
from obdlab.errors import CorruptBlobError, FormatError, ObdlabError, SourceError
from obdlab.formats import oci
from obdlab.localfile import open_regular
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob

_MAX_MEMBERS = 200_000
# Of all members together. Headers are parsed into many times their size.
_MAX_HEADERS = 256 << 20
_MAX_LINKS = 8
# As in layers: the limit that other readers of container archives have for one pax or long name header.
_MAX_HEADER = 1 << 20
_COPY = 1 << 20
_MANIFEST = "manifest.json"

# Offset and size of a plain file's bytes, or the name of the member that a link leads to; None for any other member.
_Member = tuple[int, int] | str | None


class Archive:
    """A tar file on disk, its members found by name. A compressed one is unpacked to an unnamed file.

    Raises SourceError if it cannot be read, FormatError if it is not a tar.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            self._file: IO[bytes] = open_regular(path)
        except OSError as error:
            raise SourceError(f"cannot read the archive: {error.strerror}", blob=self.name) from error
        #: Path of the uncompressed tar.
        self.path = path
        try:
            if is_compressed(self._file.read(4)):
                self._file.seek(0)
                self._file = _unpacked(self._file, self.name)
                self.path = Path(f"/proc/self/fd/{self._file.fileno()}")
            self._file.seek(0)
            self._members = self._list()
        except OSError as error:
            self.close()
            raise SourceError(f"cannot read the archive: {error.strerror}", blob=self.name) from error
        except BaseException:
            self.close()
            raise

    def _list(self) -> dict[str, _Member]:
        # tarfile keeps every member with its headers, and copies global headers into each: here neither is kept.
        found: dict[str, _Member] = {}
        headers = _Headers(self._file)
        try:
            file = cast("IO[bytes]", headers)
            with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
                for count, member in enumerate(tar, 1):
                    if count > _MAX_MEMBERS:  # names that come again are members, too
                        raise FormatError("archive has too many members", blob=self.name, wanted=_MAX_MEMBERS)
                    name = _normal(member.name)
                    found[name] = _member(name, member)
                    headers.begin_member()
                    tar.members = []  # type: ignore[attr-defined]  # typeshed lacks it
                    tar.pax_headers = {}
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError) as error:
            raise FormatError(f"not a tar archive ({error})", blob=self.name) from error
        return found

    def __contains__(self, name: str) -> bool:
        return _normal(name) in self._members

    def find(self, name: str) -> tuple[int, int]:
        """Return offset and size of a file's bytes, links followed. Raises FormatError if the file is missing."""
        at = _normal(name)
        for _ in range(_MAX_LINKS):
            if at not in self._members:
                raise FormatError("archive has no such file", blob=self.name, wanted=repr(at))
            member = self._members[at]
            if isinstance(member, tuple):
                return member
            if member is None:
                break
            at = member
        raise FormatError("archive's member is no plain file", blob=self.name, got=repr(name))

    def read(self, name: str, max_size: int) -> bytes:
        """Return a small file. Raises FormatError."""
        start, size = self.find(name)
        if size > max_size:
            raise FormatError(f"{name} too large", blob=self.name, got=size, wanted=f"at most {max_size}")
        data = os.pread(self._file.fileno(), size, start)
        if len(data) != size:
            raise FormatError("archive ends early", blob=self.name, offset=start, got=len(data), wanted=size)
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _member(name: str, info: tarfile.TarInfo) -> _Member:
    if info.issym():
        return _normal(posixpath.join(posixpath.dirname(name), info.linkname))
    if info.islnk():
        return _normal(info.linkname)
    return (info.offset_data, info.size) if info.isreg() and not info.issparse() else None


class _Headers:
    """The part of a file that tarfile needs to list members: reading headers, whose sizes come from the archive."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = _MAX_HEADERS
        self.tell, self.seek = file.tell, file.seek
        self.begin_member()

    def begin_member(self) -> None:
        """Begin to count the bytes of one member's headers."""
        self._left_of_member = MAX_HEADERS_SIZE

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer only at the end. Raises tarfile.StreamError for headers that are too large."""
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.StreamError(f"extended header of {size} bytes, at most {_MAX_HEADER} are allowed")
        self._left -= size
        self._left_of_member -= size
        if self._left_of_member < 0:
            raise tarfile.StreamError(f"headers of one member are longer than {MAX_HEADERS_SIZE} bytes")
        if self._left < 0:
            raise tarfile.StreamError(f"headers are longer than {_MAX_HEADERS} bytes")
        return self._file.read(size)


def _unpacked(packed: IO[bytes], name: str) -> IO[bytes]:
    file = tempfile.TemporaryFile(prefix="obdlab-archive-", dir="/var/tmp")  # noqa: SIM115 - the archive closes it
    try:
        with packed:
            for piece in decompressed(packed, name):
                file.write(piece)
        file.flush()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return cast("IO[bytes]", file)


def _normal(name: str) -> str:
    return posixpath.normpath("/" + name).lstrip("/")


class ArchivedLayout(ImageLayout):
    """An OCI layout in a tar, for reading."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._archive = Archive(path)

    def blob_file(self, descriptor: oci.Descriptor) -> Path | None:
        return None

    def blob_size(self, digest: str) -> int | None:
        name = self._name(digest)
        return self._archive.find(name)[1] if name in self._archive else None

    def _name(self, digest: str) -> str:
        return f"blobs/sha256/{oci.check_digest(digest, str(self.root)).removeprefix('sha256:')}"

    def open_blob(self, descriptor: oci.Descriptor) -> VerifiedFile:
        start, size = self._archive.find(self._name(descriptor.digest))
        return _window(self._archive, start, size, descriptor)

    def _index_bytes(self) -> bytes:
        return self._archive.read("index.json", oci.MAX_MANIFEST_SIZE)

    def close(self) -> None:
        self._archive.close()


def _window(archive: Archive, start: int, size: int, descriptor: oci.Descriptor) -> VerifiedFile:
    if size != descriptor.size:
        raise CorruptBlobError("blob has a wrong size", blob=archive.name, got=size, wanted=descriptor.size)
    return VerifiedFile(archive.path, descriptor, start, name=archive.name)


class DockerArchiveSource(ImageSource):
    """An image in a ``docker save`` archive, named by one of its tags unless it is the only image.

    The archive has no manifest as registries have them. The one made here is always the same for the same archive.
    """

    def __init__(self, path: Path, tag: str | None) -> None:
        self.name = f"docker-archive:{path}" + (f":{tag}" if tag else "")
        self._archive = Archive(path)
        try:
            self._entry = self._select(tag)
            self._config_name = self._text(self._entry.get("Config"))
            config = self._archive.read(self._config_name, oci.MAX_CONFIG_SIZE)
            self._config = oci.Descriptor(oci.DOCKER_CONFIG, oci.digest_of(config), len(config))
            self._members: dict[str, tuple[int, int]] = {}
            manifest = oci.Manifest(
                config=self._config,
                layers=self._layers(oci.Config.parse(config, f"{self.name} config").diff_ids),
                media_type=oci.DOCKER_MANIFEST,
            )
        except BaseException:
            self._archive.close()
            raise
        self._manifest_bytes = manifest.to_bytes()
        self._root = oci.Descriptor(
            oci.DOCKER_MANIFEST, oci.digest_of(self._manifest_bytes), len(self._manifest_bytes)
        )

    def close(self) -> None:
        self._archive.close()

    def fetch(self, layer: oci.Descriptor, directory: Path, advance: Callable[[int], None]) -> VerifiedFile:
        start, size = self._members[layer.digest]
        advance(layer.size)  # first: it raises if the conversion was stopped
        return _window(self._archive, start, size, layer)

    def open_blob(self, descriptor: oci.Descriptor) -> Blob:
        start, size = self._members[descriptor.digest]
        with _window(self._archive, start, size, descriptor) as file:
            return file.as_blob()

    def root(self) -> tuple[oci.Descriptor | None, oci.Manifest | oci.Index]:
        return self._root, oci.Manifest.parse(self._manifest_bytes, self.name)

    def _read(self, descriptor: oci.Descriptor, max_size: int) -> bytes:
        if descriptor.digest == self._root.digest:
            return self._manifest_bytes
        return self._archive.read(self._config_name, max_size)

    def _layers(self, diff_ids: tuple[str, ...]) -> tuple[oci.Descriptor, ...]:
        names = [self._text(name) for name in self._list(self._entry.get("Layers"))]
        if len(names) != len(diff_ids):
            raise FormatError(
                "config and archive disagree about the number of layers",
                blob=self.name,
                got=f"{len(diff_ids)} diff_ids",
                wanted=f"{len(names)} layers",
            )
        return tuple(self._layer(name, diff_id) for name, diff_id in zip(names, diff_ids, strict=True))

    def _layer(self, name: str, diff_id: str) -> oci.Descriptor:
        start, size = self._archive.find(name)
        with self._archive.path.open("rb") as file:
            file.seek(start)
            media_type, digest = oci.DOCKER_LAYER, diff_id
            if is_compressed(file.read(4)):
                # The archive does not contain its digest.
                file.seek(start)
                media_type, digest = oci.DOCKER_LAYER_GZIP, _digest(file, size)
        self._members[digest] = start, size
        return oci.Descriptor(media_type, digest, size)

    def _select(self, tag: str | None) -> dict[str, Any]:
        try:
            document = json.loads(self._archive.read(_MANIFEST, oci.MAX_MANIFEST_SIZE))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{_MANIFEST}: not JSON ({error})", blob=self.name) from None
        entries = [entry for entry in self._list(document) if isinstance(entry, dict)]
        tags = {self._text(name): entry for entry in entries for name in self._list(entry.get("RepoTags") or [])}
        if tag is None and len(entries) == 1:
            return entries[0]
        chosen = [] if tag is None else [entry for name, entry in tags.items() if _same_name(name, tag)]
        if not chosen:
            raise FormatError(
                "archive has no such image" if tag else "archive names no single image without a tag",
                blob=self.name,
                got=", ".join(sorted(tags))[:400] or f"{len(entries)} images without tags",
                wanted=tag or "docker-archive:FILE:NAME:TAG",
            )
        return chosen[0]

    def _list(self, value: object) -> list[Any]:
        if not isinstance(value, list):
            raise FormatError(
                f"{_MANIFEST}: wrong JSON type", blob=self.name, got=repr(value)[:80], wanted="an array"
            )
        return value

    def _text(self, value: object) -> str:
        if not isinstance(value, str):
            raise self._wrong_type(value, "a name")
        return value

    def _wrong_type(self, value: object, wanted: str) -> FormatError:
        return FormatError(f"{_MANIFEST}: wrong JSON type", blob=self.name, got=repr(value)[:80], wanted=wanted)


def _digest(file: IO[bytes], size: int) -> str:
    digest = hashlib.sha256()
    while size and (piece := file.read(min(size, _COPY))):
        digest.update(piece)
        size -= len(piece)
    return f"sha256:{digest.hexdigest()}"


def _same_name(one: str, other: str) -> bool:
    # "redis:7" is docker.io/library/redis:7.
    if one == other:
        return True
    try:
        return Reference.parse(one) == Reference.parse(other)
    except ObdlabError:
        return False


class ArchiveDestination(LayoutDestination):
    """A new OCI layout packed as a tar. The complete archive appears when the image is named, or not at all."""

    def __init__(self, path: Path, tag: str) -> None:
        self._path = path
        try:
            if path.exists() and not path.is_file():
                raise SourceError("not a regular file", blob=str(path))
            self._directory = tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)
        except OSError as error:
            raise SourceError(f"cannot make the archive: {error.strerror}", blob=str(path)) from error
        try:
            super().__init__(Path(self._directory) / "layout", tag)
        except BaseException:
            self.close()
            raise
        self.name = f"oci-archive:{path}:{tag}"

    @property
    def place(self) -> tuple[str, str] | None:
        return None

    def put_manifest(self, descriptor: oci.Descriptor, data: bytes, *, tagged: bool = True) -> None:
        super().put_manifest(descriptor, data, tagged=tagged)
        if tagged:
            self._pack()

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _pack(self) -> None:
        root, made = Path(self._directory) / "layout", Path(self._directory) / "tar"
        try:
            with tarfile.open(made, "w", format=tarfile.PAX_FORMAT) as tar:
                for path in sorted(root.rglob("*")):
                    _add(tar, path, str(path.relative_to(root)))
            made.chmod(0o644)
            os.replace(made, self._path)
        except OSError as error:
            with suppress(OSError):
                made.unlink()
            raise SourceError(f"cannot write the archive: {error.strerror}", blob=str(self._path)) from error


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    # Only values that do not depend on the user and the time of packing.
    info = tarfile.TarInfo(name)
    if path.is_dir():
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(info)
        return
    info.mode, info.size = 0o644, path.stat().st_size
    with path.open("rb") as file:
        tar.addfile(info, file)
