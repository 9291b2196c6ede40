"""``python -m tests.upgrade.record``: have the old code make the files of ``tests/golden/upgrade``.

For clones without the old commit, and so that the files of the old code stay what they are. The state is small: an
image of two layers as it was converted, the database of conversions, a block cache and a snapshotter's root.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.convert.layouts import make_layout, member
from tests.registry.faulty import faulty_registry
from tests.upgrade.site import ROOT, Site

RECORDED = ROOT / "tests" / "golden" / "upgrade"
OPTIONS = ("--algorithm", "zstd", "--block-size-kib", "16", "--vsize-gib", "1")
#: Read by the old code, so that all of the image's data is in the cache; and its digest.
PIECE = 4 << 20

_READ = """
import hashlib, sys
from pathlib import Path
from obdlab.image.config import ImageConfig
from obdlab.image.open import open_image
from obdlab.image.settings import Settings
with open_image(ImageConfig.load(sys.argv[1]), Settings(cache_dir=Path(sys.argv[2]))) as image:
    print(hashlib.sha256(image.read_at(0, int(sys.argv[3]))).hexdigest())
"""

_SNAPSHOTS = """
import sys
from pathlib import Path
from obdlab.image.settings import Settings
from obdlab.service.client import DeviceService
from obdlab.snapshotter.core import Snapshotter
from obdlab.snapshotter.errors import AlreadyExistsError
from obdlab.snapshotter.images import ImageDevices
from obdlab.snapshotter.layout import Layout
from obdlab.snapshotter.overlaybd import ImageOptions
root, run, digest, size = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
layout = Layout(root)
devices = DeviceService(run, Settings(cache_dir=run / "cache", index_at_pull=False))
snapshotter = Snapshotter(layout, ImageDevices(layout, devices), ImageOptions())
snapshotter.prepare("extract plain", "", {"made": "by old code"})
(root / "snapshots" / "1" / "fs" / "file").write_text("of a plain layer")
snapshotter.commit("plain", "extract plain", {"containerd.io/gc.root": "yes"})
snapshotter.prepare("container", "plain", {})
(root / "snapshots" / "2" / "fs" / "written").write_text("by the container")
labels = {"containerd.io/snapshot.ref": digest, "containerd.io/snapshot/image-ref": "registry.test/a/b:1"}
labels |= {"containerd.io/snapshot/overlaybd/blob-digest": digest, "containerd.io/snapshot/overlaybd/blob-size": size}
try:
    snapshotter.prepare("extract lazy", "", labels)
except AlreadyExistsError:
    snapshotter.close()
"""


def main() -> None:
    """Make all files again."""
    RECORDED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="obdlab-record-") as name:
        place = Path(name)
        site = Site(place / "site")
        site.install_old()
        layers = [[member("a", b"1" * 50_000)], [member("b", b"2" * 50_000), member("c", bytes(range(256)) * 64)]]
        make_layout(place / "source", layers)
        database = f"sqlite:{place / 'conversions.sqlite'}"
        target = f"oci:{place / 'converted'}:v1"
        site.run("convert", "-q", *OPTIONS, "--database", database, place / "source", target)
        facts = _cache(site, place) | {"place": str(place)}
        names = ["source", "converted", "conversions.sqlite", "cache", "root"]
        (RECORDED / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
        with tarfile.open(RECORDED / "state.tar.xz", "w:xz") as archive:
            for each in names:
                archive.add(place / each, each)


def _cache(site: Site, place: Path) -> dict[str, object]:
    index = json.loads((place / "converted" / "index.json").read_text())
    blobs = place / "converted" / "blobs" / "sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"].partition(":")[2]).read_text())
    with faulty_registry() as registry:
        for layer in manifest["layers"]:
            registry.add_blob((blobs / layer["digest"].partition(":")[2]).read_bytes())
        url = registry.repository().blobs_url
        lowers = [{"digest": layer["digest"], "size": layer["size"]} for layer in manifest["layers"]]
        config = {"repoBlobUrl": url, "lowers": lowers}
        (place / "config.v1.json").write_text(json.dumps(config))
        read = _python(site, _READ, place / "config.v1.json", place / "cache", PIECE)
    top = manifest["layers"][0]
    _python(site, _SNAPSHOTS, place / "root", place / "run", top["digest"], top["size"])
    return {"config": config, "sha256": read.strip(), "layer": top["digest"]}


def _python(site: Site, program: str, *words: object) -> str:
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, env=site.environment, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
