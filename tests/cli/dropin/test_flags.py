"""Each option of the originals does what it did there, or is refused by its name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from obdlab.cli.dropin import attacher, convertor, ctr
from obdlab.cli.dropin.dispatch import main
from obdlab.cli.dropin.grammar import Style, Tool
from obdlab.cli.dropin.originals import TOOLS
from obdlab.cli.main import build_parser
from obdlab.layerfiles.description import describe
from obdlab.layers.upper import open_upper
from tests.layers.golden import GOLDEN, LSMT

#: Options of overlaybd 063821f and accelerated-container-image 4f5c597f, transcribed from their sources.
ORIGINALS = {
    "overlaybd-create": "-u -s --turboOCI --fastoci --raw --mkfs --verbose",
    "overlaybd-commit": "-m --uuid -p --parent-uuid -z -t -f --algorithm --bs --turboOCI --fastoci --seal "
    "--commit_sealed --compress_threads --verbose --upload --upload_bs --cred_file_path --tls_key_path "
    "--tls_cert_path",
    "overlaybd-merge": "--verbose --service_config_path --compress -t --upload --upload_bs --cred_file_path "
    "--tls_key_path --tls_cert_path",
    "overlaybd-zfile": "-t -x -f --verify --algorithm --bs",
    "overlaybd-apply": "--raw --mkfs --verbose --service_config_path --gz_index_path --checksum --from_qcow2 "
    "--no-extract-rootfs",
    "overlaybd-resize": "--config --size --service_config_path --verbose",
    "turboOCI-apply": "--mkfs --fstype --verbose --service_config_path --gz_index_path --import --export",
    "overlaybd-tcmu": "",
    "overlaybd-snapshotter": "",
    "overlaybd-attacher attach": "--id --config --verbose -v --with-devid",
    "overlaybd-attacher detach": "--id --verbose -v",
    "convertor": "--repository -r --username -u --plain --verbose --input-tag -i --input-digest -g --output-tag -o "
    "--dir -d --oci --fstype --mkfs --vsize --fastoci --turboOCI --overlaybd --db-str --db-type --concurrency-limit "
    "--disable-sparse --referrer --cert-dir --root-ca --client-cert --insecure --reserve --no-upload --dump-manifest",
    "ctr rpull": "--skip-verify -k --plain-http --user -u --refresh --hosts-dir --tlscacert --tlscert --tlskey "
    "--http-dump --http-trace --label --snapshotter --download-blobs",
    "ctr obdconv": "--skip-verify -k --plain-http --user -u --refresh --hosts-dir --tlscacert --tlscert --tlskey "
    "--http-dump --http-trace --fstype --dbstr --algorithm --bs --vsize",
    "ctr record-trace": "--time --priority_list --working-dir --snapshotter --runtime --max-concurrent-downloads "
    "--disable-network-isolation --cni-plugin-dir",
}
UUID = "11111111-1111-4111-8111-111111111111"
GIB = 1 << 30


def tool_of(name: str) -> Tool:
    """Return the table of a command."""
    first, _, verb = name.partition(" ")
    if verb:
        return {"ctr": ctr.VERBS, "overlaybd-attacher": attacher.VERBS}[first][verb]
    module, _, table = TOOLS[name][1].partition(":")
    tool: Tool = getattr(import_module(f"obdlab.cli.dropin.{module}"), table)
    return tool


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_tables_have_the_options_of_the_originals_and_no_other(name: str) -> None:
    known = [spelt for flag in tool_of(name).flags for spelt in flag.names]
    assert sorted(known) == sorted(ORIGINALS[name].split())


def test_every_command_is_among_the_originals() -> None:
    assert {name.split()[0] for name in ORIGINALS} == set(TOOLS)


def operands(tool: Tool, directory: Path) -> list[str]:
    """Return operands that the command line may have, as files that exist."""
    words = []
    for number, operand in enumerate(tool.operands):
        path = directory / f"operand{number}"
        path.write_bytes(b"")
        words.append("1" if operand.number else str(path))
    return words


def required(tool: Tool, directory: Path) -> dict[str, str]:
    """Return a value for each option that must be there."""
    (directory / "file").write_bytes(b"")
    return {flag.shown: str(directory / "file") for flag in tool.flags if flag.required}


REFUSED = [(name, flag.shown) for name in ORIGINALS for flag in tool_of(name).flags if flag.refused]


def test_these_options_are_refused() -> None:
    assert {f"{name} {flag}" for name, flag in REFUSED} == {
        "overlaybd-apply --from_qcow2",
        "overlaybd-apply --no-extract-rootfs",
        "turboOCI-apply --import",
        "turboOCI-apply --export",
        "convertor --mkfs",
        *(
            f"ctr {verb} {flag}"
            for verb in ("rpull", "obdconv")
            for flag in ("--refresh", "--hosts-dir", "--http-dump", "--http-trace")
        ),
        "ctr rpull --label",
        "ctr record-trace --runtime",
        "ctr record-trace --cni-plugin-dir",
    }


@pytest.mark.parametrize(("name", "flag"), REFUSED, ids=lambda value: value)
def test_a_refused_option_is_named_and_the_command_fails(
    name: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = tool_of(name)
    entry = next(each for each in tool.flags if each.shown == flag)
    given = [f"{flag}={'false' if entry.default else 'true'}"] if entry.is_switch else [flag, "other"]
    must = [word for pair in required(tool, tmp_path).items() for word in pair]
    status = main(name.split()[0], [*name.split()[1:], *must, *given, *operands(tool, tmp_path)])
    assert status == tool.failed
    assert f"{flag}: not possible here: {entry.refused}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ORIGINALS)
def test_mistakes_have_the_originals_statuses(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = tool_of(name)
    must = [word for pair in required(tool, tmp_path).items() for word in pair]
    right = [*must, *operands(tool, tmp_path)]
    cases = [(109, "--no-such-option", [*right, "--no-such-option"])]
    cases += [(114, each.shown, [*right, each.shown]) for each in tool.flags if not each.is_switch]
    for at, word in enumerate(must):
        if word.startswith("-"):
            cases.append((106, word, [*must[:at], *must[at + 2 :], *operands(tool, tmp_path)]))
    cases += [(104, each.shown, [*right, f"{each.shown}=perhaps"]) for each in tool.flags if each.is_switch]
    for status, named, words in cases:
        if tool.rest and status in (109, 114):
            continue  # all that follows the images is the container's command
        if tool.rest:
            words = [words[-1], *words[:-1]]
        assert main(name.split()[0], [*name.split()[1:], *words]) == (
            status if tool.style is Style.CLI11 else tool.failed
        ), words
        assert re.search(rf"\b{named.lstrip('-')}\b", capsys.readouterr().err), words


def test_values_and_files_are_checked_as_in_the_original(tmp_path: Path) -> None:
    missing, there = str(tmp_path / "none"), tmp_path / "there"
    there.write_bytes(b"")
    for name, words, status in (
        ("overlaybd-create", ["d", "i", "one"], 104),
        ("overlaybd-create", ["d", "i", "-1"], 105),
        ("overlaybd-create", ["d", "i"], 106),
        ("overlaybd-create", ["d", "i", "1", "extra"], 109),
        ("overlaybd-commit", [missing], 105),
        ("overlaybd-commit", ["--cred_file_path", missing, str(there)], 105),
        ("overlaybd-apply", [str(there), missing], 105),
        ("overlaybd-merge", ["--service_config_path", missing, str(there), "o"], 105),
        ("overlaybd-resize", ["--config", str(there), "--size", "0"], 1),
    ):
        assert main(name, words) == status, words


# -- what the options of the layer tools do --------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A command line in a directory that has the golden layers, and a check of what it left there."""

    words: str
    check: Callable[[Path], bool]


def _upper(path: Path, name: str = "d") -> bytes:
    with open_upper(path / f"{name}", path / "i") as upper:
        return upper.read_at(1024, 1024)


def _layer(path: Path):  # type: ignore[no-untyped-def]
    layer = describe(path / "o").layer
    assert layer is not None
    return layer


def _zfile(path: Path):  # type: ignore[no-untyped-def]
    facts = describe(path / "o")
    return facts.tar, facts.zfile


COMMIT = "l1.data l1.index o"
WORKS: dict[str, dict[str, Case]] = {
    "overlaybd-create": {
        "-u": Case(f"-u {UUID} d i 1", lambda at: describe(at / "d").layer.parent_uuid == UUID),  # type: ignore[union-attr]
        "-s": Case("-s d i 1", lambda at: (at / "d").stat().st_size == GIB + 4096 and not (at / "i").stat().st_size),
        "--turboOCI": Case("--turboOCI d i 1", lambda at: (at / "d").stat().st_size == GIB + 4096),
        "--fastoci": Case("--fastoci d i 1", lambda at: (at / "d").stat().st_size == GIB + 4096),
        "--raw": Case("--raw d i 1", lambda at: (at / "d").stat().st_size == GIB and not (at / "i").stat().st_size),
        "--mkfs": Case("--mkfs d i 1", lambda at: _upper(at)[56:58] == b"\x53\xef"),
        "--verbose": Case("--verbose d i 1", lambda at: (at / "d").exists()),
    },
    "overlaybd-commit": {
        "-m": Case(f"-m text {COMMIT}", lambda at: _layer(at).user_tag == "text"),
        "--uuid": Case(f"--uuid {UUID} {COMMIT}", lambda at: _layer(at).uuid == UUID),
        "-p": Case(f"-p {UUID} {COMMIT}", lambda at: _layer(at).parent_uuid == UUID),
        "--parent-uuid": Case(f"--parent-uuid {UUID} {COMMIT}", lambda at: _layer(at).parent_uuid == UUID),
        "-z": Case(f"-z {COMMIT}", lambda at: _zfile(at)[1].block_size == 4096),
        "-t": Case(f"-t -z {COMMIT}", lambda at: _zfile(at)[0] is not None),
        "-f": Case("-f l1.data l1.index there", lambda at: (at / "there").read_bytes() != b"there"),
        "--algorithm": Case(f"-z --algorithm zstd {COMMIT}", lambda at: _zfile(at)[1].algorithm == "zstd"),
        "--bs": Case(f"-z --bs 16 {COMMIT}", lambda at: _zfile(at)[1].block_size == 16384),
        "--seal": Case(
            "--seal l1.data l1.index", lambda at: describe(at / "l1.data").layer.trailer_flags is not None
        ),  # type: ignore[union-attr]
        "--commit_sealed": Case("--commit_sealed l1.sealed.lsmt o", lambda at: _layer(at).segments > 0),
        "--compress_threads": Case(
            f"-z --compress_threads 3 --uuid {UUID} -m same {COMMIT}", lambda at: (at / "o").stat().st_size > 0
        ),
        "--verbose": Case(f"--verbose {COMMIT}", lambda at: (at / "o").exists()),
    },
    "overlaybd-merge": {
        "--verbose": Case("--verbose c.json o", lambda at: (at / "o").exists()),
        "--service_config_path": Case("--service_config_path s.json c.json o", lambda at: (at / "o").exists()),
        "--compress": Case("--compress=false c.json o", lambda at: _zfile(at)[1] is None),
        "-t": Case("-t c.json o", lambda at: _zfile(at)[0] is None and _zfile(at)[1] is not None),
    },
    "overlaybd-zfile": {
        "-t": Case("-t there o", lambda at: _zfile(at)[0] is not None),
        "-x": Case("-x z o", lambda at: (at / "o").read_bytes() == (GOLDEN / "zfile/text.bin").read_bytes()),
        "-f": Case("-f l1.ops there", lambda at: (at / "there").read_bytes() != b"there"),
        "--verify": Case("--verify z", lambda at: True),
        "--algorithm": Case("--algorithm zstd there o", lambda at: _zfile(at)[1].algorithm == "zstd"),
        "--bs": Case("--bs 64 there o", lambda at: _zfile(at)[1].block_size == 65536),
    },
}
#: Options whose effect has a test of its own: of uploads, applying, turboOCI, resizing, devices.
ELSEWHERE = {
    "overlaybd-commit": {"--turboOCI", "--fastoci"},
    "overlaybd-apply": {"--raw", "--mkfs", "--verbose", "--service_config_path", "--gz_index_path", "--checksum"},
    "turboOCI-apply": {"--mkfs", "--fstype", "--verbose", "--service_config_path", "--gz_index_path"},
    "overlaybd-resize": {"--config", "--size", "--service_config_path", "--verbose"},
}
_UPLOADS = {"--upload", "--upload_bs", "--cred_file_path", "--tls_key_path", "--tls_cert_path"}


@pytest.mark.parametrize("name", [name for name in ORIGINALS if tool_of(name).style is Style.CLI11])
def test_every_option_of_the_layer_tools_has_a_test(name: str) -> None:
    covered = {*WORKS.get(name, ()), *ELSEWHERE.get(name, ())}
    covered |= {flag.shown for flag in tool_of(name).flags if flag.refused}
    assert covered | _UPLOADS >= set(ORIGINALS[name].split())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with golden layers, a ZFile, a configuration of an image and one of the service."""
    for name in ("l1.data", "l1.index", "l1.sealed.lsmt", "l1.lz4.lsmt", "l2.lz4.lsmt", "l1.ops"):
        (tmp_path / name).write_bytes((LSMT / name).read_bytes())
    (tmp_path / "z").write_bytes((GOLDEN / "zfile/text.lz4.4.zfile").read_bytes())
    lowers = [{"file": str(tmp_path / name)} for name in ("l1.lz4.lsmt", "l2.lz4.lsmt")]
    (tmp_path / "c.json").write_text(json.dumps({"lowers": lowers}))
    (tmp_path / "s.json").write_text("{}")
    (tmp_path / "there").write_bytes(b"there")
    monkeypatch.chdir(tmp_path)
    return tmp_path


_EACH = [(name, flag) for name, cases in WORKS.items() for flag in cases]


@pytest.mark.parametrize(("name", "flag"), _EACH, ids=lambda value: value)
def test_an_option_of_the_layer_tools_does_what_it_says(name: str, flag: str, place: Path) -> None:
    case = WORKS[name][flag]
    assert flag in case.words.replace("=", " ").split()
    assert main(name, case.words.split()) == 0
    assert case.check(place)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("overlaybd-create", "there i 1"),
        ("overlaybd-commit", "l1.data l1.index there"),
        ("overlaybd-commit", "-z --bs 5 l1.data l1.index o"),
        ("overlaybd-commit", "-z --bs 128 l1.data l1.index o"),
        ("overlaybd-commit", "-z --algorithm gzip l1.data l1.index o"),
        ("overlaybd-commit", "-t --upload http://127.0.0.1:1/v2/a/blobs/uploads l1.data l1.index o"),
        ("overlaybd-commit", "l1.data"),
        ("overlaybd-zfile", "l1.ops there"),
        ("overlaybd-zfile", "-x l1.ops o"),
        ("overlaybd-zfile", "missing o"),
        ("overlaybd-merge", "c.json"),
        ("overlaybd-merge", "l1.ops o"),
    ],
)
def test_a_failure_leaves_everything_as_it_was_and_ends_with_255(name: str, words: str, place: Path) -> None:
    def state() -> dict[str, bytes]:
        return {each.name: each.read_bytes() for each in place.iterdir()}

    before = state()
    assert main(name, words.split()) == 255
    assert state() == before


# -- what the options of convertor and ctr become --------------------------------------------------------------------

_FROM = "-r 127.0.0.1:5000/a -i 1"
#: Words, and attributes of obdlab's own command that they set.
CONVERTOR: dict[str, tuple[str, dict[str, object]]] = {
    "--repository": ("--repository h:1/a -i 1 -o 2", {"source": "h:1/a:1", "destination": "h:1/a:2"}),
    "-r": ("-r h:1/a -i 1 -o 2", {"source": "h:1/a:1"}),
    "--plain": ("-r h:1/a -i 1 -o 2 --plain", {"plain_http": ["h:1"]}),
    "--verbose": (f"{_FROM} -o 2 --verbose", {"verbose": 1}),
    "--input-tag": ("-r h:1/a --input-tag 7 -o 2", {"source": "h:1/a:7"}),
    "-i": ("-r h:1/a -i7 -o 2", {"source": "h:1/a:7"}),
    "--input-digest": (f"-r h:1/a --input-digest sha256:{'a' * 64} -o 2", {"source": f"h:1/a@sha256:{'a' * 64}"}),
    "-g": (f"-r h:1/a -g sha256:{'a' * 64} -o 2", {"source": f"h:1/a@sha256:{'a' * 64}"}),
    "--output-tag": (f"{_FROM} --output-tag 3", {"destination": "127.0.0.1:5000/a:3", "form": "overlaybd"}),
    "-o": (f"{_FROM} -o 3", {"destination": "127.0.0.1:5000/a:3", "docker": True}),
    "--dir": (f"{_FROM} -o 3 --dir /w", {"work_dir": Path("/w")}),
    "-d": (f"{_FROM} -o 3 -d /w", {"work_dir": Path("/w")}),
    "--oci": (f"{_FROM} -o 3 --oci", {"docker": False}),
    "--fstype": (f"{_FROM} --turboOCI 3 --fstype erofs", {"fs": "erofs", "form": "turbo-oci"}),
    "--vsize": (f"{_FROM} -o 3 --vsize 5", {"vsize_gib": 5}),
    "--fastoci": (f"{_FROM} --fastoci 3", {"form": "turbo-oci", "destination": "127.0.0.1:5000/a:3"}),
    "--turboOCI": (f"{_FROM} -o 9 --turboOCI 3", {"form": "turbo-oci", "destination": "127.0.0.1:5000/a:3"}),
    "--overlaybd": (f"{_FROM} -o 9 --overlaybd 3", {"form": "overlaybd", "destination": "127.0.0.1:5000/a:3"}),
    "--db-str": (f"{_FROM} -o 3 --db-str u:p@tcp(db:3306)/x --db-type mysql", {"database": "mysql://u:p@db:3306/x"}),
    "--db-type": (f"{_FROM} -o 3 --db-str u:p@tcp(db:3306)/x --db-type other", {"database": "none"}),
    "--concurrency-limit": (f"{_FROM} -o 3 --concurrency-limit 3", {"platforms_at_once": 3, "platform": "all"}),
    "--disable-sparse": (f"{_FROM} -o 3 --disable-sparse", {"form": "overlaybd"}),
    "--referrer": (f"{_FROM} -o 3 --referrer", {"referrer": True, "docker": False}),
    "--cert-dir": (f"{_FROM} -o 3 --cert-dir /c --cert-dir /e", {"certs_dir": [Path("/c"), Path("/e")]}),
    "--client-cert": (f"{_FROM} -o 3 --client-cert c:k", {"tls_client": "c:k"}),
    "--insecure": (f"{_FROM} -o 3 --insecure", {"insecure": ["127.0.0.1:5000"]}),
    "--reserve": (f"{_FROM} -o 3 --reserve --no-upload", {"destination": "oci:tmp_conv/image:3"}),
    "--no-upload": (f"{_FROM} -o 3 --no-upload -d w", {"destination": "oci:w/image:3"}),
    "--dump-manifest": (f"{_FROM} -o 3 --dump-manifest -d w", {"dump_manifest": Path("w/3.manifest.json")}),
}
_CTR = {"address": "/c.sock", "namespace": "n"}
RPULL: dict[str, tuple[str, dict[str, object]]] = {
    "--snapshotter": ("--snapshotter s h:1/a:1", {"snapshotter": "s", "reference": "h:1/a:1", **_CTR}),
    "--download-blobs": ("--download-blobs h:1/a:1", {"download_blobs": True}),
    "--skip-verify": ("--skip-verify h:1/a:1", {"insecure": ["h:1"]}),
    "-k": ("-k h:1/a:1", {"insecure": ["h:1"]}),
    "--plain-http": ("--plain-http h:1/a:1", {"plain_http": ["h:1"]}),
    "--tlscert": ("--tlscert c h:1/a:1", {"tls_client": "c"}),
    "--tlskey": ("--tlscert c --tlskey k h:1/a:1", {"tls_client": "c:k"}),
}
OBDCONV: dict[str, tuple[str, dict[str, object]]] = {
    "--fstype": ("--fstype ext4;noatime a b", {"fs": "ext4", "mount_options": "noatime"}),
    "--dbstr": ("--dbstr u:p@tcp(db:1)/x a b", {"database": "mysql://u:p@db:1/x", "source": "containerd:n:a"}),
    "--algorithm": ("--algorithm zstd a b", {"algorithm": "zstd", "destination": "containerd:n:b"}),
    "--bs": ("--bs 16 a b", {"block_size_kib": 16, "docker": True}),
    "--vsize": ("--vsize 8 a b", {"vsize_gib": 8, "containerd": "/c.sock"}),
}
RECORD: dict[str, tuple[str, dict[str, object]]] = {
    "--time": ("--time 5 a b", {"seconds": 5.0, "source": "containerd:n:a", "words": None}),
    "--working-dir": ("--working-dir /w a b", {}),
    "--snapshotter": ("--snapshotter s a b", {}),
    "--max-concurrent-downloads": ("--max-concurrent-downloads 1 a b", {}),
    "--disable-network-isolation": (
        "--disable-network-isolation a b sh -c x",
        {"host_network": True, "words": ["sh", "-c", "x"]},
    ),
    "--priority_list": (
        "--priority_list l a b",
        {"image": "containerd:n:a", "new": "containerd:n:b", "form": "acceleration-layer"},
    ),
}
#: Options that become files for the time of the command: tests with registries use them.
_FILES = {
    "convertor": {"--username", "-u", "--root-ca"},
    "ctr rpull": {"--user", "-u", "--tlscacert"},
    "ctr obdconv": set(RPULL) - {"--snapshotter", "--download-blobs"} | {"--user", "-u", "--tlscacert"},
}
_TABLES = {"convertor": CONVERTOR, "ctr rpull": RPULL, "ctr obdconv": OBDCONV, "ctr record-trace": RECORD}


@pytest.mark.parametrize("name", _TABLES)
def test_every_option_of_convertor_and_ctr_has_a_test(name: str) -> None:
    refused = {flag.shown for flag in tool_of(name).flags if flag.refused}
    assert set(_TABLES[name]) | _FILES.get(name, set()) | refused == set(ORIGINALS[name].split())


def becomes(name: str, words: list[str]) -> list[str]:
    """Return the first command of obdlab that a command line becomes."""
    values = tool_of(name).parse(words)
    values.address, values.namespace = "/c.sock", "n"
    if name == "convertor":
        return convertor.commands(values, convertor.source_of(values))[0]
    if name == "ctr obdconv":
        return ctr.obdconv_command(values)
    if name == "ctr rpull":
        return [*ctr.rpull_command(values), *ctr.registry_words(values, values.ref)]
    return ctr.record_commands(values, "trace")[0]


_TRANSLATED = [(name, flag) for name, table in _TABLES.items() for flag in table]


@pytest.mark.parametrize(("name", "flag"), _TRANSLATED, ids=lambda value: value)
def test_an_option_of_convertor_or_ctr_becomes_one_of_obdlabs(name: str, flag: str) -> None:
    words, wanted = _TABLES[name][flag]
    assert flag in words or flag == "-i"
    command = becomes(name, words.split())
    parsed = vars(build_parser(command).parse_args(command))
    assert {key: parsed[key] for key in wanted} == wanted


def test_one_run_of_convertor_makes_both_forms_the_ordinary_one_first() -> None:
    values = convertor.CONVERTOR.parse(f"{_FROM} --overlaybd n --turboOCI t --fastoci old".split())
    both = convertor.commands(values, convertor.source_of(values))
    assert [(words[3], words[words.index("--as") + 1]) for words in both] == [
        ("127.0.0.1:5000/a:n", "overlaybd"),
        ("127.0.0.1:5000/a:t", "turbo-oci"),
    ]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("-i 1 -o 2", '"repository" not set'),
        ("-r h/a -o 2", "one of input-tag [-i] or input-digest [-g] is required"),
        ("-r h/a -i 1", "output-tag is required"),
        ("-r h/a -i 1 -o 2 --reserve", "--reserve"),
        ("-r h/a -i 1 -o 2 --client-cert a --client-cert b", "--client-cert"),
        ("-r h/a -i 1 -o 2 --db-type mysql --db-str secret", "database: wanted"),
    ],
)
def test_convertor_refuses_what_it_cannot_do(
    words: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("convertor", words.split()) == 1
    error = capsys.readouterr().err
    assert text in error
    assert "secret" not in error
    assert os.listdir(tmp_path) in ([], ["tmp_conv"])
