"""OCI image layout directories: blobs by digest and an index with tags (OCI image layout specification)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self, cast

from obdlab.closing import Closing
from obdlab.errors import CorruptBlobError, FormatError, SourceError
from obdlab.formats.oci import MAX_MANIFEST_SIZE, OCI_INDEX, Descriptor, Index, check_digest, to_json
from obdlab.formats.tar import TarWindow
from obdlab.layers.tarwrap import WrappedContent
from obdlab.localfile import LocalFile, open_regular, read_regular
from obdlab.system.locks import directory_locked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.blob import Blob

REF_NAME = "org.opencontainers.image.ref.name"
_MARK = "oci-layout"
_INDEX = "index.json"
_BLOBS = "blobs"
# Prefix of files that are being written.
_NEW = ".new-"
_VERSION = {"imageLayoutVersion": "1.0.0"}
_TAG = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_COPY = 1 << 20
# A holder only writes small files.
_LOCK_WAIT_S = 30.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


class ImageLayout:
    """One layout directory. Nothing in it is trusted: bytes read are checked against their descriptor.

    Several processes may write into one layout: its index is changed under a lock of the directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def create(cls, root: Path) -> Self:
        """Open the layout at ``root``; an empty one is made if it is missing, or finished if it is half made.

        Raises SourceError if the directory holds something else or cannot be made.
        """
        layout = cls(root)
        layout.check_place()
        try:
            if (root / _MARK).exists():
                return layout
            root.mkdir(parents=True, exist_ok=True)
            with layout._locked():
                layout.check_place()  # again: another process may have written into it meanwhile
                if not (root / _MARK).exists():
                    layout._make()
        except OSError as error:
            raise SourceError(f"cannot make an OCI layout: {error.strerror}", blob=str(root)) from error
        return layout

    def _make(self) -> None:
        # The mark is the last file: a directory without it is half made.
        (self.root / _BLOBS / "sha256").mkdir(parents=True, exist_ok=True)
        if not (self.root / _INDEX).exists():
            self._replace(self.root / _INDEX, Index(()).to_bytes())
        self._replace(self.root / _MARK, json.dumps(_VERSION).encode())

    def check_place(self) -> None:
        """Raise SourceError unless the directory is a layout, or create() could make one there. Changes nothing."""
        try:
            if (self.root / _MARK).exists():
                return
            above = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
            if above == self.root and not _is_half_made({path.name for path in self.root.iterdir()}):
                raise SourceError("directory is neither empty nor an OCI layout", blob=str(self.root))
            if not above.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(above, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise SourceError(f"cannot make an OCI layout: {error.strerror}", blob=str(self.root)) from error

    def index(self) -> Index:
        """Return index.json. Raises SourceError if it cannot be read, FormatError if it is malformed."""
        path = self.root / _INDEX
        return Index.parse(self._index_bytes(), str(path))

    def _index_bytes(self) -> bytes:
        path = self.root / _INDEX
        try:
            return read_regular(path, MAX_MANIFEST_SIZE)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SourceError("no OCI layout (it has no index.json)", blob=str(self.root)) from error
        except OSError as error:
            raise SourceError(f"cannot read it: {error.strerror}", blob=str(path)) from error

    def select(self, tag: str | None) -> tuple[Descriptor, ...]:
        """Return the index entries with ``tag``, without a tag those of the only image. Raises FormatError."""
        entries = self.index().manifests
        names = {entry.annotations.get(REF_NAME, "") for entry in entries}
        if tag is None:
            if not entries or len(names) > 1:
                raise self._unclear("names no single image without a tag", names, "oci:DIR:TAG")
            return entries
        chosen = tuple(e for e in entries if _is_named(e.annotations.get(REF_NAME, ""), tag))
        if not chosen:
            raise self._unclear("has no such tag", names, tag)
        return chosen

    def only_tag(self) -> str | None:
        """Return the tag of the layout's only image, or None. Raises as index() does."""
        names = {entry.annotations.get(REF_NAME, "") for entry in self.index().manifests}
        return names.pop() or None if len(names) == 1 else None

    def blob_path(self, digest: str) -> Path:
        """Return the path of a blob. Raises FormatError if ``digest`` is malformed."""
        return self.root / _BLOBS / "sha256" / check_digest(digest, str(self.root)).removeprefix("sha256:")

    def blob_file(self, descriptor: Descriptor) -> Path | None:
        """Return the path of the file that is the blob; None if no file holds just this blob."""
        return self.blob_path(descriptor.digest)

    def blob_size(self, digest: str) -> int | None:
        """Return the size of a blob; None if it is not here."""
        try:
            return self.blob_path(digest).stat().st_size
        except OSError:
            return None

    def open_blob(self, descriptor: Descriptor) -> VerifiedFile:
        """Open a blob for one reading, which checks size and digest. Raises SourceError if it cannot be opened."""
        return VerifiedFile(self.blob_path(descriptor.digest), descriptor)

    def read_blob(self, descriptor: Descriptor, max_size: int) -> bytes:
        """Return a whole blob of at most ``max_size`` bytes, checked."""
        if descriptor.size > max_size:
            path = self.blob_path(descriptor.digest)
            raise FormatError("blob too large", blob=str(path), got=descriptor.size, wanted=f"at most {max_size}")
        with self.open_blob(descriptor) as file:
            return file.read()

    def close(self) -> None:
        """Release resources. A layout directory holds no resources."""

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Return True if the layout has a file of the blob's size under its digest."""
        try:
            return self.blob_path(descriptor.digest).stat().st_size == descriptor.size
        except FileNotFoundError:
            return False
        except OSError as error:
            raise SourceError(f"cannot look for it: {error.strerror}", blob=str(self.root)) from error

    def add_file(self, digest: str, source: Path) -> bool:
        """Copy a file in as the blob ``digest``, without checking it; return False if the layout has it already.

        A blob of another size than the file's is damaged, and is replaced.
        """
        target = self.blob_path(digest)
        try:
            if target.stat().st_size == source.stat().st_size:
                return False
        except FileNotFoundError:
            pass
        except OSError as error:
            raise SourceError(f"cannot look for it: {error.strerror}", blob=str(target)) from error
        self._replace(target, source)
        return True

    def add_bytes(self, digest: str, data: bytes) -> None:
        """Store a small blob."""
        self._replace(self.blob_path(digest), data)

    def set_tag(self, tag: str, descriptor: Descriptor) -> None:
        """Make ``tag`` refer to ``descriptor`` only. Raises SourceError, temporary if it stays locked."""
        named = Descriptor(
            descriptor.media_type,
            descriptor.digest,
            descriptor.size,
            annotations={**descriptor.annotations, REF_NAME: tag},
            platform=descriptor.platform,
        )
        with self._locked():
            kept = [e for e in self.index().manifests if e.annotations.get(REF_NAME) != tag]
            document = {
                "schemaVersion": 2,
                "mediaType": OCI_INDEX,
                "manifests": [entry.to_json() for entry in (*kept, named)],
            }
            self._replace(self.root / _INDEX, to_json(document))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # The directory itself is locked: a file for it would be a stranger in a layout.
        with ExitStack() as held:
            try:
                is_alone = held.enter_context(directory_locked(self.root, _LOCK_WAIT_S))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise SourceError(f"cannot lock it: {error.strerror}", blob=str(self.root)) from error
                is_alone = True  # the file system lacks locks: only one process at a time may write
            if not is_alone:
                raise SourceError("OCI layout is locked by another process", blob=str(self.root), temporary=True)
            yield

    def _replace(self, target: Path, content: bytes | Path) -> None:
        # In one step: a reader finds the whole file or none, also after a loss of power.
        descriptor, temporary = -1, ""
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=_NEW, dir=target.parent)
            with os.fdopen(descriptor, "wb") as file:
                if isinstance(content, Path):
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, file, _COPY)
                else:
                    file.write(content)
                os.fchmod(file.fileno(), 0o644)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException as error:
            if temporary:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
            if isinstance(error, OSError):
                raise SourceError(f"cannot write it: {error.strerror}", blob=str(target)) from error
            raise

    def _unclear(self, what: str, names: set[str], wanted: str) -> FormatError:
        got = ", ".join(sorted(filter(None, names))) or "no tags"
        return FormatError(f"OCI layout {what}", blob=str(self.root), got=got, wanted=wanted)


class VerifiedFile(Closing):
    """A blob file read from start to end. Its last byte is only returned once size and digest are right.

    The blob is the whole file, or begins at its byte ``start``. Raises CorruptBlobError if it does not match its
    descriptor. ``position`` counts the bytes read.
    """

    def __init__(self, path: Path, descriptor: Descriptor, start: int | None = None, *, name: str = "") -> None:
        self.path = path
        self._name = name or str(path)
        self._is_whole = start is None
        self.position = 0
        self._start = start or 0
        self._left = descriptor.size
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise SourceError(f"cannot read it: {error.strerror}", blob=self._name) from error
        size = os.fstat(self._file.fileno()).st_size
        if start is not None:
            self._file.seek(start)
            size = min(size - start, descriptor.size)
        if size != descriptor.size:
            self._file.close()
            raise CorruptBlobError("blob has a wrong size", blob=self._name, got=size, wanted=descriptor.size)

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes, b"" at the end."""
        if size < 0:
            parts = []
            while part := self.read(_COPY):
                parts.append(part)
            return b"".join(parts)
        try:
            data = self._file.read(min(size, self._left))
        except OSError as error:
            raise SourceError(f"cannot read it: {error.strerror}", blob=self._name) from error
        if not data and self._left and size:
            raise CorruptBlobError("blob became shorter", blob=self._name, wanted=self._descriptor.size)
        self._hash.update(data)
        self.position += len(data)
        self._left -= len(data)
        if self._left == 0:
            self._check()
        return data

    def as_blob(self) -> Blob:
        """Return the same bytes for reading by position, unchecked: only reading all of the file checks them."""
        return WrappedContent(LocalFile(self.path), TarWindow(self._start, self._descriptor.size))

    @contextmanager
    def own_file(self, directory: Path) -> Iterator[Path]:
        """Give the block a file that is the blob and nothing else: this one, or a copy below ``directory``.

        All of it is checked first, so this file cannot be read afterwards. Raises SourceError or CorruptBlobError.
        """
        if self._is_whole:
            while self.read(_COPY):  # reading to the end checks its digest
                pass
            yield self.path
            return
        with self._copied(directory) as copy:
            yield Path(copy.name)

    def _copied(self, directory: Path) -> IO[bytes]:
        # Reads from the blob's first byte, which may have been read before.
        try:
            copy = tempfile.NamedTemporaryFile(prefix="blob-", dir=directory)  # noqa: SIM115 - the caller closes it
            try:
                with VerifiedFile(self.path, self._descriptor, self._start, name=self._name) as again:
                    while piece := again.read(_COPY):
                        copy.write(piece)
                copy.flush()
            except BaseException:
                copy.close()
                raise
        except OSError as error:
            raise SourceError(f"cannot copy it: {error.strerror}", blob=self._name) from error
        return cast("IO[bytes]", copy)

    def _check(self) -> None:
        digest = f"sha256:{self._hash.hexdigest()}"
        if digest != self._descriptor.digest:
            raise CorruptBlobError("wrong content", blob=self._name, got=digest, wanted=self._descriptor.digest)

    def close(self) -> None:
        """Close the file; unread bytes stay unchecked."""
        self._file.close()


def _is_half_made(names: set[str]) -> bool:
    # True also for a layout that another process is making meanwhile.
    known = {_BLOBS, _INDEX, _MARK}
    return not names or (_BLOBS in names and all(name in known or name.startswith(_NEW) for name in names))


def split_tag(text: str) -> tuple[Path, str | None]:
    """Read ``PATH[:TAG]``."""
    directory, colon, tag = text.rpartition(":")
    if colon and _TAG.fullmatch(tag):
        return Path(directory), tag
    return Path(text), None


def is_layout(path: Path) -> bool:
    """Return True if a directory is an OCI layout."""
    return (path / _MARK).is_file()


def digest_of_file(path: Path) -> str:
    """Return the digest of a whole file. Raises OSError."""
    with open_regular(path) as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _is_named(name: str, tag: str) -> bool:
    # Some tools write the tag, others the whole reference.
    return name == tag or name.endswith(":" + tag)
