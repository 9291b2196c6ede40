"""Manifests that refer to others: through the API where there is one, else through the tag that stands in."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.errors import FormatError
from obdlab.formats.oci import (
    MAX_MANIFEST_SIZE,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Index,
    digest_of,
)
from obdlab.registry.client import RegistryClient
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Reference, Repository
from obdlab.registry.referrers import subject_of
from tests.registry import faulty
from tests.registry.faulty import FaultyRegistry, faulty_registry
from tests.registry.server import RegistryServer

CONFIG = b"{}"
SIGNATURE, CONVERTED = "application/x.signature", "application/x.converted"


@pytest.fixture
def client() -> Iterator[RegistryClient]:
    with closing(RegistryClient(deadline_s=60)) as client:
        yield client


def manifest_of(subject: bytes | None, artifact_type: str = "", **annotations: str) -> bytes:
    config = {"mediaType": OCI_CONFIG, "digest": digest_of(CONFIG), "size": len(CONFIG)}
    document: dict[str, object] = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": []}
    if artifact_type:
        document["artifactType"] = artifact_type
    if subject is not None:
        document["subject"] = {"mediaType": OCI_MANIFEST, "digest": digest_of(subject), "size": len(subject)}
    return json.dumps(document | {"annotations": {"random": os.urandom(8).hex(), **annotations}}).encode()


def put(client: RegistryClient, repository: Repository, data: bytes) -> str:
    return client.put_manifest(Reference.parse(f"{repository}@{digest_of(data)}"), OCI_MANIFEST, data)


def put_image(client: RegistryClient, server: RegistryServer, name: str) -> tuple[Repository, bytes, str]:
    """An image in a repository of its own: that, the manifest and its digest."""
    repository = Repository(server.host, name, plain_http=True)
    client.push_blob(repository, digest_of(CONFIG), len(CONFIG), lambda: io.BytesIO(CONFIG))
    image = manifest_of(None)
    return repository, image, put(client, repository, image)


@pytest.mark.registry
def test_at_the_real_registry(client: RegistryClient, registry_server: RegistryServer) -> None:
    repository, image, subject = put_image(client, registry_server, "tests/referrers")
    assert client.referrers(repository, subject) == ()
    signature, converted = manifest_of(image, SIGNATURE, who="me"), manifest_of(image)
    for data in (signature, converted, signature):
        put(client, repository, data)
    found = client.referrers(repository, subject)
    assert [(each.digest, each.size, each.media_type) for each in found] == [
        (digest_of(data), len(data), OCI_MANIFEST) for data in (signature, converted)
    ]
    assert found[0].annotations["who"] == "me"
    assert client.referrers(repository, subject, SIGNATURE) == found[:1]
    assert client.referrers(repository, subject, OCI_CONFIG) == found[1:]
    assert client.referrers(repository, subject, CONVERTED) == ()
    assert client.get_manifest(Reference.parse(f"{repository}@{found[0].digest}")).data == signature
    assert client.get_manifest(Reference.parse(f"{repository}:{subject.replace(':', '-')}")).media_type == OCI_INDEX


@pytest.mark.registry
def test_one_is_removed(client: RegistryClient, registry_server: RegistryServer) -> None:
    repository, image, subject = put_image(client, registry_server, "tests/removed")
    one, other = (put(client, repository, manifest_of(image, SIGNATURE)) for _ in range(2))
    client.remove_referrer(repository, subject, one)
    assert [each.digest for each in client.referrers(repository, subject)] == [other]
    with pytest.raises(RegistryError, match="404"):
        client.get_manifest(Reference.parse(f"{repository}@{one}"))
    for _ in range(2):  # what is gone is gone
        client.remove_referrer(repository, subject, other)
    assert client.referrers(repository, subject) == ()
    assert client.get_manifest(Reference.parse(f"{repository}@{subject}")).data == image


@pytest.mark.parametrize("refusal", [400, 401, 403, 405, 501])
def test_where_nothing_is_deleted(client: RegistryClient, registry: FaultyRegistry, refusal: int) -> None:
    repository = registry.repository()
    tag = SUBJECT.replace(":", "-")
    one, other = digest_of(b"a"), digest_of(b"b")
    registry.add_manifest(tag, index_of("a", "b"), OCI_INDEX)
    registry.next(None)
    registry.always(faulty.status(refusal))
    client.remove_referrer(repository, SUBJECT, one)
    registry.always(None)
    assert [each.digest for each in client.referrers(repository, SUBJECT)] == [other]
    # Where the registry itself keeps the list it would stay in it.
    registry.next(None, faulty.status(405))
    with pytest.raises(RegistryError, match="405"):
        client.remove_referrer(repository, SUBJECT, one)


def index_of(*names: str, artifact_type: str = SIGNATURE) -> bytes:
    extra = {"artifactType": artifact_type}
    return Index(
        tuple(Descriptor(OCI_MANIFEST, digest_of(n.encode()), len(n), extra=extra) for n in names)
    ).to_bytes()


def index_answer(data: bytes, **headers: str) -> faulty.Fault:
    def fault(answer: faulty.Answer) -> None:
        answer.handler.answer(200, {"Content-Type": OCI_INDEX, **headers}, data)

    return fault


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with faulty_registry() as registry:
        yield registry


SUBJECT = digest_of(b"subject")


def test_pages_of_the_api(client: RegistryClient, registry: FaultyRegistry) -> None:
    repository = registry.repository()
    registry.next(
        index_answer(index_of("a", "b"), Link=f'</v2/some/image/referrers/{SUBJECT}?n=2>; rel="next"'),
        faulty.status(503),
        index_answer(index_of("c", artifact_type=CONVERTED)),
    )
    found = client.referrers(repository, SUBJECT, SIGNATURE)
    assert [each.digest for each in found] == [digest_of(b"a"), digest_of(b"b")]
    paths = [request.path for request in registry.requests]
    assert paths == [
        f"/v2/some/image/referrers/{SUBJECT}?artifactType=application%2Fx.signature",
        *[f"/v2/some/image/referrers/{SUBJECT}?n=2"] * 2,
    ]


@pytest.mark.parametrize(
    "link", ["<https://elsewhere.example/v2/some/image/referrers/x>; rel=next", "</v2/x>; rel=next"]
)
def test_pages_elsewhere_are_not_followed(link: str, client: RegistryClient, registry: FaultyRegistry) -> None:
    registry.next(index_answer(index_of("a"), Link=link))
    with pytest.raises(RegistryError, match="next page elsewhere"):
        client.referrers(registry.repository(), SUBJECT)


def test_pages_without_end(client: RegistryClient, registry: FaultyRegistry) -> None:
    registry.always(index_answer(index_of(), Link=f"</v2/some/image/referrers/{SUBJECT}>; rel=next"))
    with pytest.raises(RegistryError, match="more than 64 pages"):
        client.referrers(registry.repository(), SUBJECT)


def test_a_list_of_large_pages(client: RegistryClient, registry: FaultyRegistry) -> None:
    page = index_of("a").ljust(MAX_MANIFEST_SIZE)
    registry.always(index_answer(page, Link=f"</v2/some/image/referrers/{SUBJECT}>; rel=next"))
    with pytest.raises(RegistryError, match="list longer than"):
        client.referrers(registry.repository(), SUBJECT)
    assert len(registry.requests) == 5


def test_all_pages_have_one_deadline(registry: FaultyRegistry) -> None:
    good = index_answer(index_of("a"), Link=f"</v2/some/image/referrers/{SUBJECT}>; rel=next")

    def slow(answer: faulty.Answer) -> None:
        answer.handler.closing.wait(0.2)
        good(answer)

    registry.always(slow)
    with closing(RegistryClient(deadline_s=1)) as client, pytest.raises(RegistryError) as caught:
        client.referrers(registry.repository(), SUBJECT)
    assert caught.value.timed_out, caught.value
    assert len(registry.requests) < 10


def test_answers_that_are_no_index(client: RegistryClient, registry: FaultyRegistry) -> None:
    registry.next(index_answer(b"[]"))
    with pytest.raises(FormatError):
        client.referrers(registry.repository(), SUBJECT)
    registry.add_manifest(SUBJECT.replace(":", "-"), index_of("a"), OCI_INDEX)
    registry.next(index_answer(b"<html>", **{"Content-Type": "text/html"}))
    assert len(client.referrers(registry.repository(), SUBJECT)) == 1
    registry.next(faulty.status(403))
    with pytest.raises(RegistryError, match="403"):
        client.referrers(registry.repository(), SUBJECT)


@given(st.binary(max_size=100) | st.recursive(st.none() | st.text(), lambda x: st.dictionaries(st.text(), x)))
def test_subjects_of_anything(value: object) -> None:
    for data in (value, {"subject": value}, {"subject": {"digest": value}}):
        text = data if isinstance(data, bytes) else json.dumps(data, default=repr).encode()
        assert subject_of(text) is None
