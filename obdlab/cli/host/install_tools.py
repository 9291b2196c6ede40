"""``obdlab install-tools``: the original's commands, served by obdlab, in a directory."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.dropin.originals import HOME, TOOLS
from obdlab.cli.jsonoutput import add_json_option, answer
from obdlab.errors import ObdlabError
from obdlab.system.newfile import replace_file

if TYPE_CHECKING:
    import argparse

#: The second line of every installed file, by which obdlab knows its own.
MARK = "# made by obdlab install-tools: obdlab's engine under the original's name"
# The kernel reads so many bytes of a first line that names an interpreter (binfmt_script).
_MOST_INTERPRETER = 127
_DESCRIPTION = f"""\
Puts the commands of overlaybd and of its snapshotter under their own names into DIR: {", ".join(TOOLS)}.
Each takes the original's options, prints what it prints and ends with its status, but runs obdlab. Programs that call
the original's tools by path (its snapshotter and convertor, BuildKit) then work with obdlab. Without DIR they go to
the places of the original's packages, {HOME}/bin and {HOME}/snapshotter. Files of others are replaced with --force
alone; --uninstall removes obdlab's own."""


class InstallError(ObdlabError):
    """A file of another maker is in the way, or a directory cannot be written."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = _DESCRIPTION
    parser.epilog = "example: obdlab install-tools /opt/overlaybd/bin --only overlaybd-commit"
    parser.add_argument("directory", metavar="DIR", type=Path, nargs="?", help="one directory for all commands")
    parser.add_argument(
        "--only", action="append", choices=tuple(TOOLS), metavar="NAME", help="this command alone; repeatable"
    )
    parser.add_argument("--force", action="store_true", help="replace the files of others")
    parser.add_argument("--uninstall", action="store_true", help="remove the commands that obdlab installed")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Install or remove."""
    places = {name: _place(args.directory, name) for name in args.only or TOOLS}
    done = _uninstall(places) if args.uninstall else _install(places, force=args.force)
    verb = "removed" if args.uninstall else "installed"
    answer(args, {verb: [str(path) for path in done]}, *(f"{verb} {path}" for path in done))
    return 0


def _place(directory: Path | None, name: str) -> Path:
    return (HOME / TOOLS[name][0] if directory is None else directory) / name


def _install(places: dict[str, Path], *, force: bool) -> list[Path]:
    others = [str(path) for path in places.values() if os.path.lexists(path) and not is_ours(path)]
    if others and not force:  # before anything is changed
        raise InstallError(f"{', '.join(others)}: not made by obdlab, and not replaced without --force")
    for name, path in places.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, script(name).encode(), private=False)
            path.chmod(0o755)
        except OSError as error:
            raise InstallError(f"{path}: cannot be written ({error.strerror})") from error
    return list(places.values())


def _uninstall(places: dict[str, Path]) -> list[Path]:
    gone = [path for path in places.values() if is_ours(path)]
    for path in gone:
        try:
            path.unlink()
        except OSError as error:
            raise InstallError(f"{path}: cannot be removed ({error.strerror})") from error
    return gone


def is_ours(path: Path) -> bool:
    """Return True if obdlab installed the file at ``path``; a symbolic link is never ours."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(_MOST_INTERPRETER + len(MARK) + 16).splitlines()[1:2]
    except OSError:
        return False


def script(name: str) -> str:
    """Return the text of an installed command. Its interpreter is this one, its name in process lists the command's.

    Python runs isolated (-I): neither the caller's environment nor its directory brings modules. Worker processes of
    multiprocessing load the file again, and must not run it.
    """
    first = f"#!{sys.executable} -I"
    call = f"import sys; from obdlab.cli.dropin.dispatch import main; sys.exit(main({name!r}))"
    if " " in sys.executable or len(first) > _MOST_INTERPRETER:
        return f'#!/bin/sh\n{MARK}\nexec {shlex.quote(sys.executable)} -I -c {shlex.quote(call)} "$@"\n'
    imports, _, run = call.rpartition("; ")
    guarded = f'{imports.replace("; ", chr(10))}\nif __name__ == "__main__":\n    {run}\n'
    return f"{first}\n{MARK}\n{guarded}"
