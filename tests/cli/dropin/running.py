"""Running the installed commands as processes."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tools:
    """A directory with the commands, and the directory that they run in."""

    bin: Path
    cwd: Path

    def run(self, name: str, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command, without input."""
        return subprocess.run(
            [self.bin / name, *words],
            cwd=self.cwd,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def ok(self, name: str, *words: str | Path, **environment: str) -> str:
        """Run a command that must succeed; return its output."""
        done = self.run(name, *words, **environment)
        assert done.returncode == 0, (name, words, done.stderr)
        return done.stdout

    def config(self, name: str = "config.json", *lowers: dict[str, str], upper: str = "") -> Path:
        """Write an image's configuration with these lowers and, if named, the writable layer UPPER.data."""
        document: dict[str, object] = {"lowers": list(lowers), "resultFile": ""}
        if upper:
            document["upper"] = {"data": f"{self.cwd / upper}.data", "index": f"{self.cwd / upper}.index"}
        path = self.cwd / name
        path.write_text(json.dumps(document))
        return path

    def service(self) -> Path:
        """Write a configuration of the service."""
        path = self.cwd / "overlaybd.json"
        path.write_text(json.dumps({"cacheConfig": {"cacheDir": str(self.cwd / "cache")}}))
        return path
