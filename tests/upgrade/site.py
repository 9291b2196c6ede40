"""A place where obdlab is installed, first by old code and then by the present one, as ``pip install -U`` does it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

from tests import capabilities

ROOT = Path(__file__).parents[2]
#: The last commit before the package was rearranged (modules moved, another command line, other states on the wire).
OLD_COMMIT = "c082ba2"


class Site:
    """A directory with the package, for processes of their own."""

    def __init__(self, directory: Path) -> None:
        self._place = directory
        directory.mkdir()

    def install_old(self) -> None:
        """Install the old code, out of the repository's history. Skips the test where that is not whole."""
        git = ["git", "-C", str(ROOT)]
        known = subprocess.run([*git, "cat-file", "-e", f"{OLD_COMMIT}^{{commit}}"], capture_output=True, check=False)
        if known.returncode != 0:
            capabilities.missing("history", f"this clone has no commit {OLD_COMMIT}")
        packed = subprocess.run([*git, "archive", OLD_COMMIT, "obdlab"], capture_output=True, check=True, timeout=120)
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
            archive.extractall(self._place, filter="data")

    def install_new(self) -> None:
        """Replace the code by the present one: from now on only its modules are found."""
        shutil.rmtree(self._place / "obdlab", ignore_errors=True)
        shutil.copytree(ROOT / "obdlab", self._place / "obdlab", ignore=shutil.ignore_patterns("__pycache__"))

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which Python finds the package here."""
        return {**os.environ, "PYTHONPATH": str(self._place), "PYTHONDONTWRITEBYTECODE": "1"}

    @property
    def command(self) -> list[str]:
        """The installed command."""
        return [sys.executable, "-m", "obdlab"]

    def run(self, *words: str | Path, status: int = 0) -> str:
        """Run the installed command; return what it prints."""
        done = subprocess.run(
            [*self.command, *map(str, words)],
            cwd=self._place, env=self.environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == status, f"{words}: {done.returncode}: {done.stderr}"
        return done.stdout
