"""Builds by the command, in a place of their own, on small images in a real registry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.reference import Reference
from tests.e2e import images

if TYPE_CHECKING:
    from collections.abc import Mapping

_TIMEOUT_S = 120
Content = str | bytes | Path


@dataclass(frozen=True)
class Bench:
    """A directory for everything of a test's builds, and the registry."""

    place: Path
    host: str

    @property
    def environment(self) -> dict[str, str]:
        run_dir, cache = str(self.place / "run"), str(self.place / "cache")
        return os.environ | {"OBDLAB_RUN_DIR": run_dir, "OBDLAB_CACHE_DIR": cache, "SOURCE_DATE_EPOCH": "1000000000"}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "obdlab", *words]

    def obdlab(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=_TIMEOUT_S,
            errors="replace",
            check=False,
        )

    def base(self, name: str, files: Mapping[str, bytes] | None = None) -> str:
        """Push a converted image with busybox; return its reference."""
        return images.push_converted(self.host, name, [images.busybox_layer(files)], self.place)

    def context(self, dockerfile: str, files: Mapping[str, Content] | None = None) -> Path:
        """Make a build context. A path as a file's content makes a link to it."""
        context = self.place / "context"
        for name, content in {"Dockerfile": dockerfile, **(files or {})}.items():
            path = context / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if isinstance(content, Path):
                path.symlink_to(content)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        return context

    def build_words(self, image: str, *options: str) -> list[str]:
        cache = ("--build-cache", str(self.place / "layers"), "--work-dir", str(self.place))
        return ["image", "build", str(self.place / "context"), "-t", image, *cache, *options]

    def run(self, image: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Build from the context; return the command's result."""
        return self.obdlab(*self.build_words(image, *options))

    def build(self, image: str, *options: str) -> dict[str, Any]:
        """Build from the context, which must succeed; return what --json prints."""
        done = self.run(image, "--json", *options)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def refused(self, image: str, *options: str) -> str:
        """Build from the context, which must fail; return the error."""
        done = self.run(image, *options)
        assert done.returncode == 1, done.stdout
        return done.stderr

    def cat(self, image: str, path: str) -> str:
        done = self.obdlab("image", "cat", f"{image}:{path}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ls(self, image: str, path: str, *options: str) -> list[str]:
        done = self.obdlab("image", "ls", *options, f"{image}:{path}")
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def documents(self, image: str) -> tuple[oci.Manifest, dict[str, Any]]:
        """Return an image's manifest and configuration."""
        reference = Reference.parse(image)
        with closing(RegistryClient(Credentials.load(None))) as client:
            manifest = oci.Manifest.parse(client.get_manifest(reference).data)
            repository = client.repository(reference)
            data = client.read_blob(repository, manifest.config.digest, manifest.config.size, 1 << 20)
        return manifest, json.loads(data)

    def layer(self, image: str, number: int) -> bytes:
        """Return a layer as it is uncompressed."""
        from obdlab.layers.tarwrap import open_tarwrap
        from obdlab.layers.zfile import open_zfile
        from tests.devices.blobs import MemoryBlob

        reference = Reference.parse(image)
        layer = self.documents(image)[0].layers[number]
        with closing(RegistryClient(Credentials.load(None))) as client:
            data = client.read_blob(client.repository(reference), layer.digest, layer.size, 64 << 20)
        with open_zfile(open_tarwrap(MemoryBlob(data))) as content:
            return content.read_at(0, content.size)

    def leftovers(self) -> list[str]:
        """Return mounts, devices and files that builds have left, except for the caches."""
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.place) in line]
        devices = [str(path) for path in (self.place / "run" / "devices").glob("*")]
        starts = [str(path) for path in (self.place / "run").glob("build-*")]
        work = [str(path) for path in self.place.glob("obdlab-convert-*")]
        partial = [str(path) for path in (self.place / "layers").glob("*.partial")]
        return mounts + devices + starts + work + partial
