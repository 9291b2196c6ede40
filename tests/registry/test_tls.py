"""Whose certificates are taken, and what is said of the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from obdlab.registry.client import RegistryClient
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Repository
from obdlab.registry.tls import TLSOptions, make_context, tls_of_host
from tests.registry.faulty import FaultyRegistry, faulty_registry
from tests.registry.https import Authority, tls_registry

DATA = bytes(range(256)) * 16


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def good(authority: Authority) -> tuple[Path, Path]:
    return authority.sign("server")


def read(registry: FaultyRegistry, options: TLSOptions, *, host: str = "127.0.0.1", tls: bool = True) -> bytes:
    digest = registry.add_blob(DATA)
    client = RegistryClient(deadline_s=20, tls=options)
    try:
        repository = Repository(f"{host}:{registry.port}", "some/image", plain_http=not tls)
        return client.read_range(repository, digest, 5, 100)
    finally:
        client.close()


def refusal(registry: FaultyRegistry, options: TLSOptions, *, at_once: bool = True, host: str = "127.0.0.1") -> str:
    with pytest.raises(RegistryError) as caught:
        read(registry, options, host=host)
    assert not caught.value.temporary
    assert not at_once or "tries" not in str(caught.value)
    return str(caught.value)


def test_own_ca(authority: Authority, good: tuple[Path, Path]) -> None:
    with tls_registry(*good) as registry:
        assert read(registry, TLSOptions(ca_path=authority.certificate)) == DATA[5:105]
        assert read(registry, TLSOptions(ca_path=authority.certificate, ca_only=True)) == DATA[5:105]
        message = refusal(registry, TLSOptions())
        assert f"127.0.0.1:{registry.port}: TLS certificate refused: " in message


def test_own_ca_in_place_of_the_systems(authority: Authority) -> None:
    beside = make_context(tls_of_host(TLSOptions(ca_path=authority.certificate), "h"))
    alone = make_context(tls_of_host(TLSOptions(ca_path=authority.certificate, ca_only=True), "h"))
    assert len(alone.get_ca_certs()) == 1
    assert len(beside.get_ca_certs()) != 1 or not Path("/etc/ssl/certs/ca-certificates.crt").exists()


def test_wrong_name(authority: Authority) -> None:
    with tls_registry(*authority.sign("other", host="DNS:other.example")) as registry:
        message = refusal(registry, TLSOptions(ca_path=authority.certificate), host="localhost")
        assert "TLS certificate refused: Hostname mismatch" in message


def test_expired(authority: Authority) -> None:
    options = ("-not_before", "20200101000000Z", "-not_after", "20200201000000Z")
    with tls_registry(*authority.sign("expired", *options)) as registry:
        message = refusal(registry, TLSOptions(ca_path=authority.certificate))
        assert "TLS certificate refused: certificate has expired" in message


def test_a_server_without_tls(authority: Authority) -> None:
    with faulty_registry() as registry:
        assert "does not speak TLS (plain HTTP is spoken only where asked for)" in refusal(registry, TLSOptions())
        assert registry.requests == []


def test_insecure_only_where_said(good: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    with tls_registry(*good) as registry:
        host = f"127.0.0.1:{registry.port}"
        for name in (host, "127.0.0.1"):
            assert read(registry, TLSOptions(insecure_hosts=frozenset({name}))) == DATA[5:105]
        assert f"{host}: its certificate is not verified, since the settings say so" in caplog.text
        refusal(registry, TLSOptions(insecure_hosts=frozenset({"other.example", "127.0.0.1:1"})))


def test_client_certificates(authority: Authority, good: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = authority.sign("client")
    stranger = Authority.make(tmp_path / "stranger")
    with tls_registry(*good, clients=authority.certificate) as registry:
        trusted = TLSOptions(ca_path=authority.certificate)
        with_one = TLSOptions(ca_path=authority.certificate, client_cert=cert, client_key=key)
        assert read(registry, with_one) == DATA[5:105]
        # TLS 1.3 servers say so after the handshake, when the request, on its way already, may hit a closed socket.
        assert "TLS refused: " in refusal(registry, trusted, at_once=False)
        other_cert, other_key = stranger.sign("client")
        strange = TLSOptions(ca_path=authority.certificate, client_cert=other_cert, client_key=other_key)
        assert "TLS refused: " in refusal(registry, strange, at_once=False)


@pytest.mark.parametrize("kind", ["docker", "hosts.toml", "mirror"])
def test_certificates_per_host(authority: Authority, good: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    cert, key = authority.sign("client")
    with tls_registry(*good, clients=authority.certificate) as registry:
        host = f"127.0.0.1:{registry.port}"
        directory = tmp_path / ("registry.example" if kind == "mirror" else host)
        directory.mkdir()
        client = f'ca = "{authority.certificate}"\nclient = [["{cert}", "{key}"]]\n'
        if kind == "docker":
            for source, name in ((authority.certificate, "ca.crt"), (cert, "client.cert"), (key, "client.key")):
                shutil.copy(source, directory / name)
        elif kind == "hosts.toml":
            (directory / "hosts.toml").write_text(client)
        else:
            (directory / "hosts.toml").write_text(f'[host."https://{host}"]\n{client}')
        assert read(registry, TLSOptions(certs_dirs=(tmp_path / "none", tmp_path))) == DATA[5:105]
        # What holds for one host holds for no other.
        assert tls_of_host(TLSOptions(certs_dirs=(tmp_path,)), "127.0.0.1:1") == tls_of_host(TLSOptions(), "x")


def test_renewed_files_are_read_again(authority: Authority, good: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "ca.crt"
    shutil.copy(Authority.make(tmp_path / "old").certificate, bundle)
    with tls_registry(*good) as registry:
        digest = registry.add_blob(DATA)
        client = RegistryClient(deadline_s=20, tls=TLSOptions(ca_path=bundle))
        repository = Repository(registry.host, "some/image")
        with pytest.raises(RegistryError, match="TLS certificate refused"):
            client.read_range(repository, digest, 0, 10)
        shutil.copy(authority.certificate, bundle)
        assert client.read_range(repository, digest, 0, 10) == DATA[:10]
        client.close()


def test_a_certificate_is_checked_unless_a_file_says_otherwise(tmp_path: Path) -> None:
    options = TLSOptions(certs_dirs=(tmp_path,))
    for host, text, verify in (
        ("a", "", True),
        ("b", "skip_verify = false", True),
        ("c", "skip_verify = true", False),
        ("d", '[host."https://d"]\nskip_verify = true', False),
        ("e", '[host."https://other"]\nskip_verify = true', True),
        ("f", 'skip_verify = true\n[host."https://f"]\nskip_verify = false', False),
    ):
        (tmp_path / host).mkdir()
        (tmp_path / host / "hosts.toml").write_text(text)
        assert tls_of_host(options, host).verify is verify, host


def test_files_of_no_use_are_named(authority: Authority, good: tuple[Path, Path], tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("nothing")
    (tmp_path / "host").mkdir()
    shutil.copy(good[0], tmp_path / "host" / "client.cert")
    (tmp_path / "toml").mkdir()
    (tmp_path / "toml" / "hosts.toml").write_text("skip_verify = 3")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "hosts.toml").write_text("a = " + "[" * 5000)
    per_host = TLSOptions(certs_dirs=(tmp_path,))
    for options, host, message in (
        (TLSOptions(ca_path=garbage), "h", "garbage.pem: not a usable CA bundle"),
        (TLSOptions(ca_path=tmp_path / "absent"), "h", "absent: not a usable CA bundle .No such file"),
        (TLSOptions(client_cert=garbage), "h", "garbage.pem: not a usable client certificate"),
        (TLSOptions(client_cert=good[0]), "h", "server.crt: not a usable client certificate"),
        (per_host, "host", "client.cert: no key beside it .wanted client.key"),
        (per_host, "toml", "hosts.toml: skip_verify: wrong value .got 3"),
        (per_host, "deep", "hosts.toml: cannot be read"),
    ):
        with pytest.raises(RegistryError, match=message) as caught:
            make_context(tls_of_host(options, host))
        assert not caught.value.temporary


@pytest.mark.parametrize("host", ["", "..", ".", "../etc", "a/b", "x" * 300])
def test_no_host_leads_out_of_the_directory(host: str, tmp_path: Path) -> None:
    inner = tmp_path / "certs.d"
    (inner / "a" / "b").mkdir(parents=True)
    for directory in (tmp_path, inner, inner / "a" / "b"):
        (directory / "ca.crt").write_text("x")
    assert tls_of_host(TLSOptions(certs_dirs=(inner,)), host) == tls_of_host(TLSOptions(), "x")
