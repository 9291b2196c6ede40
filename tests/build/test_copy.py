"""COPY and ADD by whole builds: what goes where, and what hostile contexts, archives and bases cannot do."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e import images
from tests.snapshotter import imagefiles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.build.building import Bench

pytestmark = [pytest.mark.kernel, pytest.mark.registry, pytest.mark.tools("runc")]


def tar_of(members: Mapping[str, bytes | str], how: str = "", **changes: object) -> bytes:
    """Return a tar: bytes are files, texts are targets of links."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{how}") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.uid, info.gid, info.mtime = 5, 6, 1234567890
            for key, value in changes.items():
                setattr(info, key, value)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def linked_base(bench: Bench, name: str, links: Mapping[str, str]) -> str:
    """Push a base whose root has these links, as none that a careful builder makes."""
    tar = imagefiles.LayerTar()
    for path, target in links.items():
        tar.add(path, kind=b"2", linkname=target, mode=0o777)
    return images.push_converted(bench.host, name, [images.busybox_layer(), tar.bytes()], bench.place)


def test_destinations(bench: Bench) -> None:
    base = bench.base("copy/destinations", {"there/old": b"old", "etc/passwd": b"me:x:7:8::/:/bin/sh\n"})
    new = f"{bench.host}/copy/destinations-new:1"
    bench.context(
        f"""FROM {base}
        WORKDIR /w
        COPY one renamed
        COPY one two /many/
        COPY d /there
        COPY d/*.t[xy]t /globbed/
        COPY one /there
        COPY --chown=me --chmod=600 link /owned
        COPY --chown=me:9 d /ownedd/
        COPY ["with space", "/"]
        COPY <<one.txt <<"two.txt" /written/
$HOME is "$HOME"
one.txt
$HOME
two.txt
        RUN <<END
        echo $((1+1)) >/counted
        stat -c '%u %g %a' /owned /ownedd /ownedd/a.txt >/stat
END
        """,
        {
            "one": "1", "two": "2", "d/a.txt": "a", "d/b.tyt": "b", "d/c.tzt": "c", "d/sub/x": "x",
            "link": Path("one"), "d/inner": Path("/etc/passwd"), "with space": "s",
        },
    )  # fmt: skip
    bench.build(new)
    assert bench.cat(new, "/w/renamed") == "1"
    assert sorted(bench.ls(new, "/many")) == ["one", "two"]
    assert sorted(bench.ls(new, "/there")) == ["a.txt", "b.tyt", "c.tzt", "inner", "old", "one", "sub"]
    assert sorted(bench.ls(new, "/globbed")) == ["a.txt", "b.tyt"]
    assert bench.cat(new, "/owned") == "1"
    assert bench.cat(new, "/stat") == "7 7 600\n7 9 755\n7 9 644\n"
    assert bench.cat(new, "/with space") == "s"
    assert bench.cat(new, "/written/one.txt") == ' is ""\n'
    assert bench.cat(new, "/written/two.txt") == "$HOME\n"
    assert bench.cat(new, "/counted") == "2\n"
    # A link below a source is a link in the image, to the image's own file.
    assert any("inner -> /etc/passwd" in line for line in bench.ls(new, "/there", "-l"))


def test_nothing_is_written_through_links_of_a_hostile_base(bench: Bench) -> None:
    outside = bench.place / "outside"
    outside.mkdir()
    (outside / "victim").write_text("host")
    (bench.place / "link-to-file").write_text("host")
    up = "../" * 20
    base = linked_base(
        bench,
        "copy/hostile",
        {
            "absolute": str(outside),
            "relative": f"{up}{outside}",
            "file": f"{outside}/victim",
            "etc/alternatives": up,
        },
    )
    new = f"{bench.host}/copy/hostile-new:1"
    archive = tar_of({"absolute/by-tar": b"x", "in": str(outside), "in/victim": b"overwritten"})
    bench.context(
        f"FROM {base}\nRUN /bin/busybox mkdir -p {outside}\nCOPY x /absolute/x\nCOPY d /relative/d\nCOPY x /file\n"
        "COPY x /etc/alternatives/deep/x\nADD a.tar /\nWORKDIR /absolute/w\nRUN echo >/absolute/by-run",
        {"x": "image", "d/y": "image", "a.tar": archive},
    )
    bench.build(new)
    assert sorted(path.name for path in outside.iterdir()) == ["victim"]
    assert (outside / "victim").read_text() == "host"
    # All of it is in the image, where its own root leads.
    assert sorted(bench.ls(new, str(outside))) == ["by-run", "by-tar", "d", "victim", "w", "x"]
    assert bench.cat(new, "/file") == "image"
    assert bench.cat(new, "/deep/x") == "image"


@pytest.mark.parametrize(
    ("dockerfile", "error"),
    [
        ("COPY ../outside /", "leads out of the build context"),
        ("COPY d/../../outside /", "leads out of the build context"),
        ("COPY out /x", "names no file of the build context"),
        ("COPY up /x", "names no file of the build context"),
        ("ADD http://host/x /", "URLs are not fetched"),
        ("ADD git@host:x /", "URLs are not fetched"),
        ("ADD evil.tar /", "leads out of the archive"),
        ("ADD evil-link.tar /", "leads out of the archive"),
        ("ADD cut.tar.gz /", "Dockerfile:2: ADD"),
        ("COPY one two /dir", "ends with '/'"),
        ("COPY one /bin/sh/x", "Dockerfile:2: COPY"),
        ("COPY d /bin/busybox", "Dockerfile:2: COPY"),
        ("COPY --chown=nobody-here one /", "no user 'nobody-here'"),
        ("COPY --chmod=u+x one /", "wanted an octal mode"),
        ("COPY --parents one /", "flag --parents is not supported"),
        ("COPY --from=7 one /", "not an earlier stage"),
        ("COPY ignored /", "left out by .dockerignore"),
    ],
)
def test_refused(bench: Bench, base: Callable[[], str], dockerfile: str, error: str) -> None:
    (bench.place / "outside").write_text("host")
    hard = tar_of({"x": b""}, type=tarfile.LNKTYPE, linkname="../../../outside")
    bench.context(
        f"FROM {base()}\n{dockerfile}",
        {
            "one": "1", "two": "2", "d/x": "x", "ignored": "i", ".dockerignore": "ignored",
            "out": bench.place / "outside", "up": Path("../outside"),
            "evil.tar": tar_of({"../../outside": b"x"}), "evil-link.tar": hard,
            "cut.tar.gz": tar_of({"a": bytes(range(256)) * 4096}, "gz")[:-100],
        },
    )  # fmt: skip
    assert error in bench.refused(f"{bench.host}/copy/refused-new:1")
    assert (bench.place / "outside").read_text() == "host"


@pytest.fixture
def base(bench: Bench) -> Callable[[], str]:
    return lambda: bench.base("copy/refused")


@pytest.mark.parametrize("how", ["", "gz", "bz2", "xz"])
def test_add_unpacks_archives(bench: Bench, how: str) -> None:
    base = bench.base("copy/archives")
    new = f"{bench.host}/copy/archives-new:{how or 'plain'}"
    archive = tar_of({"a/b": b"b", "a/link": "b", "top": b"t"}, how)
    bench.context(
        f"FROM {base}\nADD x.bin /to/\nADD --chown=1:2 x.bin /owned\nCOPY x.bin /copied\nADD plain /to/\n"
        "RUN stat -c '%u %g %Y' /to/a/b /owned/top >/stat",
        {"x.bin": archive, "plain": "no archive"},
    )
    bench.build(new)
    assert sorted(bench.ls(new, "/to")) == ["a", "plain", "top"]
    assert sorted(bench.ls(new, "/to/a")) == ["b", "link"]
    assert bench.cat(new, "/stat") == "5 6 1234567890\n1 2 1234567890\n"
    assert bench.obdlab("image", "cat", f"{new}:/copied", "--help").returncode == 0
    assert "copied" in bench.ls(new, "/")


def test_ignored_files_and_exceptions(bench: Bench) -> None:
    base = bench.base("copy/ignored")
    new = f"{bench.host}/copy/ignored-new:1"
    bench.context(
        f"FROM {base}\nCOPY . /all/\n",
        {
            ".dockerignore": "**/*.log\nsecret\n!secret/public\nDockerfile*\n",
            "a": "", "x.log": "", "d/y.log": "", "d/z": "", "secret/key": "", "secret/public": "",
        },
    )  # fmt: skip
    bench.build(new)
    assert sorted(bench.ls(new, "/all")) == [".dockerignore", "a", "d", "secret"]
    assert bench.ls(new, "/all/d") == ["z"]
    assert bench.ls(new, "/all/secret") == ["public"]
