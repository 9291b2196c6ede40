"""Instructions that change settings alone, against what Docker makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from obdlab.build.dockerfile import BuildError, parse
from obdlab.build.imagesettings import ImageSettings
from obdlab.build.stages import stages_of, unused_arguments
from obdlab.formats.oci import Platform

AMD64 = Platform("linux", "amd64")


def settings(body: str, base: dict[str, Any] | None = None, **given: str) -> ImageSettings:
    found = ImageSettings(base)
    for instruction in parse(f"FROM a\n{body}".encode()).instructions[1:]:
        if instruction.name == "ARG":
            found.declare(instruction, given, {"GLOBAL": "g"})
        else:
            assert found.apply(instruction)
    return found


@pytest.mark.parametrize(
    ("body", "key", "value"),
    [
        ("ENV a=1 b=$a\nENV c=$a", "Env", ["a=1", "b=", "c=1"]),
        ("ENV a=1\nENV a=2", "Env", ["a=2"]),
        ("ENV name the whole rest", "Env", ["name=the whole rest"]),
        ("ARG a=1\nENV b=${a}2", "Env", ["b=12"]),
        ('LABEL a="x y" b.c=1\nLABEL a=z', "Labels", {"a": "z", "b.c": "1"}),
        ("EXPOSE 80 53/udp 8000-8001", "ExposedPorts", {"80/tcp": {}, "53/udp": {}, "8000/tcp": {}, "8001/tcp": {}}),
        ('VOLUME ["/a", "/b c"]\nVOLUME /d /e', "Volumes", {"/a": {}, "/b c": {}, "/d": {}, "/e": {}}),
        ("ENV u=me\nUSER $u:staff", "User", "me:staff"),
        ("STOPSIGNAL SIGQUIT", "StopSignal", "SIGQUIT"),
        ('CMD ["a", "b"]', "Cmd", ["a", "b"]),
        ("CMD a $b", "Cmd", ["/bin/sh", "-c", "a $b"]),
        ('SHELL ["/bin/bash", "-ec"]\nENTRYPOINT a', "Entrypoint", ["/bin/bash", "-ec", "a"]),
        ("HEALTHCHECK NONE", "Healthcheck", {"Test": ["NONE"]}),
        (
            'HEALTHCHECK --interval=1m30s --timeout=500ms --retries=3 CMD ["x", "y"]',
            "Healthcheck",
            {"Test": ["CMD", "x", "y"], "Interval": 90_000_000_000, "Timeout": 500_000_000, "Retries": 3},
        ),
        ("HEALTHCHECK CMD curl x", "Healthcheck", {"Test": ["CMD-SHELL", "curl x"]}),
    ],
)
def test_settings(body: str, key: str, value: object) -> None:
    assert settings(body).document[key] == value


def test_an_entry_point_takes_the_base_s_command_away_but_not_its_own() -> None:
    base = {"Cmd": ["base"], "Env": ["A=1"]}
    assert "Cmd" not in settings('ENTRYPOINT ["e"]', base).document
    assert settings('CMD ["own"]\nENTRYPOINT ["e"]', base).document["Cmd"] == ["own"]


def test_arguments() -> None:
    found = settings("ARG A=default B GLOBAL\nARG C=$A", B="given")
    assert found.arguments == {"A": "default", "B": "given", "GLOBAL": "g", "C": "default"}
    assert settings("ARG A=1\nENV A=2").variables["A"] == "2"
    assert "A=1" in settings("ARG A=1").for_run({})["Env"]


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("a", "/w/a"),
        ("a/", "/w/a/"),
        (".", "/w/"),
        ("./", "/w/"),
        ("/x/../y", "/y"),
        ("..", "/"),
        ("/", "/"),
        ("//a", "/a"),
    ],
)
def test_paths(path: str, wanted: str) -> None:
    assert ImageSettings({"WorkingDir": "/w"}).absolute(path) == wanted


@pytest.mark.parametrize(
    "body",
    [
        *("EXPOSE x", "EXPOSE 0", "EXPOSE 9-8", "STOPSIGNAL SIGNOTHING", "STOPSIGNAL 99", "SHELL bash", "ENV a"),
        *("LABEL a=1 =d", "HEALTHCHECK x", "HEALTHCHECK --interval=1y CMD x", "HEALTHCHECK --what=1 CMD x"),
        *("ENV a=${b?no}", "ARG 1=2"),
    ],
)
def test_refusals_name_the_line(body: str) -> None:
    with pytest.raises(BuildError, match="Dockerfile:2: "):
        settings(body)


def test_stages_and_what_a_target_needs() -> None:
    source = """
    ARG V=1
    FROM base:$V AS one
    FROM other AS two
    FROM one AS three
    COPY --from=two a b
    FROM scratch AS four
    COPY --from=0 a b
    FROM scratch
    """
    found = stages_of(parse(source.encode()), {"V": "2"}, AMD64)
    assert [(each.name, each.base, each.parent) for each in found.all] == [
        ("one", "base:2", None),
        ("two", "other", None),
        ("three", "", 0),
        ("four", "scratch", None),
        ("", "scratch", None),
    ]
    assert [each.name for each in found.needed("three")] == ["one", "two", "three"]
    assert [each.name for each in found.needed("FOUR")] == ["one", "four"]
    assert [each.number for each in found.needed("")] == [4]
    with pytest.raises(BuildError, match="no such stage"):
        found.needed("five")
    assert unused_arguments(parse(source.encode()), {"V": "", "W": "", "http_proxy": ""}) == ["W"]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("RUN x", "Dockerfile:1: RUN: stands before the first FROM"),
        ("ARG a", "no FROM"),
        ("FROM a b", "Dockerfile:1: FROM: got 'a b'"),
        ("FROM a AS x\nFROM b AS X", "Dockerfile:2: FROM: not a new name"),
        ("FROM --platform=linux/s390x a", "another than the build's"),
        ("FROM $none", "Dockerfile:1: FROM"),
    ],
)
def test_malformed_stages(source: str, error: str) -> None:
    with pytest.raises(BuildError) as caught:
        stages_of(parse(source.encode()), {}, AMD64)
    assert error in str(caught.value)
