"""OCI images as JSON documents: descriptors, manifests, indexes, image configs, chain IDs.

Sources: OCI image specification 1.1 (descriptor, manifest, image index, config) and the docker v2 schema 2 types,
which have the same shape. Annotation keys are those of overlaybd images.

Documents come from a registry and are not trusted: everything is checked before use, and a violation is a
FormatError naming the document and the field.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, cast

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"

#: Media type of a blob that no manifest describes.
UNKNOWN_TYPE = "application/octet-stream"

MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_INDEX)

#: Annotations of overlaybd layers. The prefix makes containerd pass them on as snapshot labels.
BLOB_DIGEST = "containerd.io/snapshot/overlaybd/blob-digest"
BLOB_SIZE = "containerd.io/snapshot/overlaybd/blob-size"
BLOB_FS_TYPE = "containerd.io/snapshot/overlaybd/blob-fs-type"
OVERLAYBD_VERSION = "containerd.io/snapshot/overlaybd/version"
ACCELERATION_LAYER = "containerd.io/snapshot/overlaybd/acceleration-layer"
#: Annotation of a layer that holds the data a start reads: "yes".
HOT_LAYER = "containerd.io/snapshot/obdlab/hot-layer"
#: Annotation of a layer: the root of its hash tree and the digest of the tree's file
#: (:class:`obdlab.formats.hashtree.TreeReference`).
HASH_TREE = "containerd.io/snapshot/obdlab/hash-tree"
#: The label of an image's topmost snapshot that names a trace in its repository: "digest,size".
TRACE_LABEL = "containerd.io/snapshot/obdlab/trace"
#: Annotation with the digest of a turboOCI layer's file of sums, by which reads of its target are checked.
TAR_SUMS = "containerd.io/snapshot/obdlab/tar-sums"
#: Label: "content-store" for a turboOCI layer whose target is in containerd's content store. obdlab's client drops an
#: annotation of this name, others pass it.
TURBO_TARGET_PLACE = "containerd.io/snapshot/obdlab/turbo-target-place"
IN_CONTENT_STORE = "content-store"
TURBO_TARGET_DIGEST = "containerd.io/snapshot/overlaybd/turbo-oci/target-digest"
TURBO_TARGET_MEDIA_TYPE = "containerd.io/snapshot/overlaybd/turbo-oci/target-media-type"
FASTOCI_TARGET_DIGEST = "containerd.io/snapshot/overlaybd/fastoci/target-digest"
FASTOCI_TARGET_MEDIA_TYPE = "containerd.io/snapshot/overlaybd/fastoci/target-media-type"
VERSION_NATIVE = "0.1.0"
VERSION_TURBO = "0.1.0-turbo.ociv1"
#: Artifact type of an overlaybd image that refers to the image it was converted from.
NATIVE_ARTIFACT = "application/vnd.containerd.overlaybd.native.v1+json"
#: The same for a turboOCI image.
TURBO_ARTIFACT = "application/vnd.containerd.overlaybd.turbo.v1+json"
#: The config of an artifact that has no config, and its type (OCI image specification, "Guidelines for artifacts").
EMPTY = b"{}"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
#: The annotation, and its value, that marks BuildKit's attestations among an index's manifests.
REFERENCE_TYPE = "vnd.docker.reference.type"
ATTESTATION = "attestation-manifest"

#: Registries refuse manifests above 4 MiB. Image configs have no standard limit; this one is ours.
MAX_MANIFEST_SIZE = 4 << 20
MAX_CONFIG_SIZE = 8 << 20
# An overlaybd stack has at most 255 layers and overlayfs fewer; this only bounds the entries that are parsed at all.
_MAX_ENTRIES = 4096
_MAX_SIZE = (1 << 63) - 1

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


def is_digest(text: object) -> bool:
    """Return True if ``text`` is a sha256 digest: "sha256:" and 64 lower case hex digits, nothing around it."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def check_digest(text: object, blob: str = "") -> str:
    """Return ``text`` if :func:`is_digest`, else raise FormatError. Only a checked text may become a path or URL."""
    if not is_digest(text):
        raise FormatError("not a digest", blob=blob, got=_short(text), wanted="sha256:<64 hex digits>")
    return cast("str", text)


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """Return the sha256 digest of ``data``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def short_digest(digest: str) -> str:
    """Return a digest shortened for display: "sha256:" and twelve digits."""
    return digest[: len("sha256:") + 12]


def chain_ids(diff_ids: Sequence[str]) -> tuple[str, ...]:
    """Return the chain ID of each layer, bottom first (OCI image specification, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        check_digest(diff_id, "diff_ids")
        chain.append(chain_id_over(chain[-1] if chain else "", diff_id))
    return tuple(chain)


def chain_id_over(parent: str, diff_id: str) -> str:
    """Return the chain ID of a layer over the one whose chain ID is ``parent``, '' for the bottom layer."""
    return digest_of(f"{parent} {diff_id}".encode()) if parent else diff_id


def chain_id(diff_ids: Sequence[str]) -> str:
    """Return the chain ID of the top layer. Raises FormatError on malformed digests or no layers."""
    chain = chain_ids(diff_ids)
    if not chain:
        raise FormatError("no chain ID without layers", blob="diff_ids")
    return chain[-1]


@dataclass(frozen=True, slots=True)
class Platform:
    """The platform an image runs on, in the names of Go's GOOS and GOARCH."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def from_json(cls, value: object, blob: str = "platform") -> Self:
        document = _object(value, blob)
        return cls(
            os=_text(document, "os", blob, default=""),
            architecture=_text(document, "architecture", blob, default=""),
            variant=_text(document, "variant", blob, default=""),
        )


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to content by digest. ``extra`` keeps the fields that this package does not use."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: object, blob: str = "descriptor") -> Self:
        """Return the checked descriptor of parsed JSON. Raises FormatError."""
        document = _object(value, blob)
        platform = document.get("platform")
        known = {"mediaType", "digest", "size", "annotations"}
        return cls(
            media_type=_text(document, "mediaType", blob),
            digest=check_digest(document.get("digest"), f"{blob}.digest"),
            size=_size(document.get("size"), f"{blob}.size"),
            annotations=_annotations(document, blob),
            platform=None if platform is None else Platform.from_json(platform, f"{blob}.platform"),
            extra={key: item for key, item in document.items() if key not in known},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the descriptor in the key order of the OCI Go structs."""
        document: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if "urls" in self.extra:
            document["urls"] = self.extra["urls"]
        if self.annotations:
            document["annotations"] = dict(sorted(self.annotations.items()))
        if "data" in self.extra:
            document["data"] = self.extra["data"]
        if "platform" in self.extra:
            document["platform"] = self.extra["platform"]
        elif self.platform is not None:
            platform = {"architecture": self.platform.architecture, "os": self.platform.os}
            document["platform"] = platform | ({"variant": self.platform.variant} if self.platform.variant else {})
        return document | {key: item for key, item in self.extra.items() if key not in document}

    @property
    def is_overlaybd(self) -> bool:
        """True for an overlaybd layer, by its annotations."""
        return BLOB_DIGEST in self.annotations

    @property
    def turbo_target(self) -> str | None:
        """Digest, unchecked, of the ordinary layer that a turboOCI layer indexes; None for other layers."""
        return self.annotations.get(TURBO_TARGET_DIGEST, self.annotations.get(FASTOCI_TARGET_DIGEST))


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image manifest: one config and its layers, bottom first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = OCI_MANIFEST
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""
    subject: Descriptor | None = None

    @classmethod
    def parse(cls, data: bytes, blob: str = "manifest") -> Self:
        """Read a manifest of either style. Raises FormatError, also for an index or a schema 1 manifest."""
        document = _parse(data, blob, MAX_MANIFEST_SIZE)
        _check_kind(document, blob, "layers", MANIFEST_TYPES, "manifests")
        return cls(
            config=Descriptor.from_json(document.get("config"), f"{blob}.config"),
            layers=_descriptors(document["layers"], f"{blob}.layers"),
            **_common(document, OCI_MANIFEST, blob),
        )

    def to_bytes(self) -> bytes:
        """Return the compact JSON that Go's encoder would write."""
        return _encoded(self, config=self.config.to_json(), layers=[layer.to_json() for layer in self.layers])

    @property
    def is_overlaybd(self) -> bool:
        """True if every layer is an overlaybd layer and there is at least one."""
        return bool(self.layers) and all(layer.is_overlaybd for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Index:
    """An image index (docker: manifest list): one manifest per platform."""

    manifests: tuple[Descriptor, ...]
    media_type: str = OCI_INDEX
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""
    subject: Descriptor | None = None

    @classmethod
    def parse(cls, data: bytes, blob: str = "index") -> Self:
        """Read an index of either style. Raises FormatError."""
        document = _parse(data, blob, MAX_MANIFEST_SIZE)
        _check_kind(document, blob, "manifests", INDEX_TYPES, "layers")
        return cls(
            manifests=_descriptors(document["manifests"], f"{blob}.manifests"),
            **_common(document, OCI_INDEX, blob),
        )

    def to_bytes(self) -> bytes:
        """Return the compact JSON that Go's encoder would write."""
        return _encoded(self, manifests=[manifest.to_json() for manifest in self.manifests])

    def select(self, platform: Platform) -> Descriptor:
        """Return the first manifest for ``platform``, preferring its variant. Raises FormatError if none fits."""
        fitting = [
            entry
            for entry in self.manifests
            if entry.platform is not None
            and (entry.platform.os, entry.platform.architecture) == (platform.os, platform.architecture)
        ]
        if not fitting:
            offered = sorted({f"{p.os}/{p.architecture}" for p in (m.platform for m in self.manifests) if p})
            raise FormatError(
                "index has no image for this platform",
                got=offered or "no platforms",
                wanted=f"{platform.os}/{platform.architecture}",
            )
        exact = [entry for entry in fitting if cast("Platform", entry.platform).variant == platform.variant]
        return (exact or fitting)[0]


@dataclass(frozen=True, slots=True)
class Config:
    """An image config. ``document`` is all of it as parsed, since run time settings are passed on untouched."""

    document: Mapping[str, Any]
    diff_ids: tuple[str, ...]

    @classmethod
    def parse(cls, data: bytes, blob: str = "image config") -> Self:
        """Read an image config. Raises FormatError."""
        document = _parse(data, blob, MAX_CONFIG_SIZE)
        rootfs = _object(document.get("rootfs"), f"{blob}.rootfs")
        diff_ids = _array(rootfs.get("diff_ids"), f"{blob}.rootfs.diff_ids")
        for key in ("os", "architecture", "variant"):
            _text(document, key, blob, default="")
        return cls(document, tuple(check_digest(item, f"{blob}.rootfs.diff_ids") for item in diff_ids))

    @property
    def platform(self) -> Platform:
        """The platform the image was built for."""
        return Platform.from_json({key: self.document.get(key, "") for key in ("os", "architecture", "variant")})

    def with_diff_ids(self, diff_ids: Sequence[str]) -> Self:
        """Return the same config with other layers; all else, also the history, stays as it is."""
        ids = tuple(check_digest(item, "diff_ids") for item in diff_ids)
        rootfs = dict(self.document["rootfs"]) | {"diff_ids": list(ids)}
        return replace(self, document=dict(self.document) | {"rootfs": rootfs}, diff_ids=ids)

    def to_bytes(self) -> bytes:
        """Return compact JSON in the document's key order."""
        return to_json(self.document)


def parse_manifest(data: bytes, blob: str = "manifest") -> Manifest | Index:
    """Read a document that is a manifest or an index, by the list it has. Raises FormatError."""
    document = _parse(data, blob, MAX_MANIFEST_SIZE)
    return Index.parse(data, blob) if "manifests" in document else Manifest.parse(data, blob)


def to_json(document: Mapping[str, Any]) -> bytes:
    """Return compact JSON as Go's json.Marshal writes it: no blanks, ``<``, ``>`` and ``&`` escaped.

    Raises FormatError if a text in it is not Unicode (a lone surrogate).
    """
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise FormatError("text is not Unicode", blob="JSON document") from error


def _parse(data: bytes, blob: str, limit: int) -> dict[str, Any]:
    if len(data) > limit:
        raise FormatError("document too large", blob=blob, got=len(data), wanted=f"at most {limit} bytes")
    try:
        document = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}", blob=blob) from None
    return _object(document, blob)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_kind(
    document: Mapping[str, Any], blob: str, holds: str, media_types: tuple[str, ...], holds_not: str
) -> None:
    version = document.get("schemaVersion")
    if version != 2 or isinstance(version, bool):
        raise FormatError("unsupported schemaVersion", blob=blob, got=_short(version), wanted=2)
    # A document that is both a manifest and an index means different images to different readers.
    if holds not in document or holds_not in document:
        raise FormatError(f"wrong kind of document: wanted one with {holds!r} and no {holds_not!r}", blob=blob)
    media_type = document.get("mediaType", media_types[0])
    if media_type not in media_types:
        raise FormatError("wrong mediaType", blob=blob, got=_short(media_type), wanted=" or ".join(media_types))


# The fields that manifests and indexes have in common.
def _common(document: Mapping[str, Any], media_type: str, blob: str) -> dict[str, Any]:
    subject = document.get("subject")
    return {
        "media_type": _text(document, "mediaType", blob, default=media_type),
        "annotations": _annotations(document, blob),
        "artifact_type": _text(document, "artifactType", blob, default=""),
        "subject": None if subject is None else Descriptor.from_json(subject, f"{blob}.subject"),
    }


# In the key order of the OCI Go structs.
def _encoded(document: Manifest | Index, **content: Any) -> bytes:
    values: dict[str, Any] = {"schemaVersion": 2, "mediaType": document.media_type}
    if document.artifact_type:
        values["artifactType"] = document.artifact_type
    values |= content
    if document.subject is not None:
        values["subject"] = document.subject.to_json()
    if document.annotations:
        values["annotations"] = dict(sorted(document.annotations.items()))
    return to_json(values)


def _descriptors(value: object, blob: str) -> tuple[Descriptor, ...]:
    return tuple(Descriptor.from_json(item, f"{blob}[{number}]") for number, item in enumerate(_array(value, blob)))


def _object(value: object, blob: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError("wrong JSON type", blob=blob, got=_short(value), wanted="an object")
    return value


def _array(value: object, blob: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError("wrong JSON type", blob=blob, got=_short(value), wanted="an array")
    if len(value) > _MAX_ENTRIES:
        raise FormatError("too many entries", blob=blob, got=len(value), wanted=f"at most {_MAX_ENTRIES}")
    return value


def _text(document: Mapping[str, Any], key: str, blob: str, default: str | None = None) -> str:
    value = document.get(key, default)
    if not isinstance(value, str):
        raise FormatError("wrong JSON type", blob=f"{blob}.{key}", got=_short(value), wanted="a string")
    return value


def _size(value: object, blob: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_SIZE:
        raise FormatError("not a size", blob=blob, got=_short(value), wanted=f"an integer in [0, {_MAX_SIZE}]")
    return value


def _annotations(document: Mapping[str, Any], blob: str) -> dict[str, str]:
    value = document.get("annotations")
    annotations = {} if value is None else _object(value, f"{blob}.annotations")
    for key, item in annotations.items():
        if not isinstance(item, str):
            raise FormatError("not a string", blob=f"{blob}.annotations[{key!r}]", got=_short(item))
    return annotations


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
