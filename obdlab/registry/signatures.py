"""The demand that a manifest is signed: by cosign, with one of the keys of this host.

Certificates of identities and transparency logs are left to cosign itself. The package ``cryptography`` checks
signatures; only hosts with keys need it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from obdlab.command import install_command
from obdlab.errors import FormatError, ObdlabError
from obdlab.formats import cosign
from obdlab.formats.oci import Manifest
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from obdlab.formats.oci import Descriptor
    from obdlab.registry.reference import Repository

logger = logging.getLogger(__name__)

# All users with the right to push can add signatures. Each costs two requests at most.
_MOST_SIGNATURES = 32
_LONGEST_PAYLOAD = 64 << 10
_LONGEST_BUNDLE = 1 << 20
_LONGEST_KEY = 64 << 10


class SignatureKeyError(ObdlabError, code="signature-key"):
    """A public key for signatures cannot be read or used."""


class UnsignedImageError(ObdlabError, code="unsigned-image"):
    """The settings demand a signature of the image's manifest, and no key of theirs has made one."""


class _Fetched(Protocol):
    @property
    def data(self) -> bytes: ...


class Client(Protocol):
    """The part of :class:`obdlab.registry.client.RegistryClient` that finds signatures."""

    def repository(self, ref: Reference) -> Repository: ...

    def get_manifest(self, ref: Reference, accept: Collection[str] = ..., *, helped: bool = True) -> _Fetched: ...

    def read_blob(self, repository: Repository, digest: str, size: int, max_size: int) -> bytes: ...

    def referrers(
        self, repository: Repository, digest: str, artifact_type: str | None = None
    ) -> tuple[Descriptor, ...]: ...


def check_signed(client: Client, reference: Reference, digests: Sequence[str], keys: Sequence[Path]) -> None:
    """Return if one of the ``keys`` (PEM, ECDSA on P-256) signed one of an image's documents.

    ``digests`` are those of its index, if there is one, and its manifest. Raises UnsignedImageError if no document is
    signed, SignatureKeyError, and RegistryError if the registry fails.
    """
    loaded = [_load(path) for path in keys]
    looked_at = 0
    for digest in digests:
        for name, signed in _signatures(client, reference, digest):
            looked_at += 1
            if digest in signed.digests and _is_by(loaded, signed):
                logger.info("%s: manifest %s is signed by %s", reference, digest, name)
                return
    raise UnsignedImageError(
        f"{reference}: not signed as signature_keys in the settings demands (got {looked_at} usable signatures of "
        f"{' and '.join(digests)}, wanted one by {', '.join(map(str, keys))}); the image's owner signs it: "
        f"cosign sign --key KEY {Reference(reference.host, reference.repository, None, digests[0])}"
    )


def _load(path: Path) -> EllipticCurvePublicKey:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        what = "signature_keys needs the package cryptography"
        raise SignatureKeyError(f"{what} ({error}): {install_command('signatures')}") from error
    try:
        with path.open("rb") as file:
            key = load_pem_public_key(file.read(_LONGEST_KEY))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise SignatureKeyError(f"{path}: not a public key in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise SignatureKeyError(f"{path}: wanted a key for ECDSA on P-256, as cosign generate-key-pair makes it")
    return key


def _is_by(keys: Sequence[EllipticCurvePublicKey], signed: cosign.Signed) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    for key in keys:
        for signature in signed.signatures:
            try:
                key.verify(signature, signed.content, ECDSA(SHA256()))
            except InvalidSignature:
                continue
            return True
    return False


# Yields each signature with the digest of its blob. A malformed one is logged: another one may be right.
def _signatures(client: Client, reference: Reference, digest: str) -> Iterator[tuple[str, cosign.Signed]]:
    for layer, is_bundle in _found(client, reference, digest):
        blob = f"{reference.repository}@{layer.digest}"
        longest = _LONGEST_BUNDLE if is_bundle else _LONGEST_PAYLOAD
        try:
            data = client.read_blob(client.repository(reference), layer.digest, layer.size, longest)
            if is_bundle:
                signed = cosign.parse_bundle(data, blob)
            else:
                signed = cosign.parse_payload(data, layer.annotations.get(cosign.SIGNATURE, ""), blob)
        except (FormatError, RegistryError) as error:
            if isinstance(error, RegistryError) and error.temporary:
                raise
            logger.info("%s: signature not used: %s", reference, error)
            continue
        yield layer.digest, signed


# Yields the blobs with signatures, and True for a bundle.
def _found(client: Client, reference: Reference, digest: str) -> Iterator[tuple[Descriptor, bool]]:
    tag = Reference(reference.host, reference.repository, cosign.tag_of(digest), None)
    for layer in _layers(client, tag)[:_MOST_SIGNATURES]:
        if layer.media_type == cosign.PAYLOAD_TYPE:
            yield layer, False
    artifacts = client.referrers(client.repository(reference), digest, cosign.BUNDLE_TYPE)
    for artifact in artifacts[:_MOST_SIGNATURES]:
        for layer in _layers(client, reference.with_digest(artifact.digest))[:1]:
            if layer.media_type == cosign.BUNDLE_TYPE:
                yield layer, True


def _layers(client: Client, reference: Reference) -> tuple[Descriptor, ...]:
    try:
        return Manifest.parse(client.get_manifest(reference).data, str(reference)).layers
    except RegistryError as error:
        if error.status != 404:
            raise
        return ()
    except FormatError as error:
        logger.info("%s: no signatures: %s", reference, error)
        return ()
