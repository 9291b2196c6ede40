"""convertor, with real registries: its images hold the files of the images that they were made of."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.cli.dropin.grammar import ToolError
from obdlab.cli.dropin.registryflags import certificates_file
from obdlab.cli.main import main
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.image.registryaccess import open_client
from obdlab.settings.settings import Settings
from tests.cli.dropin.running import Tools
from tests.convert.images import whole_image
from tests.convert.layouts import make_layout
from tests.convert.turbo.test_image import push
from tests.registry.https import Authority
from tests.registry.server import PASSWORD, USER, RegistryServer, running_registry

pytestmark = pytest.mark.registry


@pytest.fixture
def image(registry_server: RegistryServer, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """An image in a repository of the test's own; return the repository."""
    make_layout(tmp_path / "source", whole_image())
    name, _ = push(registry_server, tmp_path / "source", f"dropin/c{abs(hash(request.node.name)):x}")
    return name.removesuffix(":v1")


@pytest.fixture(autouse=True)
def _no_leftovers(tools: Tools) -> Iterator[None]:
    yield
    assert [path for path in tools.cwd.glob("tmp_conv/*") if path.name != "image"] == []


def test_an_ordinary_and_a_turbo_image_in_one_run(tools: Tools, image: str, tmp_path: Path) -> None:
    words = ["-r", image, "-i", "v1", "--overlaybd", "obd", "--turboOCI", "turbo", "--plain", "--vsize", "1"]
    tools.ok("convertor", *words)
    for tag in ("obd", "turbo"):
        assert main(["image", "verify", f"{image}:v1", f"{image}:{tag}", "--work-dir", str(tmp_path)]) == 0


def test_without_upload_the_image_and_its_manifest_stay_in_the_directory(tools: Tools, image: str) -> None:
    words = ["-r", image, "-i", "v1", "-o", "obd", "--plain", "--vsize", "1", "-d", "place"]
    tools.ok("convertor", *words, "--no-upload", "--reserve", "--dump-manifest", "--oci")
    layout = ImageLayout(tools.cwd / "place" / "image")
    (entry,) = layout.select("obd")
    dumped = (tools.cwd / "place" / "obd.manifest.json").read_bytes()
    assert json.loads(layout.read_blob(entry, 1 << 20)) == json.loads(dumped)
    assert main(["image", "inspect", f"{image}:obd"]) == 1


def test_a_private_registry(tools: Tools, tmp_path: Path) -> None:
    make_layout(tmp_path / "source", whole_image())
    credentials = tmp_path / "docker.json"
    with running_registry(tmp_path / "registry", htpasswd=True) as server:
        credentials.write_text(json.dumps({"auths": {server.host: {"username": USER, "password": PASSWORD}}}))
        client = open_client(Settings(credentials_path=credentials))
        name, entry = push(server, tmp_path / "source", "a/b", client)
        wanted = ["-r", name.removesuffix(":v1"), "-g", entry.digest, "-o", "obd", "--vsize", "1"]
        for access, status in (([], 1), (["-u", f"{USER}:wrong"], 1), (["-u", f"{USER}:{PASSWORD}"], 0)):
            done = tools.run("convertor", *wanted, *access)
            assert done.returncode == status, done.stderr
            assert PASSWORD not in done.stderr + done.stdout
        access = ["--credentials", str(credentials), "--work-dir", str(tmp_path)]
        source = f"oci:{tmp_path / 'source'}"
        assert main(["image", "verify", source, f"{server.host}/a/b:obd", *access]) == 0


def test_certificates_of_several_files_are_one_file_for_the_time_of_the_command(tmp_path: Path) -> None:
    authorities = [Authority.make(tmp_path / name) for name in ("one", "other")]
    paths = [str(each.certificate) for each in authorities]
    with certificates_file(paths) as (option, joined):
        assert option == "--tls-ca"
        assert len(ssl.create_default_context(cafile=joined).get_ca_certs()) == 2
    assert not Path(joined).exists()
    with pytest.raises(ToolError, match="missing: cannot be read"), certificates_file(["missing"]):
        pass
