"""Credentials files and challenges."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.call import UNBOUND
from obdlab.registry.auth import Authenticator, Challenge, parse_challenges
from obdlab.registry.credentials import Credentials, CredentialsError
from obdlab.registry.reference import Repository


def config(**auths: object) -> bytes:
    return json.dumps({"auths": auths}).encode()


def encoded(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


def test_longest_prefix_wins() -> None:
    credentials = Credentials.parse(
        json.dumps(
            {
                "auths": {
                    "host.io": encoded("host:1"),
                    "host.io/team": encoded("team:2"),
                    "host.io/team/app": encoded("app:3:with:colons"),
                    "host.io:5000": {"username": "port", "password": "4"},
                }
            }
        ).encode()
    )
    assert credentials.find("host.io", "other/app") == ("host", "1")
    assert credentials.find("host.io", "team/other") == ("team", "2")
    assert credentials.find("host.io", "team/app") == ("app", "3:with:colons")
    assert credentials.find("host.io", "team/app/more") == ("app", "3:with:colons")
    assert credentials.find("host.io", "teamwork") == ("host", "1")
    assert credentials.find("host.io:5000", "x") == ("port", "4")
    assert credentials.find("other.io", "team/app") is None


@pytest.mark.parametrize(
    "key", ["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io", "index.docker.io"]
)
def test_docker_hub_by_all_its_names(key: str) -> None:
    assert Credentials.parse(config(**{key: encoded("u:p")})).find("docker.io", "library/redis") == ("u", "p")


def test_auth_wins_over_plain_fields_and_unusable_entries_are_skipped() -> None:
    credentials = Credentials.parse(
        config(
            a={**encoded("right:one"), "username": "wrong", "password": "one"},
            b=encoded("no colon"),
            c={"auth": "%%% not base64"},
            d={"auth": base64.b64encode(b"\xff:\xff").decode()},
            e={},
            f=7,
            g={"username": "x"},
        )
    )
    assert credentials.find("a", "x") == ("right", "one")
    assert [credentials.find(host, "x") for host in "bcdefg"] == [None] * 6


def test_a_challenge_is_likely_where_there_are_credentials() -> None:
    credentials = Credentials({"a.example": ("u", "p")}, {"b.example": "helper"})
    for host, likely in (("a.example", True), ("b.example", True), ("c.example", False)):
        assert credentials.likely(Repository(host, "x")) is likely
    assert Credentials({}, {"": "helper"}).likely(Repository("c.example", "x"))


def test_secrets_stay_out_of_sight() -> None:
    assert "hunter2" not in repr(Credentials.parse(config(h=encoded("u:hunter2"))))
    with pytest.raises(CredentialsError) as caught:
        Credentials.parse(b'{"auths": {"h": {"password": "hunter2"')
    assert "hunter2" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    assert Credentials.load(None).find("h", "x") is None
    (tmp_path / "config.json").write_bytes(config(h=encoded("u:p")))
    assert Credentials.load(tmp_path / "config.json").find("h", "x") == ("u", "p")
    with pytest.raises(CredentialsError, match=r"absent\.json"):
        Credentials.load(tmp_path / "absent.json")
    (tmp_path / "large.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(CredentialsError, match="larger"):
        Credentials.load(tmp_path / "large.json")


@pytest.mark.parametrize("text", [b"", b"[]", b'{"auths": []}', b"\xff", b"[" * 100_000, b'{"auths": null}'])
def test_malformed_files(text: bytes) -> None:
    with pytest.raises(CredentialsError):
        Credentials.parse(text)


_JSON = st.none() | st.integers() | st.text(max_size=5) | st.just(encoded("u:p")) | st.just({"auth": "a"})


@given(
    _JSON | st.lists(_JSON, max_size=2) | st.dictionaries(st.sampled_from(["auth", "username", "password"]), _JSON)
)
def test_any_document_is_read_or_refused(document: object) -> None:
    for text in (json.dumps(document), json.dumps({"auths": document}), json.dumps({"auths": {"h": document}})):
        try:
            Credentials.parse(text.encode()).find("h", "x")
        except CredentialsError:
            pass


@pytest.mark.parametrize(
    ("header", "challenges"),
    [
        (
            'Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull,push"',
            [
                (
                    "bearer",
                    {"realm": "https://auth.example/token", "service": "reg", "scope": "repository:a/b:pull,push"},
                )
            ],
        ),
        ('BASIC Realm="x \\"y\\" z"', [("basic", {"realm": 'x "y" z'})]),
        (
            'Basic realm="a", Bearer realm=b , service = c',
            [("basic", {"realm": "a"}), ("bearer", {"realm": "b", "service": "c"})],
        ),
        ("Negotiate, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        ("Negotiate abc==, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        ("Basic", [("basic", {})]),
        ("", []),
        ('=="', []),
    ],
)
def test_challenges(header: str, challenges: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(header) == [Challenge(*challenge) for challenge in challenges]


@given(st.text(alphabet=st.sampled_from('Bearer realm="a",\\=\t;') | st.characters(), max_size=200))
def test_any_challenge_ends(header: str) -> None:
    parse_challenges(header)


def test_a_hostile_challenge_costs_no_time() -> None:
    for piece in ('a="', "a=\\", "a,", " ", "a ", 'a="\\'):
        parse_challenges("Bearer " + piece * 100_000)


def test_tokens_of_repositories_that_are_no_longer_used_are_forgotten() -> None:
    no_transport: Any = None
    authenticator = Authenticator(Credentials(), no_transport)
    used = Repository("registry.example", "in/use")
    authenticator.header(used, "pull", UNBOUND)
    (first,) = authenticator._grants.values()
    for number in range(2000):
        authenticator.header(Repository("registry.example", f"random/{number}"), "pull", UNBOUND)
        authenticator.header(used, "pull", UNBOUND)
    assert len(authenticator._grants) <= 1024
    assert any(grant is first for grant in authenticator._grants.values())
