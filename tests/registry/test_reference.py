"""References and repositories: docker's defaults, and nothing malformed gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.errors import FormatError
from obdlab.registry.reference import Reference, Repository, is_loopback, is_metadata, literal_address

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("redis", "docker.io/library/redis:latest"),
        ("redis:7.2", "docker.io/library/redis:7.2"),
        ("docker.io/redis", "docker.io/library/redis:latest"),
        ("index.docker.io/library/redis", "docker.io/library/redis:latest"),
        ("someone/thing", "docker.io/someone/thing:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("127.0.0.1:5000/a/b/c:t-1.0_x", "127.0.0.1:5000/a/b/c:t-1.0_x"),
        ("[::1]:5000/x:y", "[::1]:5000/x:y"),
        ("ghcr.io/a__b/c-d--e/f.g:v1", "ghcr.io/a__b/c-d--e/f.g:v1"),
        (f"redis@{DIGEST}", f"docker.io/library/redis@{DIGEST}"),
        (f"quay.io/a/b:t@{DIGEST}", f"quay.io/a/b:t@{DIGEST}"),
        ("Host/x", "Host/x:latest"),
    ],
)
def test_docker_defaults(text: str, canonical: str) -> None:
    reference = Reference.parse(text)
    assert str(reference) == canonical
    assert Reference.parse(canonical) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":tag",
        "@" + DIGEST,
        "Redis",
        "a//b",
        "/a",
        "a/",
        "a:",
        "a:-x",
        "a:" + "x" * 129,
        "a@sha256:00",
        "a@md5:" + "0" * 32,
        f"a@{DIGEST}x",
        f"a@{DIGEST.upper()}",
        "a b",
        "a\n",
        "a/../b",
        "..",
        "host.io:99999/x",
        "host.io:/x",
        "-host.io/x",
        "host.io/" + "x" * 256,
        "https://host.io/x",
        "a___b",
        "a?x=1",
        "ü",
    ],
)
def test_malformed_references(text: str) -> None:
    with pytest.raises(FormatError):
        Reference.parse(text)


@given(st.text(alphabet=st.sampled_from("ab/:@.-_[]0Z \n") | st.characters(), max_size=60))
def test_any_text_is_refused_or_canonical(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except FormatError:
        return
    assert Reference.parse(str(reference)) == reference
    assert Repository.from_blob_url(reference.repo.blobs_url) == reference.repo


def test_urls() -> None:
    hub = Reference.parse("redis").repo
    assert hub.blobs_url == "https://registry-1.docker.io/v2/library/redis/blobs"
    assert str(hub) == "docker.io/library/redis"
    local = Reference.parse("127.1.2.3:5000/a/b").repo
    assert local.blobs_url == "http://127.1.2.3:5000/v2/a/b/blobs"
    for repository in (hub, local):
        for url in (repository.blobs_url, f"{repository.blobs_url}/", f"{repository.blobs_url}/{DIGEST}"):
            assert Repository.from_blob_url(url) == repository


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host/v2/a/blobs",
        "ftp://host/v2/a/blobs",
        "http://host/v2/blobs",
        "http://host/v1/a/blobs",
        "http://host/v2/a/manifests",
        "http://user:secret@host/v2/a/blobs",
        "http://host/v2/a/../b/blobs",
        "http://host/v2/a/blobs?x=1",
        "http://host/v2/a/blobs#x",
        "http://[::1/v2/a/blobs",
        "http://host/v2/A/blobs",
    ],
)
def test_malformed_blob_urls(url: str) -> None:
    with pytest.raises(FormatError):
        Repository.from_blob_url(url)


@given(st.text(max_size=50) | st.text(max_size=30).map(lambda text: f"http://h/v2/{text}/blobs"))
def test_any_blob_url_is_refused_or_good(url: str) -> None:
    try:
        repository = Repository.from_blob_url(url)
    except FormatError:
        return
    assert Repository.from_blob_url(repository.blobs_url) == repository


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("localhost:1", True),
        ("127.77.0.2:5000", True),
        ("[::1]:5000", True),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("10.0.0.1", False),
        ("docker.io", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("host", "metadata"),
    [
        ("169.254.169.254", True),
        ("169.254.169.254:80", True),
        ("[::ffff:169.254.169.254]:80", True),
        ("0xa9fea9fe", True),
        ("[fe80::1%eth0]:80", True),
        ("[fd00:ec2::254]", True),
        ("100.100.100.200", True),
        ("100.100.100.201", False),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("metadata.example.com", False),
        ("169.254.169.254.example.com", False),
    ],
)
def test_addresses_of_clouds(host: str, metadata: bool) -> None:
    assert is_metadata(host) is metadata


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.1", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2002:a00:1::", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("fd00::1", "fd00::1"),
    ],
)
def test_one_address_however_it_is_spelled(host: str, address: str) -> None:
    assert str(literal_address(host)) == address


@pytest.mark.parametrize("host", ["registry.example", "", "1.2.3.4.5", "\ud800", "x" * 300])
def test_names_are_no_addresses(host: str) -> None:
    assert literal_address(host) is None
