"""A machine for one page of the docs: its commands find what the page supposes, and change nothing of the host.

The commands run in namespaces of their own for mounts, processes and networks. Directories of the system and the
checkout are overlays or empty; ``registry.example`` and ``docker.example`` are registries with TLS, 127.0.0.1:5000
is one without; all three have the same images. Everything ends with the first process.
"""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions, convert_image
from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.reference import Reference
from tests.convert.test_places import docker_archive
from tests.registry.server import running_registry
from tests.snapshotter import imagefiles

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
#: A program that is ready once it has said so and answers on a port.
START = "mkdir -p /www; echo ok >/www/healthz; httpd -p 8080 -h /www; cat /data/* >/dev/null; echo Ready to accept"
_PLAIN = (
    "redis:7",
    "server:1",
    "app:1",
    "library/redis:7",
    "library/nginx:1.27",
    "library/busybox:stable",
)
_APPLETS = ("sh", "cat", "echo", "httpd", "ls", "mkdir", "sleep", "wget")

_PRELUDE = Path(__file__).with_suffix(".sh")


def fill_storage(directory: Path) -> Path:
    """Make a registry's storage with the images of the pages, converted ones as well."""
    with running_registry(directory) as server, closing(RegistryClient(Credentials.load(None))) as client:
        for name in _PLAIN:
            reference = Reference.parse(f"{server.host}/{name}")
            repository = client.repository(reference)
            command = f"{START}; sleep 600" if name == "server:1" else "cat /data/0 >/dev/null; echo Hello"
            blobs, manifest = imagefiles.image_documents(_layers(), command=("/bin/sh", "-c", command))
            for digest, data in blobs.items():
                if digest != manifest:
                    client.push_blob(repository, digest, len(data), partial(io.BytesIO, data))
            client.put_manifest(reference, oci.OCI_MANIFEST, blobs[manifest])
        for name in ("app:1", "server:1", "redis:7"):
            convert_image(
                open_source(f"{server.host}/{name}", client),
                open_destination(f"{server.host}/{name}-obd", client),
                options=ConvertOptions(work_dir=directory),
            )
    docker_archive(directory / "saved.tar")
    imagefiles.write_oci_archive(directory / "layout.tar", "tag", _layers())
    return directory


def _layers() -> list[bytes]:
    base = imagefiles.LayerTar()
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "data"):
        base.directory(name)
    base.add("bin/busybox", imagefiles.busybox_bytes(), mode=0o755)
    for applet in _APPLETS:
        base.add(f"bin/{applet}", kind=b"2", linkname="busybox", mode=0o777)
    base.add("etc/hosts", b"127.0.0.1 localhost\n")
    base.add("bin/python3", b"#!/bin/sh\n", mode=0o755)
    top = imagefiles.LayerTar()
    for number in range(4):
        top.add(f"data/{number}", f"line {number}\n".encode() * 20_000)
    return [base.bytes(), top.bytes()]


def run(stage: Path, storage: Path, commands: str, timeout_s: float) -> tuple[int, str]:
    """Run bash commands on a machine made in ``stage``; return the exit status and everything printed."""
    (stage / "script").write_text(f". {shlex.quote(str(_PRELUDE))}\n{commands}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OBDLAB_")}
    environment |= {"STAGE": str(stage), "IMAGES": str(storage), "CHECKOUT": str(ROOT), "HOME": str(stage / "home")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OBDLAB_CONVERT_DATABASE": "none"}
    isolated = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--net", "--kill-child=KILL"]
    with (stage / "output").open("w+") as output:
        process = subprocess.Popen(
            [*isolated, "bash", str(stage / "script")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=stage,
            env=environment,
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = -1
            process.kill()
            process.wait(60)
        output.seek(0)
        return status, output.read()


def parts(output: str) -> Iterator[tuple[int, str]]:
    """Give the number of line of each command that was begun, and what was printed until the next."""
    for part in output.split("##AT ")[1:]:
        number, _, printed = part.partition("\n")
        yield int(number), printed
