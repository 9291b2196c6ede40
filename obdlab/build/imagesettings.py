"""The settings of an image that is being built: "config" of its configuration, and how instructions change it.

Source: OCI image specification, "Image Configuration"; Docker's image configuration for Shell and Healthcheck.
"""

from __future__ import annotations

import posixpath
import re
import signal
from typing import TYPE_CHECKING, Any

from obdlab.build.dockerfile import exec_form
from obdlab.build.expansion import ExpansionError, expand, pairs, split

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from obdlab.build.dockerfile import Instruction

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SHELL = ("/bin/sh", "-c")
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?", re.ASCII | re.IGNORECASE)
_DURATION = re.compile(r"(?:\d+(?:\.\d*)?(?:ns|us|µs|ms|s|m|h))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)")
_UNITS_NS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_DURATIONS = {
    "interval": "Interval", "timeout": "Timeout", "start-period": "StartPeriod", "start-interval": "StartInterval"
}  # fmt: skip


class ImageSettings:
    """The settings of one stage. Instructions of the base's triggers (ONBUILD) are refused by the builder."""

    def __init__(self, document: Mapping[str, Any] | None = None, escape: str = "\\") -> None:
        self.document: dict[str, Any] = {key: value for key, value in (document or {}).items() if value is not None}
        self.author = ""
        #: Variables that ARG declares, with their values; ENV of the same name wins.
        self.arguments: dict[str, str] = {}
        self._escape = escape
        self._has_command = False

    # -- what steps read ---------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """The variables of containers."""
        found = (entry.partition("=") for entry in self.document.get("Env") or ())
        return {name: value for name, _, value in found}

    @property
    def variables(self) -> dict[str, str]:
        """The variables that instructions may name."""
        return self.arguments | self.environment

    @property
    def shell(self) -> tuple[str, ...]:
        """The words before a command in shell form."""
        return tuple(self.document.get("Shell") or _SHELL)

    @property
    def directory(self) -> str:
        """The working directory."""
        return self.document.get("WorkingDir") or "/"

    @property
    def user(self) -> str:
        """The user of commands: "", or a name or number with an optional group."""
        return str(self.document.get("User") or "")

    def absolute(self, path: str) -> str:
        """Return a path of the image, relative ones from the working directory on; a slash at its end stays."""
        joined = posixpath.normpath(posixpath.join("/", self.directory, path))
        joined = "/" + joined.lstrip("/")
        return joined + "/" if (joined != "/" and path.endswith(("/", "/."))) or path in (".", "./") else joined

    def for_run(self, arguments: Mapping[str, str]) -> dict[str, Any]:
        """Return the settings for a container that runs a step, with ``arguments`` and those of ARG as variables."""
        names = {"PATH": _PATH} | dict(arguments) | self.arguments | self.environment
        return {
            "Env": [f"{name}={value}" for name, value in names.items()],
            "User": self.user,
            "WorkingDir": self.directory,
        }

    def expanded(self, instruction: Instruction, text: str) -> str:
        """Return ``text`` with variables replaced and quotes taken away. Raises BuildError."""
        try:
            return expand(text, self.variables, self._escape)
        except ExpansionError as error:
            raise instruction.error(str(error)) from None

    def words(self, instruction: Instruction) -> list[str]:
        """Return the words of an instruction, expanded; those of its exec form if it has one. Raises BuildError."""
        try:
            words = instruction.words if instruction.words is not None else split(instruction.text, self._escape)
            return [expand(word, self.variables, self._escape) for word in words]
        except ExpansionError as error:
            raise instruction.error(str(error)) from None

    # -- instructions that change nothing else -----------------------------------------------------------------------

    def apply(self, instruction: Instruction) -> bool:
        """Follow an instruction that changes settings alone. Return False if it is of another kind.

        Raises BuildError.
        """
        changes: dict[str, Callable[[Instruction], None]] = {
            "CMD": self._follow_cmd,
            "ENTRYPOINT": self._follow_entrypoint,
            "ENV": self._follow_env,
            "EXPOSE": self._follow_expose,
            "HEALTHCHECK": self._follow_healthcheck,
            "LABEL": self._follow_label,
            "MAINTAINER": self._follow_maintainer,
            "SHELL": self._follow_shell,
            "STOPSIGNAL": self._follow_stop_signal,
            "USER": self._follow_user,
            "VOLUME": self._follow_volume,
        }
        change = changes.get(instruction.name)
        if change is None:
            return False
        change(instruction)
        return True

    def declare(self, instruction: Instruction, given: Mapping[str, str], globals_: Mapping[str, str | None]) -> None:
        """Follow ARG: a value ``given`` for the build wins over the default, which wins over a global one."""
        for name, default in self.argument_pairs(instruction):
            value = given.get(name, default if default is not None else globals_.get(name))
            if value is not None:
                self.arguments[name] = value

    def argument_pairs(self, instruction: Instruction) -> list[tuple[str, str | None]]:
        """Return the names of an ARG, with their expanded defaults. Raises BuildError."""
        found: list[tuple[str, str | None]] = []
        try:
            for word in split(instruction.text, self._escape):
                name, equals, default = word.partition("=")
                if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII) is None:
                    raise instruction.error(f"malformed name (got {name!r})")
                value = expand(default, self.variables | _known(found), self._escape) if equals else None
                found.append((name, value))
        except ExpansionError as error:
            raise instruction.error(str(error)) from None
        return found

    def _pairs(self, instruction: Instruction) -> list[tuple[str, str]]:
        # All values see the variables from before the instruction.
        before = self.variables
        try:
            return [
                (expand(name, before, self._escape), expand(value, before, self._escape))
                for name, value in pairs(instruction.text, self._escape)
            ]
        except ExpansionError as error:
            raise instruction.error(str(error)) from None

    def _follow_env(self, instruction: Instruction) -> None:
        environment = self.environment
        for name, value in self._pairs(instruction):
            if not name or "=" in name:
                raise instruction.error(f"malformed name (got {name!r})")
            environment[name] = value
        self.document["Env"] = [f"{name}={value}" for name, value in environment.items()]

    def _follow_label(self, instruction: Instruction) -> None:
        self.document["Labels"] = {**(self.document.get("Labels") or {}), **dict(self._pairs(instruction))}

    def _follow_expose(self, instruction: Instruction) -> None:
        ports = dict(self.document.get("ExposedPorts") or {})
        for word in self.words(instruction):
            found = _PORT.fullmatch(word)
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
            if found is None or not 0 < first <= last <= 65535:
                raise instruction.error(f"not a port (got {word!r}, wanted 80, 80/udp or 8000-8010)")
            ports |= {f"{number}/{(found[3] or 'tcp').lower()}": {} for number in range(first, last + 1)}
        self.document["ExposedPorts"] = ports

    def _follow_volume(self, instruction: Instruction) -> None:
        volumes = dict(self.document.get("Volumes") or {})
        for word in self.words(instruction):
            if not word.strip():
                raise instruction.error("empty path")
            volumes[word] = {}
        self.document["Volumes"] = volumes

    def _follow_user(self, instruction: Instruction) -> None:
        self.document["User"] = self.expanded(instruction, instruction.text)

    def _follow_stop_signal(self, instruction: Instruction) -> None:
        text = self.expanded(instruction, instruction.text)
        name = text.upper() if text.upper().startswith("SIG") else f"SIG{text.upper()}"
        realtime = re.fullmatch(r"SIGRTM(?:IN(?:\+\d{1,2})?|AX(?:-\d{1,2})?)", name, re.ASCII)
        if not (text.isdecimal() and 0 < int(text) <= 64) and name not in signal.Signals.__members__ and not realtime:
            raise instruction.error(f"not a signal (got {text!r})")
        self.document["StopSignal"] = text

    def _follow_shell(self, instruction: Instruction) -> None:
        if not instruction.words:
            raise instruction.error('wants the exec form, such as ["/bin/bash", "-c"]')
        self.document["Shell"] = list(instruction.words)

    def command_words(self, instruction: Instruction, text: str | None = None) -> list[str]:
        """Return the words of a command: its exec form, or the shell's with the text."""
        if text is None and instruction.words is not None:
            return list(instruction.words)
        return [*self.shell, instruction.text if text is None else text]

    def _follow_cmd(self, instruction: Instruction) -> None:
        self.document["Cmd"] = self.command_words(instruction)
        self._has_command = True

    def _follow_entrypoint(self, instruction: Instruction) -> None:
        self.document["Entrypoint"] = self.command_words(instruction)
        if not self._has_command:  # the base's is for the base's entry point
            self.document.pop("Cmd", None)

    def _follow_healthcheck(self, instruction: Instruction) -> None:
        kind, _, rest = instruction.text.partition(" ")
        if kind.upper() == "NONE":
            if rest.strip() or instruction.flags:
                raise instruction.error("NONE stands alone")
            self.document["Healthcheck"] = {"Test": ["NONE"]}
            return
        if kind.upper() != "CMD" or not rest.strip():
            raise instruction.error(f"got {instruction.text[:40]!r}, wanted NONE or CMD command")
        words = exec_form(rest.strip())
        test = ["CMD", *words] if words is not None else ["CMD-SHELL", rest.strip()]
        check: dict[str, Any] = {"Test": test}
        for flag, key in _DURATIONS.items():
            if instruction.flag(flag):
                check[key] = _nanoseconds(instruction, flag)
        retries = instruction.flag("retries")
        if retries:
            if not (retries.isdecimal() and retries.isascii() and int(retries) < 1 << 31):
                raise instruction.error(f"--retries: not a number (got {retries!r})")
            check["Retries"] = int(retries)
        self.document["Healthcheck"] = check

    def _follow_maintainer(self, instruction: Instruction) -> None:
        self.author = instruction.text


def _known(found: list[tuple[str, str | None]]) -> dict[str, str]:
    return {name: value for name, value in found if value is not None}


def _nanoseconds(instruction: Instruction, flag: str) -> int:
    text = instruction.flag(flag)
    if _DURATION.fullmatch(text) is None:
        raise instruction.error(f"--{flag}: not a duration (got {text!r}, wanted 30s, 1m30s or 500ms)")
    return int(sum(float(number) * _UNITS_NS[unit] for number, unit in _DURATION_PART.findall(text)))
