"""The wheel carries the checkout's datasets, experiments and notebooks as package data (``obdlab/workbench``)."""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_py import build_py

_FOLDERS = ("datasets", "experiments", "notebooks")
_LEFT_OUT = {"__pycache__", ".ipynb_checkpoints"}


def _files() -> list[Path]:
    found = [path for folder in _FOLDERS for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return [path for path in found if not _LEFT_OUT & set(path.parts)]


class BuildPy(build_py):
    """Copies the folders into the package being built; an editable installation reads the checkout's own."""

    def run(self) -> None:
        """Build the package, then add the folders."""
        super().run()
        if not self.editable_mode:
            for source, target in self._copies().items():
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(source), str(target))

    def get_source_files(self) -> list[str]:
        """Return what a source distribution needs for this."""
        return [*super().get_source_files(), *map(str, _files()), "packaging/wheel.py"]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return the files that the built package holds."""
        outputs = super().get_outputs(include_bytecode)
        return [*outputs, *([] if self.editable_mode else map(str, self._copies().values()))]

    def _copies(self) -> dict[Path, Path]:
        return {path: Path(self.build_lib) / "obdlab" / "workbench" / path for path in _files()}
