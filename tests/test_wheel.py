"""A wheel in a bare environment: it finds what it needs from any directory, with nothing of the checkout in reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import capabilities

ROOT = Path(__file__).parents[1]
_BUILT_OF = ("pyproject.toml", "README.md", "LICENSE", "obdlab", "datasets", "experiments", "notebooks", "packaging")
_BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
_DEBIAN_PYTHON = Path("/usr/bin/python3")


class Installed:
    """A wheel in a virtual environment, used from an empty directory."""

    def __init__(self, directory: Path) -> None:
        self.environment = directory / "environment"
        self.bin = self.environment / "bin"
        self._elsewhere = directory / "elsewhere"
        self._elsewhere.mkdir()

    def obdlab(self, *words: str, status: int = 0) -> str:
        """Run the command; its exit status must be this."""
        return self.run(str(self.bin / "obdlab"), *words, status=status)

    def run(self, *command: str, status: int = 0) -> str:
        """Run any program from the empty directory, as a user who has not put the environment on PATH."""
        path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if "venv" not in part)
        done = subprocess.run(
            command,
            cwd=self._elsewhere,
            env={**os.environ, "PATH": path, "PYTHONPATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == status, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in _BUILT_OF:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-c", _BUILD, str(directory)]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return directory / done.stdout.split()[-1]


def _check(installed: Installed) -> None:
    home = installed.run(str(installed.bin / "python"), "-c", "import obdlab; print(obdlab.__file__)").strip()
    assert Path(home).is_relative_to(installed.environment)
    assert "cold_start " in installed.obdlab("lab", "evaluate", "--list")
    listed = installed.obdlab("lab", "dataset", "list", "--work-dir", "/nonexistent")
    assert [line.split()[0] for line in listed.splitlines()] == sorted(path.name for path in ROOT.glob("datasets/*/"))
    assert "0 of 16 cells measured" in installed.obdlab("lab", "status", "experiments/quick.toml", status=1)
    assert "0 of 16 cells measured" in installed.obdlab("lab", "status", "quick.toml", status=1)
    small = [
        "--set",
        "axes.segments=[100]",
        "--set",
        "axes.layers=[1]",
        "--set",
        "repeats=1",
        "--set",
        "load_limit=1e3",
    ]
    assert "raw rows: " in installed.obdlab("lab", "run", "index.toml", *small)
    told = installed.obdlab("lab", "export", "absent", "rows.csv", status=1)
    assert f"see: {installed.bin}/obdlab lab list" in told
    # The parts that stand apart are registered.
    names = "from obdlab.devices import kinds; print(*(kind.name for kind in kinds.every()))"
    registered = installed.run(str(installed.bin / "python"), "-c", names).split()
    assert registered == ["fuse+loop", "tcmu", "fuse+file", "ublk"]
    assert "Serve an image over NBD" in installed.obdlab("serve", "nbd", "--help")
    # What notebooks show without results of one's own.
    places = "from obdlab.lab.workbench import folder; print(*sorted(p.name for p in folder('notebooks').iterdir()))"
    notebooks = installed.run(str(installed.bin / "python"), "-c", places).split()
    assert notebooks == sorted(path.name for path in (ROOT / "notebooks").iterdir() if not path.name.startswith("."))


@pytest.mark.timeout(600)
def test_a_wheel_finds_datasets_experiments_and_notebooks(wheel: Path, tmp_path: Path) -> None:
    installed = Installed(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", str(installed.environment)], check=True, timeout=120)
    python = str(installed.bin / "python")
    installed.run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    # Dependencies are those of this environment, but not the obdlab in it: a path in a .pth brings no other .pth.
    site = installed.run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _check(installed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pip_installs_the_wheel_into_debians_venv(wheel: Path, tmp_path: Path) -> None:
    capabilities.require_tools(str(_DEBIAN_PYTHON))
    installed = Installed(tmp_path)
    subprocess.run([str(_DEBIAN_PYTHON), "-m", "venv", str(installed.environment)], check=True, timeout=120)
    installed.run(str(installed.bin / "python"), "-m", "pip", "install", "--quiet", str(wheel))
    _check(installed)
