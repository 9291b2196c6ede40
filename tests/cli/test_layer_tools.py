"""create, commit, seal, merge, zfile, verify, diff, import: the original's bytes where they are determined."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import obdlab
from obdlab.cli.main import main
from obdlab.layers.upper import SparseUpper
from tests.image.test_open_remote import push, stored_blob
from tests.layers.golden import GOLDEN, LSMT, manifest, sha256_of
from tests.registry.server import RegistryServer

EMPTY_UUID = "abcdef01-2345-6789-abcd-ef0123456789"
#: What the original chooses.
ORIGINAL = "--algorithm lz4 --block-size-kib 4"
ZFILES = manifest("zfile")["entries"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def upper(name: str, tmp_path: Path) -> list[Path]:
    # Copies: opening a writable layer may repair it.
    for suffix in ("data", "index"):
        (tmp_path / f"{name}.{suffix}").write_bytes((LSMT / f"{name}.{suffix}").read_bytes())
    return [tmp_path / f"{name}.data", tmp_path / f"{name}.index"]


def commits() -> list[tuple[str, str]]:
    entries = manifest("lsmt")["entries"]
    return [(e["cmd"], e["sha256_of_files"][0]) for e in entries if e.get("cmd", "").startswith("overlaybd-commit")]


def own_flags(command: str) -> tuple[str, list[str]]:
    # The layer and our flags for one of the original's commands.
    words = shlex.split(command)[1:]
    flags, names = [], []
    compressed = "-z" in words
    while words:
        word = words.pop(0)
        match word:
            case "-m" | "--uuid" | "--algorithm":
                flags += [word, words.pop(0)]
            case "-p":
                flags += ["--parent-uuid", words.pop(0)]
            case "--bs":
                flags += ["--block-size-kib", words.pop(0)]
            case "-t":
                flags.append("--tar")
            case "-z":  # what the original chooses
                flags += ORIGINAL.split()
            case _:
                names.append(word)
    return names[0].removesuffix(".data"), flags + ([] if compressed else ["--algorithm", "none"])


@pytest.mark.parametrize(("command", "wanted"), commits(), ids=[command.split()[-1] for command, _ in commits()])
@pytest.mark.parametrize("workers", [1, 3])
def test_commits_have_the_bytes_of_the_original(command: str, wanted: str, workers: int, tmp_path: Path) -> None:
    name, flags = own_flags(command)
    out = tmp_path / "out"
    assert run("commit", *upper(name, tmp_path), out, *flags, "--workers", str(workers), "-q") == 0
    assert sha256(out) == wanted


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--algorithm none", "6d33f9159461bdfc586921d70528d8b3edc01d2434e57a681c5a19f76b37b11e"),
        (ORIGINAL, "11e5f59494a403dda31b05fd6c2c0755798f6ec3f944a39cbb97d85cec037e81"),
        (
            f"{ORIGINAL} --tar",
            "11a709d73ddc6c697d09b7f72efb26c4f0950e51681258f27ab92a03b008f199",
        ),
        ("--algorithm zstd --block-size-kib 64", "a731cc0de447da1aff4c6a758bd56e1d70e884755d4604e478b53ffca95fecfc"),
    ],
)
def test_an_empty_layer_from_create_to_commit(flags: str, wanted: str, tmp_path: Path) -> None:
    data, index, out = tmp_path / "data", tmp_path / "index", tmp_path / "out"
    assert run("create", data, index, "--vsize", "1G", "-q") == 0
    assert run("commit", data, index, out, "--uuid", EMPTY_UUID, *flags.split(), "-q") == 0
    assert sha256(out) == wanted
    assert run("commit", out, tmp_path / "again", "--uuid", EMPTY_UUID, *flags.split(), "-q") == 0
    assert sha256(tmp_path / "again") == wanted, "a sealed layer is committed as the writable one was"


@pytest.mark.parametrize("entry", ZFILES, ids=[entry["file"] for entry in ZFILES])
def test_zfiles_have_the_bytes_of_the_original(entry: dict[str, Any], tmp_path: Path) -> None:
    name = entry["file"]
    _, algorithm, kib, *kinds = name.removesuffix(".zfile").split(".")
    flags = ["--algorithm", algorithm, "--block-size-kib", kib, "-q"]
    flags += ["--tar"] * ("tar" in kinds) + ["--no-block-crcs"] * ("nocrc" in kinds)
    flags += ["--keep-first-header"] * ("ow" not in kinds)
    out, back = tmp_path / "out", tmp_path / "back"
    assert run("zfile", "compress", GOLDEN / "zfile" / entry["source"], out, *flags) == 0
    assert sha256(out) == entry["sha256"]
    assert run("zfile", "verify", out, "-q") == 0
    assert run("zfile", "extract", out, back, "-q") == 0
    assert back.read_bytes() == (GOLDEN / "zfile" / entry["source"]).read_bytes()


def obdlab_process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "obdlab", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False, **options)


def test_streams() -> None:
    source = (GOLDEN / "zfile" / "text.bin").read_bytes()
    packed = obdlab_process("layer", "zfile", "compress", *ORIGINAL.split(), "-", "-", input=source)
    assert (packed.returncode, packed.stderr) == (0, b"")
    assert packed.stdout == (GOLDEN / "zfile" / "text.lz4.4.zfile").read_bytes()
    back = obdlab_process("layer", "zfile", "extract", "-", "-", input=packed.stdout)
    assert (back.returncode, back.stdout, back.stderr) == (0, source, b"")
    refused = obdlab_process("layer", "zfile", "compress", "--tar", "-", "-", input=source)
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert b"only go where one can seek back" in refused.stderr


def test_a_broken_pipe_is_no_traceback() -> None:
    command = (
        f"{sys.executable} -m obdlab layer zfile compress {GOLDEN / 'zfile' / 'input.bin'} - | head -c 10 >/dev/null"
    )
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().strip() == "obdlab layer zfile: standard output: its reader has ended"


def test_extracting_leaves_holes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.write(b"x")
        file.truncate(64 << 20)
    assert run("zfile", "compress", source, tmp_path / "z", "-q") == 0
    assert run("zfile", "extract", tmp_path / "z", tmp_path / "back", "-q") == 0
    status = (tmp_path / "back").stat()
    assert status.st_size == 64 << 20
    assert status.st_blocks * 512 <= 2 << 20
    assert sha256(tmp_path / "back") == sha256(source)


def test_merge_and_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bottom, top = LSMT / "l1.lz4tar.lsmt", LSMT / "l2.sealed.lsmt"
    flat = tmp_path / "flat"
    assert run("merge", bottom, top, "-o", flat, "--tar", "-q") == 0
    wanted = next(e["decoded_sha256"] for e in manifest("lsmt")["entries"] if "stack" in e)
    with obdlab.open_stack([flat]) as disk:
        assert sha256_of(disk) == wanted
    assert run("diff", "--old", bottom, top, "--new", flat) == 0
    assert capsys.readouterr().out == "same content\n"
    assert run("diff", "--old", bottom, "--new", flat, "--json") == 3
    document = json.loads(capsys.readouterr().out)
    with obdlab.open_stack([bottom]) as old, obdlab.open_stack([flat]) as new:
        sectors = [n for n in range(old.size // 512) if old.read_at(n * 512, 512) != new.read_at(n * 512, 512)]
    listed = [sector for begin, end in document["ranges"] for sector in range(begin // 512, end // 512)]
    assert listed == sectors
    assert document["differing_size"] == 512 * len(sectors)
    assert run("diff", "--old", bottom, "--new", flat) == 3
    assert f"in {len(document['ranges'])} ranges" in capsys.readouterr().out


def test_merge_of_an_image_with_a_writable_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, index = upper("l2", tmp_path)
    config = tmp_path / "config.v1.json"
    config.write_text(
        json.dumps(
            {"lowers": [{"file": str(LSMT / "l1.plain.lsmt")}], "upper": {"data": str(data), "index": str(index)}}
        )
    )
    assert run("merge", config, "-o", tmp_path / "flat", "-q") == 0
    assert run("diff", "--old", config, "--new", LSMT / "l1.lz4.lsmt", LSMT / "l2.lz4.lsmt", "-q") == 0
    assert run("diff", "--old", config, "--new", tmp_path / "flat", "-q") == 0
    assert run("verify", config, "--json") == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["names_parent"] for layer in layers] == [True, True]


@pytest.mark.registry
def test_images_in_a_registry(
    registry_server: RegistryServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = [LSMT / "l1.lz4tar.lsmt", LSMT / "l2.lz4.lsmt"]
    config = tmp_path / "config.v1.json"
    push(registry_server, "tools/image", local).save(config)
    cache = ["--cache-dir", tmp_path / "cache", "--run-dir", tmp_path / "run"]
    assert run("verify", config, "--json", *cache) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 2
    assert run("diff", "--old", config, "--new", *local, "-q", *cache) == 0
    assert run("merge", config, "-o", tmp_path / "flat", "-q", *cache) == 0
    assert run("merge", *local, "-o", tmp_path / "flat of files", "-q", *cache) == 0
    assert sha256(tmp_path / "flat") == sha256(tmp_path / "flat of files")
    # Damage at the registry is noticed, where it is not in the cache.
    blob = stored_blob(registry_server, json.loads(config.read_text())["lowers"][1]["digest"])
    sound = blob.read_bytes()
    blob.write_bytes(sound[:50_000] + bytes([sound[50_000] ^ 1]) + sound[50_001:])
    try:
        assert run("verify", config, "-q", *cache) == 0
        assert run("verify", config, "-q", "--cache-dir", tmp_path / "other", "--run-dir", tmp_path / "run") == 1
    finally:
        blob.write_bytes(sound)  # other tests share the registry, and there the blob
    assert "CRC of ZFile block" in capsys.readouterr().err


def test_zero_blocks(tmp_path: Path) -> None:
    with SparseUpper.create(tmp_path / "data", 1 << 20) as upper:
        upper.write_at(0, bytes(65536) + b"x" * 4096)
    sizes = {}
    for what in ("keep", "mark", "drop"):
        out = tmp_path / what
        assert run("commit", tmp_path / "data", out, "--algorithm", "none", "--zero-blocks", what, "-q") == 0
        sizes[what] = out.stat().st_size
        assert run("diff", "--old", tmp_path / "keep", "--new", out, "-q") == 0
        assert run("merge", out, "-o", tmp_path / "flat", "--zero-blocks", "mark", "--force", "-q") == 0
        assert run("diff", "--old", tmp_path / "keep", "--new", tmp_path / "flat", "-q") == 0
    assert sizes["keep"] - sizes["mark"] == 65536
    assert sizes["drop"] <= sizes["mark"]


def test_seal_in_place(tmp_path: Path) -> None:
    data, index = upper("l1", tmp_path)
    before = data.read_bytes()
    assert run("seal", data, index, "-q") == 0
    sealed = (LSMT / "l1.sealed.lsmt").read_bytes()
    got = data.read_bytes()
    assert got[: len(before)] == before
    assert (len(got), got[-4096:]) == (len(sealed), sealed[-4096:]), "all but the padding of the index is determined"
    index.unlink()
    assert run("verify", data, "-q") == 0
    assert run("commit", data, tmp_path / "out", "-q") == 0


def test_verify_names_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = LSMT / "l1.lz4.lsmt"
    damaged = tmp_path / "damaged"
    content = bytearray(good.read_bytes())
    content[100_000] ^= 1
    damaged.write_bytes(content)
    assert run("verify", good, LSMT / "l2.plain.lsmt") == 0
    out = capsys.readouterr().out
    assert "without checksums" in out.splitlines()[1]
    assert "another parent" not in out
    assert run("verify", LSMT / "l2.plain.lsmt", good) == 0
    assert "names another parent" in capsys.readouterr().out
    assert run("verify", damaged) == 1
    assert f"{damaged}: CRC of ZFile block does not match" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.name for path in LSMT.glob("*.lsmt")))
def test_verify_finds_the_originals_layers_sound(name: str) -> None:
    assert run("verify", LSMT / name, "-q") == 0


def test_verify_compares_headers_and_trailers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = tmp_path / "mixed"
    one, two = (LSMT / "l1.plain.lsmt").read_bytes(), (LSMT / "l2.plain.lsmt").read_bytes()
    mixed.write_bytes(two[:4096] + one[4096:])
    assert run("verify", mixed) == 1
    assert "header of the LSMT layer contradicts its trailer in uuid" in capsys.readouterr().err
    one, two = (LSMT / "l1.lz4.lsmt").read_bytes(), (LSMT / "l2.lz4.lsmt").read_bytes()
    mixed.write_bytes(one[:-512] + two[-512:])
    assert run("verify", mixed) == 1
    assert "trailer of the ZFile contradicts its header in index_offset" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["commit", "merge", "zfile", "import"])
def test_nothing_is_replaced_unasked(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = LSMT / "l1.plain.lsmt", tmp_path / "out"
    out.write_bytes(b"mine")
    arguments: list[str | Path] = {
        "commit": ["commit", source, out],
        "merge": ["merge", source, "-o", out],
        "zfile": ["zfile", "compress", source, out],
        "import": ["import", source, out],
    }[command]
    assert run(*arguments) == 1
    assert "exists already" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert run(*arguments, "--force") == 0
    assert out.read_bytes() != b"mine"
    assert os.listdir(tmp_path) == ["out"]


def noisy_layer(directory: Path) -> Path:
    """A writable layer with 1 MiB of zeros, and as much of what does not compress, which begins in a block."""
    path = directory / "writable"
    with closing(SparseUpper.create(path, 64 << 20)) as layer:
        layer.write_at(0, bytes(1 << 20))
        layer.write_at((2 << 20) + 4096, os.urandom(1 << 20))
    return path


@pytest.mark.parametrize("algorithm", ["lz4", "zstd"])
@pytest.mark.parametrize("command", ["commit", "merge", "zfile", "import"])
def test_content_that_does_not_fit_into_64_kib_blocks_gets_smaller_ones(
    command: str, algorithm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = noisy_layer(tmp_path)

    def packed(kib: int) -> bytes:
        out = tmp_path / f"out{kib}"
        arguments: list[str | Path] = {
            "commit": ["commit", source, out],
            "merge": ["merge", source, "-o", out],
            "zfile": ["zfile", "compress", source, out],
            "import": ["import", source, out],
        }[command]
        assert run(*arguments, "--algorithm", algorithm, "--block-size-kib", str(kib)) == 0
        return out.read_bytes()

    small = packed(32)
    assert "does not compress" not in caplog.text
    assert packed(64) == small
    assert f"{tmp_path / 'out64'}: content does not compress in blocks of 64 KiB" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["out32", "out64", "writable"]


def test_a_stream_that_does_not_fit_into_64_kib_blocks_is_refused() -> None:
    done = obdlab_process("layer", "zfile", "compress", "--block-size-kib", "64", "-", "-", input=os.urandom(1 << 20))
    assert done.returncode == 1
    assert b"use a block size of at most 32768" in done.stderr


def test_a_failure_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged"
    content = bytearray((LSMT / "l1.lz4.lsmt").read_bytes())
    content[100_000] ^= 1
    damaged.write_bytes(content)
    assert run("commit", damaged, tmp_path / "out") == 1
    assert "CRC of ZFile block" in capsys.readouterr().err
    assert run("zfile", "extract", damaged, tmp_path / "out") == 1
    assert run("commit", LSMT / "l1.lz4.lsmt", tmp_path / "absent" / "out") == 1
    assert "absent/out: cannot be made" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["damaged"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    # A pipe that never ends: the file is half made for as long as we like.
    command = [
        sys.executable,
        "-m",
        "obdlab",
        "layer",
        "zfile",
        "compress",
        "/dev/stdin",
        str(tmp_path / "out"),
        "--workers",
        "3",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(os.urandom(32 << 20))
        process.stdin.flush()
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size > 1 << 20 for path in tmp_path.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        try:
            assert process.wait(30) == 130
        finally:
            process.kill()
        assert process.stderr.read() == b"obdlab layer zfile: interrupted\n"
    assert os.listdir(tmp_path) == []


def test_an_interrupted_import_ends_qemu_img_and_leaves_nothing(tmp_path: Path) -> None:
    tool, image, out = tmp_path / "bin" / "qemu-img", tmp_path / "image", tmp_path / "out"
    tool.parent.mkdir()
    out.mkdir()
    pid = tmp_path / "pid"
    script = [
        "#!/bin/sh",
        "[ $1 = check ] && exit 1",
        f"echo $$ > {pid}.new; mv {pid}.new {pid}",
        "exec /bin/sleep 100",
    ]
    tool.write_text("\n".join([*script, ""]))
    tool.chmod(0o755)
    image.write_bytes(b"QFI\xfb" + (2).to_bytes(4, "big") + bytes(100))
    command = [sys.executable, "-m", "obdlab", "layer", "import", str(image), str(out / "layer")]
    environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(os.listdir(out)) == 1
        process.terminate()
        try:
            assert process.wait(30) == 130
        finally:
            process.kill()
    assert os.listdir(out) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_index_follows_the_data_in_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for number, spelled in enumerate(([], ["--index"])):  # the option is older
        data, index = tmp_path / f"data{number}", tmp_path / f"index{number}"
        given = [*spelled, index]
        assert run("create", data, index, "--vsize", "1M", "-q") == 0
        assert run("resize", data, *given, "--vsize", "2M", "-q") == 0
        assert run("gc", data, *given, "-q") == 0
        outputs.append(tmp_path / f"out{number}")
        assert run("commit", data, *given, outputs[-1], "-q") == 0
        assert run("seal", data, *given, "-q") == 0
    assert len({output.read_bytes()[512:] for output in outputs}) == 1
    assert run("gc", tmp_path / "a", "b", "--index", "c") == 1
    assert "two index files (got b and --index c" in capsys.readouterr().err


def test_the_default_is_zstd_in_blocks_of_16_kib_everywhere(tmp_path: Path) -> None:
    from obdlab.convert.layer import LayerOptions
    from obdlab.lab.kinds import KINDS
    from obdlab.layerfiles.description import describe
    from obdlab.layerfiles.writing import Packing

    source = LSMT / "l1.lz4.lsmt"
    assert run("commit", source, tmp_path / "layer", "-q") == 0
    assert run("zfile", "compress", source, tmp_path / "file", "-q") == 0
    found = [describe(tmp_path / name).zfile for name in ("layer", "file")]
    chosen = {(facts.algorithm, facts.block_size) for facts in found if facts is not None}
    options = KINDS["start"].options
    chosen |= {(packing.algorithm, packing.block_size) for packing in (Packing(), LayerOptions())}
    assert chosen | {(options["algorithm"], options["block_size"])} == {("zstd", 16384)}


def test_help_of_every_tool(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("create", "commit", "seal", "merge", "zfile", "verify", "diff", "import", "resize"):
        with pytest.raises(SystemExit) as done:
            run(command, "--help")
        assert done.value.code == 0
        assert len(capsys.readouterr().out) > 300


def test_the_module_reads_standard_input_as_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\x00" * 5000)))
    assert run("zfile", "compress", "-", tmp_path / "out", "-q") == 0
    with obdlab.open_zfile(tmp_path / "out") as content:
        assert content.read_at(0, 10_000) == b"\xff\x00" * 5000
