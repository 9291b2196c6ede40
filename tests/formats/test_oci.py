"""OCI documents: what upstream wrote reads and writes back; what is malformed is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.errors import FormatError
from obdlab.formats import oci

GOLDEN = Path(__file__).parents[1] / "golden" / "image"
A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def manifest_document(**changes: Any) -> dict[str, Any]:
    descriptor = {"mediaType": oci.OCI_CONFIG, "digest": A, "size": 2}
    layer = {"mediaType": oci.OCI_LAYER_GZIP, "digest": B, "size": 7, "annotations": {"k": "<v>&"}}
    return {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": descriptor,
        "layers": [layer],
        **changes,
    }


@pytest.mark.parametrize("name", ["manifest.json", "manifest.with-trace.json"])
def test_upstreams_manifest(name: str) -> None:
    data = (GOLDEN / name).read_bytes()
    manifest = oci.Manifest.parse(data)
    document = json.loads(data)
    assert manifest.is_overlaybd
    assert [layer.to_json() for layer in manifest.layers] == document["layers"]
    assert manifest.config.to_json() == document["config"]
    assert oci.Manifest.parse(manifest.to_bytes()) == manifest
    for layer in manifest.layers:
        assert layer.annotations[oci.BLOB_DIGEST] == layer.digest
        assert layer.annotations[oci.BLOB_SIZE] == str(layer.size)
        assert layer.annotations[oci.OVERLAYBD_VERSION] == oci.VERSION_NATIVE
    assert any(oci.ACCELERATION_LAYER in layer.annotations for layer in manifest.layers) == ("trace" in name)


def test_upstreams_config() -> None:
    data = (GOLDEN / "config.json").read_bytes()
    config = oci.Config.parse(data)
    manifest = oci.Manifest.parse((GOLDEN / "manifest.json").read_bytes())
    assert config.diff_ids == tuple(layer.digest for layer in manifest.layers)
    assert config.platform == oci.Platform("linux", "amd64")
    assert json.loads(config.to_bytes()) == json.loads(data)
    changed = config.with_diff_ids([A, B])
    assert oci.Config.parse(changed.to_bytes()).diff_ids == (A, B)
    assert list(changed.document) == list(config.document)
    assert config.diff_ids != changed.diff_ids


def test_manifest_is_written_as_go_writes_it() -> None:
    data = oci.Manifest.parse(json.dumps(manifest_document()).encode()).to_bytes()
    assert data == (
        b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",'
        b'"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"%(a)b","size":2},'
        b'"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"%(b)b","size":7,'
        b'"annotations":{"k":"\\u003cv\\u003e\\u0026"}}]}' % {b"a": A.encode(), b"b": B.encode()}
    )


def test_nothing_of_a_descriptor_is_lost() -> None:
    document = {
        "mediaType": "m",
        "digest": A,
        "size": 0,
        "urls": ["https://example"],
        "annotations": {"b": "1", "a": "2"},
        "data": "e30=",
        "platform": {"architecture": "arm64", "os": "linux", "variant": "v8", "os.features": ["x"]},
        "artifactType": "t",
        "unknown": {"to": "us"},
    }
    assert oci.Descriptor.from_json(document).to_json() == document


def test_index() -> None:
    def entry(digest: str, architecture: str, variant: str = "") -> dict[str, Any]:
        platform = {"architecture": architecture, "os": "linux", "variant": variant}
        return {"mediaType": oci.OCI_MANIFEST, "digest": digest, "size": 1, "platform": platform}

    document = {"schemaVersion": 2, "manifests": [entry(A, "amd64"), entry(B, "arm", "v6"), entry(C, "arm", "v7")]}
    index = oci.parse_manifest(json.dumps(document).encode())
    assert isinstance(index, oci.Index)
    assert index.select(oci.Platform("linux", "amd64")).digest == A
    assert index.select(oci.Platform("linux", "arm", "v7")).digest == C
    assert index.select(oci.Platform("linux", "arm", "v8")).digest == B
    with pytest.raises(FormatError, match="linux/riscv64"):
        index.select(oci.Platform("linux", "riscv64"))
    assert oci.Index.parse(index.to_bytes()) == index


def test_chain_ids() -> None:
    assert oci.chain_id([A]) == A
    second = "sha256:" + hashlib.sha256(f"{A} {B}".encode()).hexdigest()
    third = "sha256:" + hashlib.sha256(f"{second} {C}".encode()).hexdigest()
    assert oci.chain_ids([A, B, C]) == (A, second, third)
    assert oci.chain_id([A, B, C]) == third
    with pytest.raises(FormatError):
        oci.chain_id([])
    with pytest.raises(FormatError):
        oci.chain_id([A, "sha256:x"])


@pytest.mark.parametrize(
    "text", ["", "sha256:", A[:-1], A + "0", A.upper(), A + "\n", "md5:" + "0" * 32, "sha512:" + "0" * 128, None, 7]
)
def test_what_is_no_digest(text: object) -> None:
    assert not oci.is_digest(text)
    with pytest.raises(FormatError):
        oci.check_digest(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"schemaVersion": 1},
        {"schemaVersion": True},
        {"schemaVersion": "2"},
        {"manifests": []},
        {"mediaType": oci.OCI_INDEX},
        {"mediaType": 7},
        {"config": None},
        {"config": {}},
        {"config": {"mediaType": "m", "digest": A, "size": -1}},
        {"config": {"mediaType": "m", "digest": A, "size": 1.0}},
        {"config": {"mediaType": "m", "digest": A, "size": True}},
        {"config": {"mediaType": "m", "digest": A, "size": 1 << 63}},
        {"config": {"mediaType": "m", "digest": "../../etc/passwd", "size": 1}},
        {"config": {"mediaType": None, "digest": A, "size": 1}},
        {"layers": {}},
        {"layers": [7]},
        {"layers": [{"mediaType": "m", "digest": A, "size": 1}] * 5000},
        {"annotations": {"a": 1}},
        {"annotations": []},
        {"subject": 1},
        {"artifactType": []},
    ],
)
def test_malformed_manifests(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        oci.Manifest.parse(json.dumps(manifest_document(**changes)).encode())


def test_limits_are_those_stated() -> None:
    layer = {"mediaType": "m", "digest": A, "size": 1}
    assert len(oci.Manifest.parse(json.dumps(manifest_document(layers=[layer] * 4096)).encode()).layers) == 4096
    with pytest.raises(FormatError, match=r"too many entries.*at most 4096"):
        oci.Manifest.parse(json.dumps(manifest_document(layers=[layer] * 4097)).encode())
    with pytest.raises(FormatError, match=r"unsupported schemaVersion.*got 3.*wanted 2"):
        oci.Manifest.parse(json.dumps(manifest_document(schemaVersion=3)).encode())
    config = b'{"rootfs":{"diff_ids":[]}}'
    assert oci.Config.parse(config.ljust(8 << 20)).diff_ids == ()
    with pytest.raises(FormatError):
        oci.Config.parse(config.ljust((8 << 20) + 1))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": NaN}',
        b"1" * 10_000,
        b" " * (oci.MAX_CONFIG_SIZE + 1),
    ],
)
def test_what_is_no_document(data: bytes) -> None:
    for parse in (oci.Manifest.parse, oci.Index.parse, oci.Config.parse, oci.parse_manifest):
        with pytest.raises(FormatError):
            parse(data)


@pytest.mark.parametrize(
    "document",
    [{}, {"rootfs": None}, {"rootfs": {}}, {"rootfs": {"diff_ids": [1]}}, {"rootfs": {"diff_ids": []}, "os": 1}],
)
def test_malformed_configs(document: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        oci.Config.parse(json.dumps(document).encode())


def test_lone_surrogates_are_refused_when_written() -> None:
    config = oci.Config.parse(b'{"rootfs":{"diff_ids":[]},"author":"\\ud800"}')
    with pytest.raises(FormatError, match="Unicode"):
        config.to_bytes()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just(A),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from([*manifest_document(), "manifests", "annotations", "subject"]), _JSON), st.data()
)
def test_mutated_documents_are_refused_or_good(changes: dict[str, Any], data: st.DataObject) -> None:
    document = manifest_document()
    path = data.draw(st.sampled_from([(), ("config",), ("layers", 0), ("layers", 0, "annotations")]))
    place: Any = document
    for step in path:
        place = place[step]
    place.update(changes if not path else {data.draw(st.sampled_from([*place, "platform"])): data.draw(_JSON)})
    try:
        parsed = oci.parse_manifest(json.dumps(document).encode())
        again = oci.parse_manifest(parsed.to_bytes())
    except FormatError:
        return
    assert again == parsed


@given(st.integers(0, 600), st.integers(0, 255))
def test_mutated_bytes_are_refused_or_good(position: int, value: int) -> None:
    data = bytearray((GOLDEN / "manifest.json").read_bytes())
    data[position % len(data)] = value
    try:
        parsed = oci.parse_manifest(bytes(data))
    except FormatError:
        return
    assert parsed.to_bytes()
