"""Whole builds: real registry, devices, containers; the new image is read back from the registry."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from obdlab.formats import oci
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from tests.build.building import Bench
    from tests.registry.server import RegistryServer

pytestmark = [pytest.mark.kernel, pytest.mark.registry, pytest.mark.tools("runc")]


def test_one_stage(bench: Bench) -> None:
    base = bench.base("build/one", {"kept": b"kept", "gone": b"x" * 100_000})
    new = f"{bench.host}/build/one-new:1"
    bench.context(
        f"""FROM {base}
        ARG WHO=nobody
        ENV GREETING="hi $WHO"
        LABEL a=b
        WORKDIR /srv/app
        RUN echo $GREETING >out; pwd >>out; rm /gone; mkdir -p /run/app; mkdir -m 777 /tmp/own
        COPY hello sub ./
        USER 7:8
        RUN ["/bin/sh", "-c", "id -u >/tmp/own/id"]
        EXPOSE 80
        ENTRYPOINT ["/bin/sh"]
        CMD ["-c", "true"]
        """,
        {"hello": "hello\n", "sub/x": "x", "sub/deep/y": "y"},
    )
    made = bench.build(new, "--build-arg", "WHO=you")
    manifest, document = bench.documents(new)
    assert made["digest"] == oci.digest_of(manifest.to_bytes())
    assert bench.cat(new, "/srv/app/out") == "hi you\n/srv/app\n"
    assert bench.cat(new, "/tmp/own/id") == "7\n"
    assert sorted(bench.ls(new, "/srv/app")) == ["deep", "hello", "out", "x"]
    assert bench.cat(new, "/srv/app/deep/y") == "y"
    assert bench.cat(new, "/kept") == "kept"
    assert "app" in bench.ls(new, "/run")
    assert "gone" not in bench.ls(new, "/")
    # Mount points of the container's are no part of it.
    assert not {"hosts", "resolv.conf"} & set(bench.ls(new, "/etc"))
    config = document["config"]
    assert config["Env"][-1] == "GREETING=hi you"
    assert (config["Labels"], config["WorkingDir"], config["User"]) == ({"a": "b"}, "/srv/app", "7:8")
    assert (config["Entrypoint"], config["Cmd"], config["ExposedPorts"]) == (
        ["/bin/sh"],
        ["-c", "true"],
        {"80/tcp": {}},
    )
    assert document["rootfs"]["diff_ids"][1:] == [layer.digest for layer in manifest.layers[1:]]
    assert len(manifest.layers) == made["layers"] == 4
    steps = [step for step in document["history"] if not step.get("empty_layer")]
    assert len(steps) == len(manifest.layers)
    assert document["created"] == "2001-09-09T01:46:40Z"
    # Each is a whole file system, and names the one below as its parent.
    done = bench.obdlab("image", "verify", new)
    assert (done.returncode, "parent" in done.stdout) == (0, False)


def test_the_base_is_mounted_and_read_in_part(bench: Bench, registry_server: RegistryServer) -> None:
    import random

    large = random.Random(1).randbytes(24 << 20)
    base = bench.base("build/large", {"large": large})
    new = f"{bench.host}/elsewhere/large:1"
    bench.context(f"FROM {base}\nRUN echo 1 >/one\n")
    size = sum(layer.size for layer in bench.documents(base)[0].layers)
    before = len(registry_server.requests())
    made = bench.build(new)
    requests = registry_server.requests()[before:]
    read = sum(int(each["written"]) for each in requests if each["method"] == "GET" and "/blobs/" in each["uri"])
    assert 0 < made["base_read"] <= read < size / 5
    assert made["base_size"] == size > 24 << 20
    mounts = [each["status"] for each in requests if "?mount=" in each["uri"] and "from=build%2Flarge" in each["uri"]]
    assert mounts
    assert set(mounts) == {"201"}
    # The layers and their hash trees are those of the base.
    assert bench.documents(new)[0].layers[0] == bench.documents(base)[0].layers[0]
    assert oci.HASH_TREE in bench.documents(new)[0].layers[1].annotations


def test_deleted_files_and_arguments_are_in_no_layer(bench: Bench) -> None:
    base = bench.base("build/secrets")
    new = f"{bench.host}/build/secrets-new:1"
    secret = bench.place / "token"
    secret.write_text("SECRET-FILE-4711")
    bench.context(
        f"FROM {base}\nARG TOKEN\n"
        "RUN --mount=type=secret,id=t --mount=type=secret,id=t,target=/etc/deep/t,mode=0444,uid=3 "
        "cat /run/secrets/t | tr A-Z a-z >/lower; ls -ln /etc/deep/t >/mode\n"
        "RUN echo $TOKEN >/transient; sync -d /transient; echo $TOKEN | tr A-Z a-z >>/lower; rm /transient\n"
    )
    bench.build(new, "--build-arg", "TOKEN=SECRET-ARG-4712", "--secret", f"id=t,src={secret}")
    assert bench.cat(new, "/lower") == "secret-file-4711secret-arg-4712\n"
    assert bench.cat(new, "/mode").startswith("-r--r--r--    1 3        0               16 ")
    manifest, document = bench.documents(new)
    layers = [bench.layer(new, number) for number in range(1, len(manifest.layers))]
    assert any(b"secret-arg-4712" in layer for layer in layers)
    for word in ("SECRET-FILE-4711", "SECRET-ARG-4712"):
        assert not any(word.encode() in layer for layer in layers)
        assert word not in str(document)
    assert "secrets" not in str(bench.ls(new, "/"))
    assert "deep" not in bench.ls(new, "/etc")


def test_a_step_that_fails_names_its_line(bench: Bench) -> None:
    base = bench.base("build/fails")
    new = f"{bench.host}/build/fails-new:1"
    bench.context(f"FROM {base}\nRUN true\n\nRUN echo why >&2; exit 3\n")
    error = bench.refused(new)
    assert "why" in error
    assert "Dockerfile:4: RUN: its command ended with status 3" in error
    bench.context(f"FROM {base}\nUSER nobody-here\nRUN true")
    assert "Dockerfile:3: RUN: the image has no user 'nobody-here'" in bench.refused(new)
    bench.context(f"FROM {base}\nCOPY missing /x")
    assert "Dockerfile:2: COPY: 'missing' names no file of the build context" in bench.refused(new)
    bench.context(f"FROM {bench.host}/build/fails-plain")
    assert "Dockerfile:1: FROM" in bench.refused(new)
    assert re.search("convert it first|not an overlaybd image", bench.refused(new))


def test_networks(bench: Bench) -> None:
    base = bench.base("build/network")
    new = f"{bench.host}/build/network-new:1"
    address = Reference.parse(base).host
    fetch = f"wget -q -O - http://{address}/v2/"
    bench.context(
        f"FROM {base}\nRUN {fetch} >/got || echo no >/got\nRUN --network=none {fetch} >/none || echo no >/none"
    )
    bench.build(new)
    assert bench.cat(new, "/got") == "no\n"
    bench.build(new, "--network", "host")
    assert bench.cat(new, "/got") == "{}"
    assert bench.cat(new, "/none") == "no\n"
    bench.context(f"FROM {base}\nRUN --network=host true")
    assert "Dockerfile:2: RUN: --network=host must be allowed" in bench.refused(new)
