"""The digests of measured code that earlier commits have, for ``obdlab/lab/data/codes.json``.

Run: python -m tests.benchmarks.codes COMMIT... [--write]   (in a checkout with its history)

Rows carried a digest of all files of the package. For each commit this prints that digest and, by kind of experiment,
the digest of the code that the kind measures (``obdlab.lab.run.code``), both computed from the commit's files.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from obdlab.lab.kinds import KINDS
from obdlab.lab.run.code import NOT_MEASURED, PROGRAMS, digest_of

DATA = Path(__file__).parents[2] / "obdlab" / "lab" / "data" / "codes.json"
# The names that rooms had: the modules that are not measured, those that start programs, and the bench of starts.
_RUN = (
    "cluster",
    "declaration",
    "experiment",
    "grid",
    "interrupts",
    "measuring",
    "rows",
    "spec",
    "statistics",
    "summary",
)
_FLAT = (
    *("anatomy", "base", "build", "chroot", "evaluation", "figures", "layertar", "lock", "ocilayout", "paper"),
    *("parameters", "pins", "plan", "recipe", "report", "space", "timelines", "unpack", "workbench", *_RUN),
)
_FLAT_PROGRAMS = {
    "obdlab.lab.containerd": ("obdlab.snapshotter.service",),
    "obdlab.service.client": ("obdlab.service.host",),
}


def all_files(package: Path) -> str:
    """Return the digest that rows carried before: of all files with their places."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def of_kinds(package: Path) -> dict[str, str]:
    """Return the digest of measured code by kind; kinds that the package lacks have none."""
    bench, rooms, programs = "obdlab.lab.kinds.startbench", NOT_MEASURED, PROGRAMS
    if (package / "lab" / "bench.py").is_file():
        bench, programs = "obdlab.lab.bench", _FLAT_PROGRAMS
        rooms = ("obdlab.cli", "obdlab.lab.kinds.kind", *(f"obdlab.lab.{name}" for name in _FLAT))
    elif (package / "lab" / "run" / "bench.py").is_file():
        bench = "obdlab.lab.run.bench"
        run = (f"obdlab.lab.run.{name}" for name in (*_RUN, "diskspace", "plan"))
        rooms = (*(room for room in NOT_MEASURED if room != "obdlab.lab.run"), *run)
    found = {}
    for kind in KINDS:
        root = bench if kind == "start" else f"obdlab.lab.kinds.{kind}"
        if package.parent.joinpath(*root.split(".")).with_suffix(".py").is_file():
            found[kind] = digest_of(package, [root], rooms, programs)
    return found


def main() -> None:
    """Print the digests of the commits; with ``--write`` add them to the data file."""
    commits = [word for word in sys.argv[1:] if word != "--write"]
    known = json.loads(DATA.read_text())
    for commit in commits:
        archive = subprocess.run(["git", "archive", commit, "obdlab"], check=True, capture_output=True).stdout
        with tempfile.TemporaryDirectory() as directory, tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(directory, filter="data")
            package = Path(directory) / "obdlab"
            known[all_files(package)] = of_kinds(package)
            print(commit, all_files(package), json.dumps(known[all_files(package)]), flush=True)
    if "--write" in sys.argv:
        DATA.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
