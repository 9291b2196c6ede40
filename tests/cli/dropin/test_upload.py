"""--upload of overlaybd-commit and overlaybd-merge, to real registries."""

from __future__ import annotations

import base64
import json
from contextlib import closing
from pathlib import Path

import pytest

from obdlab.formats.oci import digest_of
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Repository
from tests.cli.dropin.running import Tools
from tests.cli.dropin.test_layer_tools import disk_sum, golden
from tests.registry.https import Authority
from tests.registry.server import PASSWORD, USER, RegistryServer, running_registry

pytestmark = pytest.mark.registry


def stored(server: RegistryServer, name: str, digest: str) -> bytes:
    """Return a blob that the registry has."""
    repository = Repository(server.host, name, plain_http=True)
    with closing(RegistryClient()) as client:
        return client.read_blob(repository, digest, client.blob_size(repository, digest), 1 << 20)


@pytest.mark.parametrize("words", [(), ("-z",), ("-z", "--upload_bs", "1")])
def test_a_committed_layer_is_in_the_file_and_in_the_registry(
    words: tuple[str, ...], tools: Tools, registry_server: RegistryServer
) -> None:
    golden(tools, "l1.data", "l1.index", "l1.plain.lsmt")
    url = f"{registry_server.url}/v2/dropin/commit/blobs/uploads"
    done = tools.run("overlaybd-commit", *words, "--upload", url, "l1.data", "l1.index", "o")
    assert done.returncode == 0, done.stderr
    content = (tools.cwd / "o").read_bytes()
    assert done.stderr.splitlines()[-1] == digest_of(content)
    assert stored(registry_server, "dropin/commit", digest_of(content)) == content
    assert disk_sum(tools.cwd / "o") == disk_sum(tools.cwd / "l1.plain.lsmt")


def test_a_merged_layer_is_uploaded(tools: Tools, registry_server: RegistryServer) -> None:
    golden(tools, "l1.lz4.lsmt", "l2.plain.lsmt")
    config = tools.config("c.json", *({"file": str(tools.cwd / name)} for name in ("l1.lz4.lsmt", "l2.plain.lsmt")))
    done = tools.run("overlaybd-merge", "--upload", f"{registry_server.url}/v2/dropin/m/blobs/uploads/", config, "o")
    assert done.returncode == 0, done.stderr
    content = (tools.cwd / "o").read_bytes()
    assert stored(registry_server, "dropin/m", done.stderr.strip()) == content


def test_credentials_come_from_the_file(tools: Tools, tmp_path: Path) -> None:
    golden(tools, "l1.data", "l1.index")
    with running_registry(tmp_path / "registry", htpasswd=True) as server:
        auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        (tmp_path / "cred.json").write_text(json.dumps({"auths": {server.host: {"auth": auth}}}))
        url = f"{server.url}/v2/a/blobs/uploads"
        done = tools.run("overlaybd-commit", "-z", "--upload", url, "l1.data", "l1.index", "o")
        assert done.returncode == 255
        assert not (tmp_path / "o").exists()
        words = ["-z", "--upload", url, "--cred_file_path", "cred.json"]
        done = tools.run("overlaybd-commit", *words, "l1.data", "l1.index", "o")
        assert (done.returncode, done.stderr.strip()) == (0, digest_of((tmp_path / "o").read_bytes()))


def test_a_client_certificate_is_shown(tools: Tools, tmp_path: Path) -> None:
    golden(tools, "l1.data", "l1.index")
    authority = Authority.make(tmp_path / "ca")
    client = authority.sign("client")
    tls = (*authority.sign("server"), authority.certificate)
    with running_registry(tmp_path / "registry", tls=tls) as server:
        url = f"https://{server.host}/v2/a/blobs/uploads"
        for shown, status in (((), 255), (client, 0)):
            pair = [word for pair in zip(("--tls_cert_path", "--tls_key_path"), shown, strict=False) for word in pair]
            words = [*pair, "-z", "--upload", url, "l1.data", "l1.index", "o"]
            done = tools.run("overlaybd-commit", *words, SSL_CERT_FILE=str(authority.certificate))
            assert done.returncode == status, done.stderr
        assert done.stderr.strip() == digest_of((tmp_path / "o").read_bytes())


_NOBODY = "http://127.0.0.1:1/v2/a/blobs"


@pytest.mark.parametrize("url", [_NOBODY, "127.0.0.1:1/a", f"{_NOBODY}/uploads"])
def test_a_place_that_takes_no_uploads_is_named_and_no_file_is_left(url: str, tools: Tools) -> None:
    golden(tools, "l1.data", "l1.index")
    done = tools.run("overlaybd-commit", "-z", "--upload", url, "l1.data", "l1.index", "o")
    assert done.returncode == 255
    assert "127.0.0.1:1" in done.stderr
    assert sorted(path.name for path in tools.cwd.iterdir()) == ["bin", "l1.data", "l1.index"]
