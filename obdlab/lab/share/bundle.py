"""Bundles: one file with raw rows, environments, versions, tables and pages, for distrustful readers.

``pack`` makes it; ``unpack`` checks every file against its digest, and computes every table from the rows again. Both
need no root. The same results give the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.lab.run.declaration import last_spec, open_experiment
from obdlab.lab.run.rows import RowStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_SUMS, _README, _VERSIONS = "SHA256SUMS", "README.md", "requirements.txt"
#: Files of an experiment: those that must be there, and those that may.
_NEEDED = ("rows.jsonl", "environments.jsonl", "spec.json")
_MORE = ("rows.csv", "used.csv", "report.html", "report.ipynb", "not_run.txt")
_TABLE = "table.txt"
#: A bundle is small: rows of thousands of starts take some MB. Bounds of a hostile one.
_MOST_FILES, _MOST_BYTES = 10_000, 1 << 30


class BundleError(ObdlabError):
    """A bundle is damaged, or there is nothing to pack."""


@dataclass(frozen=True, slots=True)
class Checked:
    """An experiment of an unpacked bundle: its number of rows, and whether they give its table."""

    name: str
    rows: int
    same: bool


def pack(results: Path, names: Sequence[str], target: Path) -> int:
    """Write the results of these experiments (directories below ``results``) as one file; return its size.

    Raises BundleError if one has no rows. An existing file is replaced once the new one is whole.
    """
    files: dict[str, bytes] = {}
    for name in names:
        files |= {f"results/{name}/{path}": data for path, data in _experiment(results / name, name).items()}
    files[_VERSIONS] = "".join(f"{line}\n" for line in _versions()).encode()
    files[_README] = _readme(results, names).encode()
    files[_SUMS] = "".join(
        f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in sorted(files.items())
    ).encode()
    data = _tar(files)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    part.write_bytes(data)
    part.replace(target)
    return len(data)


def unpack(bundle: Path, directory: Path) -> list[Checked]:
    """Unpack a bundle into a new or empty directory, check it, and return its experiments.

    Raises BundleError naming the first file that is missing, foreign or damaged; then nothing is left.
    """
    if directory.exists() and any(directory.iterdir()):
        raise BundleError(f"{directory}: holds files (wanted a new or empty directory)")
    files = dict(_read(bundle))
    _check(bundle, files)
    for path, data in files.items():
        place = directory / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return [check(directory / "results" / name, name) for name in experiments(files)]


def experiments(files: Mapping[str, bytes]) -> list[str]:
    """Return the names of a bundle's experiments."""
    return sorted(
        path.removeprefix("results/").removesuffix("/rows.jsonl") for path in files if path.endswith("/rows.jsonl")
    )


def check(directory: Path, name: str) -> Checked:
    """Compute an experiment's table from its rows, and compare it with the one that is stored."""
    stored = (directory / _TABLE).read_text(encoding="utf-8")
    return Checked(name, len(RowStore(directory).rows()), stored == _table(directory))


def _experiment(directory: Path, name: str) -> dict[str, bytes]:
    missing = [each for each in _NEEDED if not (directory / each).is_file()]
    if missing:
        raise BundleError(f"{directory}: not the results of an experiment (missing {', '.join(missing)})")
    found = {each: (directory / each).read_bytes() for each in (*_NEEDED, *_MORE) if (directory / each).is_file()}
    if not RowStore(directory).rows():
        raise BundleError(f"{name}: no rows")
    return {**found, _TABLE: _table(directory).encode()}


def _table(directory: Path) -> str:
    return "\n".join(open_experiment(last_spec(directory), directory).details()) + "\n"


def _versions() -> list[str]:
    return sorted({f"{each.metadata['Name']}=={each.version}" for each in metadata.distributions()}, key=str.lower)


def _readme(results: Path, names: Sequence[str]) -> str:
    lines = []
    for name in names:
        directory = results / name
        rows = RowStore(directory).rows()
        failed = sum(bool(row.get("error")) for row in rows)
        about = last_spec(directory).description
        days = sorted({str(row.get("started", ""))[:10] for row in rows} - {""})
        when = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "on unknown days"
        lines.append(f"- `results/{name}`: {len(rows)} rows ({failed} failed), {when}. {about}".rstrip())
    return _TEXT.format(version=metadata.version("obdlab"), experiments="\n".join(lines))


_TEXT = """# Measurements made with obdlab {version}

{experiments}

`rows.jsonl` holds one line for each start or point, failed ones included; `environments.jsonl` the hosts, kernels,
package versions and commits; `spec.json` the declaration with its seed; `table.txt` the table and its findings;
`requirements.txt` the Python packages of the host that packed this file.

## Checklist

- **Available**: this file, and the commit that each environment names (`git_commit`).
- **Functional**: without root, on any machine, with obdlab and its extra `lab` installed:

      obdlab lab unbundle THIS_FILE DIRECTORY            # every digest; every table computed from the rows again
      obdlab lab show NAME --results DIRECTORY/results   # table, findings, caveats
      obdlab lab report --results DIRECTORY/results      # the figures and the ledger of the paper's claims

- **Reproduced**: as root on a Debian host, with the checkout at that commit: `obdlab lab run` with the declaration in
  `spec.json`, and the ratios compared within their intervals. Seconds differ between machines.
"""


def _tar(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=stream, mode="wb", mtime=0, filename="") as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for path, data in sorted(files.items()):
            entry = tarfile.TarInfo(f"bundle/{path}")
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


# A bundle comes from strangers: regular files below one directory, few and small, and nothing else.
def _read(bundle: Path) -> Iterator[tuple[str, bytes]]:
    left = _MOST_BYTES
    seen: set[str] = set()
    try:
        with tarfile.open(bundle, "r|gz") as tar:
            for entry in tar:
                path = PurePosixPath(entry.name)
                inner = str(PurePosixPath(*path.parts[1:]))
                if not entry.isreg() or path.is_absolute() or ".." in path.parts or path.parts[:1] != ("bundle",):
                    raise BundleError(
                        f"{bundle}: {entry.name[:200]!r}: foreign entry (wanted regular files below bundle/)"
                    )
                if inner in seen or len(seen) == _MOST_FILES or entry.size > left:
                    raise BundleError(
                        f"{bundle}: {inner[:200]!r}: again, or too large (wanted at most {_MOST_BYTES} bytes)"
                    )
                content = tar.extractfile(entry)
                data = content.read(entry.size) if content else b""
                left -= entry.size
                seen.add(inner)
                yield inner, data
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise BundleError(f"{bundle}: not a bundle: {error}") from error


def _check(bundle: Path, files: Mapping[str, bytes]) -> None:
    if _SUMS not in files:
        raise BundleError(f"{bundle}: {_SUMS}: missing")
    wanted: dict[str, str] = {}
    for line in files[_SUMS].decode("utf-8", "replace").removesuffix("\n").split("\n"):
        digest, _, path = line.partition("  ")
        wanted[path] = digest
    for path in sorted(set(files) - {_SUMS} | set(wanted)):
        if path not in files or path not in wanted:
            where = "missing" if path not in files else f"not in {_SUMS}"
            raise BundleError(f"{bundle}: {path[:200]}: {where}")
        got = hashlib.sha256(files[path]).hexdigest()
        if got != wanted[path]:
            raise BundleError(f"{bundle}: {path[:200]}: damaged (got sha256 {got}, wanted {wanted[path][:64]})")
    for name in experiments(files):
        missing = [each for each in (*_NEEDED, _TABLE) if f"results/{name}/{each}" not in files]
        if missing:
            raise BundleError(f"{bundle}: results/{name}: missing {', '.join(missing)}")
