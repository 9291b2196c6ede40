"""Signatures of images by cosign, in both of its forms: the signed bytes, and the manifests that they name.

Up to version 2, the signatures of the manifest ``sha256:<hex>`` are layers of the manifest with the tag
``sha256-<hex>.sig``: each is a payload ("simple signing"), its signature an annotation. Since version 3 each
signature is an artifact that refers to the manifest: a Sigstore bundle with a DSSE envelope around an in-toto
statement.

Source: specs/SIGNATURE_SPEC.md and specs/BUNDLE_SPEC.md of sigstore/cosign; protocol.md of secure-systems-lab/dsse.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, NamedTuple

from obdlab.errors import FormatError
from obdlab.formats.oci import is_digest

#: Media type of a layer of the manifest with the tag of :func:`tag_of`.
PAYLOAD_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"
#: The annotation of such a layer with its signature, in base64.
SIGNATURE = "dev.cosignproject.cosign/signature"
#: Type of an artifact with one bundle.
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"

_PAYLOAD_KIND = "cosign container image signature"
_STATEMENT_TYPE = "application/vnd.in-toto+json"
# Other statements about an image (its origin, a scanner's findings) do not approve of it.
_PREDICATE = "https://sigstore.dev/cosign/sign/v1"
_MOST_SIGNATURES = 16
_MOST_SUBJECTS = 64
_LONGEST_SIGNATURE = 1 << 10


class Signed(NamedTuple):
    """Signed bytes, their signatures (any of which suffices), and the digests of the manifests that they name."""

    content: bytes
    signatures: tuple[bytes, ...]
    digests: tuple[str, ...]


def tag_of(digest: str) -> str:
    """Return the tag of the manifest with the signatures of the manifest ``digest``."""
    return f"{digest.replace(':', '-')}.sig"


def parse_payload(data: bytes, signature: str, blob: str) -> Signed:
    """Read a payload and the annotation with its signature. Raises FormatError."""
    critical = _field(_document(data, blob), "critical", dict, blob)
    kind = _field(critical, "type", str, blob)
    if kind != _PAYLOAD_KIND:
        raise FormatError("signature of something else", blob=blob, got=kind[:80], wanted=_PAYLOAD_KIND)
    digest = _field(_field(critical, "image", dict, blob), "docker-manifest-digest", str, blob)
    return Signed(data, (_decoded(signature, blob),), (digest,) if is_digest(digest) else ())


def parse_bundle(data: bytes, blob: str) -> Signed:
    """Read a bundle. Raises FormatError, also for a bundle that is no signature of an image."""
    envelope = _field(_document(data, blob), "dsseEnvelope", dict, blob)
    kind = _field(envelope, "payloadType", str, blob)
    if kind != _STATEMENT_TYPE:
        raise FormatError("signature of something else", blob=blob, got=kind[:80], wanted=_STATEMENT_TYPE)
    payload = _decoded(_field(envelope, "payload", str, blob), blob, len(data))
    statement = _document(payload, blob)
    predicate = _field(statement, "predicateType", str, blob)
    if predicate != _PREDICATE:
        raise FormatError("statement is no signature", blob=blob, got=predicate[:80], wanted=_PREDICATE)
    signatures = _objects(envelope, "signatures", _MOST_SIGNATURES, blob)
    subjects = _objects(statement, "subject", _MOST_SUBJECTS, blob)
    digests = (f"sha256:{_field(each, 'digest', dict, blob).get('sha256')}" for each in subjects)
    return Signed(
        b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload),
        tuple(_decoded(_field(each, "sig", str, blob), blob) for each in signatures),
        tuple(digest for digest in digests if is_digest(digest)),
    )


def _document(data: bytes, blob: str) -> dict[str, Any]:
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}", blob=blob) from None
    if not isinstance(document, dict):
        raise FormatError("wrong JSON type", blob=blob, got=type(document).__name__, wanted="an object")
    return document


def _field(document: dict[str, Any], key: str, kind: type, blob: str) -> Any:
    value = document.get(key)
    if not isinstance(value, kind):
        raise FormatError(f"wrong JSON type of {key}", blob=blob, got=type(value).__name__, wanted=kind.__name__)
    return value


def _objects(document: dict[str, Any], key: str, most: int, blob: str) -> list[dict[str, Any]]:
    values: list[Any] = _field(document, key, list, blob)
    if len(values) > most or not all(isinstance(value, dict) for value in values):
        raise FormatError(f"malformed {key}", blob=blob, wanted=f"at most {most} objects")
    return values


def _decoded(text: str, blob: str, longest: int = _LONGEST_SIGNATURE) -> bytes:
    try:
        if len(text) <= 2 * longest:
            return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise FormatError("not base64", blob=blob, got=f"{len(text)} characters", wanted=f"at most {2 * longest}")
