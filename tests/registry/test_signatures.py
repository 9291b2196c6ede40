"""Signatures that images must have: made by openssl as cosign makes them, and everything that is none."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.cli.main import main
from obdlab.errors import FormatError
from obdlab.formats import cosign, oci
from obdlab.image.from_manifest import fetch_config
from obdlab.image.registryaccess import open_client
from obdlab.pull.resolve import resolve
from obdlab.registry.client import RegistryClient
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Reference
from obdlab.registry.signatures import SignatureKeyError, UnsignedImageError
from obdlab.settings.settings import Settings
from tests import capabilities
from tests.registry import faulty
from tests.registry.faulty import FaultyRegistry, faulty_registry

AMD64 = oci.Platform("linux", "amd64")
STATEMENT = "application/vnd.in-toto+json"


@dataclass(frozen=True)
class Keys:
    directory: Path

    def public(self, name: str) -> Path:
        return self.directory / f"{name}.pub"

    def sign(self, name: str, data: bytes) -> bytes:
        key = str(self.directory / f"{name}.key")
        return run("dgst", "-sha256", "-sign", key, data=data)


def run(*words: str, data: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *words], input=data, capture_output=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Pairs of keys made by openssl, in the form of cosign's public keys."""
    capabilities.require_tools("openssl")
    capabilities.require_package("cryptography")
    made = Keys(tmp_path_factory.mktemp("keys"))
    for name, options in {
        "ours": ("EC", "ec_paramgen_curve:P-256"),
        "other": ("EC", "ec_paramgen_curve:P-256"),
        "p384": ("EC", "ec_paramgen_curve:P-384"),
        "rsa": ("RSA", "rsa_keygen_bits:2048"),
    }.items():
        key = str(made.directory / f"{name}.key")
        run("genpkey", "-algorithm", options[0], "-pkeyopt", options[1], "-out", key)
        run("pkey", "-in", key, "-pubout", "-out", str(made.public(name)))
    return made


@dataclass
class Served:
    """A registry with an image of one platform, ``manifest``, in an ``index``."""

    registry: FaultyRegistry
    keys: Keys
    index: str
    manifest: str

    @property
    def reference(self) -> Reference:
        return Reference.parse(f"{self.registry.host}/some/image:tag")

    def client(self, *names: str) -> RegistryClient:
        return open_client(Settings(signature_keys=tuple(map(self.keys.public, names))))

    def check(self, *names: str, digest: str = "") -> None:
        """Demand a signature of these keys. Raises as the client does."""
        with closing(self.client(*names)) as client:
            client.require_signature(self.reference, digest or self.manifest)

    def add(self, digest: str, *layers: oci.Descriptor) -> None:
        """Add the manifest with the signatures of a digest."""
        self.registry.add_manifest(cosign.tag_of(digest), manifest_of(self.registry, layers).to_bytes())

    def layer(self, payload: bytes, signature: bytes | str, media_type: str = cosign.PAYLOAD_TYPE) -> oci.Descriptor:
        """Add a payload, and return its layer."""
        text = signature if isinstance(signature, str) else base64.b64encode(signature).decode()
        return oci.Descriptor(media_type, self.registry.add_blob(payload), len(payload), {cosign.SIGNATURE: text})

    def sign(self, digest: str, name: str = "ours") -> None:
        payload = payload_of(digest)
        self.add(digest, self.layer(payload, self.keys.sign(name, payload)))

    def add_bundle(self, digest: str, bundle: bytes) -> None:
        """Add a bundle as an artifact that refers to a manifest."""
        layer = oci.Descriptor(cosign.BUNDLE_TYPE, self.registry.add_blob(bundle), len(bundle))
        document = manifest_of(self.registry, (layer,), artifact_type=cosign.BUNDLE_TYPE).to_bytes()
        artifact = self.registry.add_manifest("bundle", document)
        entry = oci.Descriptor(oci.OCI_MANIFEST, artifact, len(document), extra={"artifactType": cosign.BUNDLE_TYPE})
        tag = digest.replace(":", "-")
        self.registry.add_manifest(tag, oci.Index((entry,)).to_bytes(), oci.OCI_INDEX)


def manifest_of(
    registry: FaultyRegistry, layers: tuple[oci.Descriptor, ...], config: bytes = b"{}", artifact_type: str = ""
) -> oci.Manifest:
    descriptor = oci.Descriptor(oci.OCI_CONFIG, registry.add_blob(config), len(config))
    return oci.Manifest(descriptor, layers, artifact_type=artifact_type)


def payload_of(digest: str, kind: str = "cosign container image signature") -> bytes:
    critical = {"identity": {"docker-reference": ""}, "image": {"docker-manifest-digest": digest}, "type": kind}
    return json.dumps({"critical": critical, "optional": None}).encode()


def bundle_of(
    digest: str,
    sign: Callable[[bytes], bytes],
    predicate: str = "https://sigstore.dev/cosign/sign/v1",
    kind: str = STATEMENT,
) -> bytes:
    statement: dict[str, Any] = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"digest": {"sha256": digest.removeprefix("sha256:")}}],
        "predicateType": predicate,
        "predicate": {},
    }
    payload = json.dumps(statement).encode()
    signature = sign(b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [{"sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps({"mediaType": cosign.BUNDLE_TYPE, "dsseEnvelope": envelope}).encode()


@pytest.fixture
def served(keys: Keys) -> Iterator[Served]:
    with faulty_registry() as registry:
        layer = b"a layer of an overlaybd image"
        digest = registry.add_blob(layer)
        annotations = {oci.BLOB_DIGEST: digest, oci.BLOB_SIZE: str(len(layer))}
        config = json.dumps(
            {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest]}}
        ).encode()
        layers = (oci.Descriptor(oci.OCI_LAYER, digest, len(layer), annotations),)
        data = manifest_of(registry, layers, config).to_bytes()
        manifest = registry.add_manifest("amd64", data)
        entry = oci.Descriptor(
            oci.OCI_MANIFEST, manifest, len(data), extra={"platform": {"os": "linux", "architecture": "amd64"}}
        )
        entry = oci.Descriptor.from_json(entry.to_json())
        index = registry.add_manifest("tag", oci.Index((entry,)).to_bytes(), oci.OCI_INDEX)
        yield Served(registry, keys, index, manifest)


def test_a_payload_signed_by_any_of_the_keys_is_taken(served: Served) -> None:
    served.sign(served.manifest)
    served.check("ours")
    served.check("other", "ours")
    with pytest.raises(UnsignedImageError, match=r"got 1 usable signatures of sha256:.*wanted one by .*other\.pub"):
        served.check("other")


def test_a_bundle_signed_by_any_of_the_keys_is_taken(served: Served) -> None:
    served.add_bundle(served.manifest, bundle_of(served.manifest, lambda data: served.keys.sign("ours", data)))
    served.check("other", "ours")
    with pytest.raises(UnsignedImageError):
        served.check("other")


def test_an_image_without_signatures_is_refused_and_none_is_asked_for_without_keys(served: Served) -> None:
    with pytest.raises(UnsignedImageError, match=r"got 0 usable signatures .*cosign sign --key KEY"):
        served.check("ours")
    before = len(served.registry.requests)
    served.check()
    assert len(served.registry.requests) == before


@pytest.mark.parametrize("signed", ["index", "manifest", "neither"])
def test_the_index_or_the_manifest_of_a_pulled_image_must_be_signed(
    served: Served, signed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if signed != "neither":
        served.sign(getattr(served, signed))
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"signature_keys": [str(served.keys.public("ours"))]}))
    name = str(served.reference)
    with closing(served.client("ours")) as client:
        if signed == "neither":
            with pytest.raises(UnsignedImageError):
                resolve(client, served.reference, AMD64)
            with pytest.raises(UnsignedImageError):
                fetch_config(client, served.reference, AMD64)
            assert main(["image", "ls", "--settings", str(settings), name]) != 0
            assert "not signed as signature_keys in the settings demands" in capsys.readouterr().err
        else:
            assert resolve(client, served.reference, AMD64).manifest.digest == served.manifest
            assert len(fetch_config(client, served.reference, AMD64).lowers) == 1


def signed_for_another(served: Served) -> None:
    payload = payload_of(served.index)
    served.add(served.manifest, served.layer(payload, served.keys.sign("ours", payload)))


def changed_payload(served: Served) -> None:
    payload = payload_of(served.manifest)
    served.add(served.manifest, served.layer(payload.replace(b"null", b"true"), served.keys.sign("ours", payload)))


def another_kind_of_payload(served: Served) -> None:
    payload = payload_of(served.manifest, "atomic container signature")
    served.add(served.manifest, served.layer(payload, served.keys.sign("ours", payload)))


def another_media_type(served: Served) -> None:
    payload = payload_of(served.manifest)
    served.add(served.manifest, served.layer(payload, served.keys.sign("ours", payload), "text/plain"))


def no_base64(served: Served) -> None:
    served.add(served.manifest, served.layer(payload_of(served.manifest), "?" * 96))


def empty_signature(served: Served) -> None:
    served.add(served.manifest, served.layer(payload_of(served.manifest), ""))


def no_json(served: Served) -> None:
    served.add(served.manifest, served.layer(b"[" * 5000, served.keys.sign("ours", b"[" * 5000)))


def long_payload(served: Served) -> None:
    payload = payload_of(served.manifest) + b" " * (1 << 20)
    served.add(served.manifest, served.layer(payload, served.keys.sign("ours", payload)))


def missing_payload(served: Served) -> None:
    payload = payload_of(served.manifest)
    served.add(served.manifest, served.layer(payload, served.keys.sign("ours", payload)))
    del served.registry.blobs[oci.digest_of(payload)]


def no_manifest(served: Served) -> None:
    served.registry.add_manifest(cosign.tag_of(served.manifest), b"[]")


def behind_too_many_others(served: Served) -> None:
    payload = payload_of(served.manifest)
    bad = [served.layer(payload_of(served.index) + b" " * number, b"x") for number in range(40)]
    served.add(served.manifest, *bad, served.layer(payload, served.keys.sign("ours", payload)))


def statement_of_a_scanner(served: Served) -> None:
    bundle = bundle_of(
        served.manifest,
        lambda data: served.keys.sign("ours", data),
        "https://cosign.sigstore.dev/attestation/vuln/v1",
    )
    served.add_bundle(served.manifest, bundle)


def bundle_of_another_type(served: Served) -> None:
    bundle = bundle_of(served.manifest, lambda data: served.keys.sign("ours", data), kind="text/plain")
    served.add_bundle(served.manifest, bundle)


def bundle_for_another(served: Served) -> None:
    served.add_bundle(served.manifest, bundle_of(served.index, lambda data: served.keys.sign("ours", data)))


def bundle_that_signs_the_bare_statement(served: Served) -> None:
    def sign(data: bytes) -> bytes:
        return served.keys.sign("ours", data[data.index(b"{") :])

    served.add_bundle(served.manifest, bundle_of(served.manifest, sign))


@pytest.mark.parametrize(
    "how",
    [
        signed_for_another,
        changed_payload,
        another_kind_of_payload,
        another_media_type,
        no_base64,
        empty_signature,
        no_json,
        long_payload,
        missing_payload,
        no_manifest,
        behind_too_many_others,
        statement_of_a_scanner,
        bundle_of_another_type,
        bundle_for_another,
        bundle_that_signs_the_bare_statement,
    ],
)
def test_what_is_no_signature_of_the_image_is_refused(served: Served, how: Callable[[Served], None]) -> None:
    how(served)
    with pytest.raises(UnsignedImageError):
        served.check("ours")
    # Signatures of anyone cost a bounded number of requests.
    assert len(served.registry.requests) < 100


def test_a_malformed_signature_does_not_hide_a_right_one(served: Served) -> None:
    payload = payload_of(served.manifest)
    right = served.layer(payload, served.keys.sign("ours", payload))
    served.add(served.manifest, served.layer(b"{}", "no"), served.layer(b"\0", b"x"), right)
    served.check("ours")


def test_a_registry_that_fails_is_no_unsigned_image(served: Served) -> None:
    served.sign(served.manifest)
    served.registry.next(*[faulty.status(403)] * 8)
    with pytest.raises(RegistryError, match="403"):
        served.check("ours")


@pytest.mark.parametrize("name", ["p384", "rsa", "missing", "text"])
def test_keys_of_other_kinds_are_refused_by_name(served: Served, name: str) -> None:
    path = served.keys.public(name)
    if name == "text":
        path.write_text("ours\n")
    with pytest.raises(SignatureKeyError, match=rf"{name}\.pub: "):
        served.check(name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.sampled_from(["e30=", STATEMENT]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "critical",
                    "type",
                    "image",
                    "dsseEnvelope",
                    "payload",
                    "payloadType",
                    "signatures",
                    "sig",
                    "subject",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(JSON | st.binary(max_size=50), st.text(max_size=40))
def test_any_bytes_are_a_signature_or_an_error(document: object, signature: str) -> None:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    for parse in (
        lambda: cosign.parse_payload(data, signature, "blob"),
        lambda: cosign.parse_bundle(data, "blob"),
    ):
        with pytest.raises(FormatError):
            parse()
