"""--json of each command: standard output is JSON and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from obdlab.cli.groups import GROUPS, SINGLE
from obdlab.cli.main import build_parser
from tests import capabilities
from tests.e2e import stage
from tests.snapshotter import imagefiles

#: Commands whose standard output is no answer of their own.
WITHOUT = {
    "image cat": "prints a file's content",
    "image cp": "writes files",
    "image pull-blob": "prints a blob's content",
    "device tcmu-detach": "prints nothing",
    "completion": "prints a shell's script",
    **{f"serve {name}": "runs until SIGTERM" for group in GROUPS if group.name == "serve" for name in group.names()},
}
#: Commands that need a virtual machine's kernel, or an ordinary image in containerd
#: (tests/snapshotter/test_turbo_stored.py).
ELSEWHERE = {"device tcmu-attach", "image turbo"}
#: Commands with verbs of their own, which have the option.
PARTS = {
    "layer zfile": ("compress", "extract", "verify"),
    "layer gzip-index": ("make", "inspect", "verify"),
    "lab dataset": ("build", "push", "list"),
    "config": ("check",),
}

_TIMEOUT_S = 1500
_IMAGE = "registry.example/app:1-obd"
_EMPTY = "echo 'docker.example/library/nginx:1.27' >list"
_OF_DISK = """echo '{"upper": {"data": "'$PWD'/data3", "index": "'$PWD'/index3"}}' >config.v1.json"""
#: A command and what may be its status; lines that begin with "$" prepare the next one.
RUNS = f"""
doctor :: 0 1
image convert registry.example/app:1 127.0.0.1:5000/json:obd
image convert -q --fs erofs registry.example/app:1 oci:erofs:1
$ {_EMPTY}
$ mkdir context && printf '%s\\n' 'FROM {_IMAGE}' 'COPY Dockerfile /' >context/Dockerfile
image build context -t registry.example/json/built:1
image convert-list list --to 127.0.0.1:5000/{{name}}:list
image compare registry.example/app:1 {_IMAGE}
image protect registry.example/redis:7-obd registry.example/redis:7-trees
image compare registry.example/app:1 oci:erofs:1
image verify {_IMAGE}
image inspect {_IMAGE}
image ls {_IMAGE}:/data
layer create data index --vsize 16M
layer resize data index --vsize 32M
$ tar cf layer.tar script && obdlab layer create data5 index5 --vsize 64M
$ echo '{{"upper": {{"data": "'$PWD'/data5", "index": "'$PWD'/index5"}}}}' >config5.json
layer apply layer.tar config5.json --mkfs
layer gc data index
layer commit data index one.obd
layer seal data index
$ obdlab image pull-blob {_IMAGE} 0 -o 0.obd && obdlab image pull-blob {_IMAGE} 1 -o 1.obd
layer merge 0.obd 1.obd -o merged.obd
layer inspect merged.obd
layer inspect --verify merged.obd
layer diff --old 0.obd --new merged.obd :: 3
layer zfile compress script content.zfile
layer zfile extract content.zfile again
layer zfile verify content.zfile
$ gzip -k content.zfile
layer gzip-index make content.zfile.gz gzip.meta
layer gzip-index inspect gzip.meta
layer gzip-index verify content.zfile.gz gzip.meta
$ head -c 1048576 /dev/urandom >raw
layer import raw raw.obd
device attach --id disk merged.obd
device list
device graduate disk
device detach disk
device mount merged.obd mounted
device umount mounted
$ obdlab layer create data3 index3 --vsize 64M && {_OF_DISK} && obdlab device attach config.v1.json --id written
device snapshot written --data data4 --index index4
device upgrade
trace record {_IMAGE} -o trace
trace record {_IMAGE} -o other --events events
trace show trace
trace merge trace other -o merged
trace diff trace other :: 0 1
trace filter trace -o filtered --unique
trace files trace {_IMAGE}
trace learn --example {_IMAGE} trace -o profile
trace suggest {_IMAGE} -o suggested --profile profile
trace transplant trace {_IMAGE} oci:erofs:1 -o moved
trace timeline events {_IMAGE}
trace import events {_IMAGE} -o imported
trace watch {_IMAGE} -o watched
$ obdlab device attach --id read --served merged.obd
trace start read
$ dd if=$(obdlab device list | grep -o '/dev/loop[0-9]*' | head -1) iflag=direct bs=1M count=8 of=read 2>/dev/null
trace stop read -o stopped
image publish {_IMAGE} 127.0.0.1:5000/json:hot --trace trace
image publish 127.0.0.1:5000/json:obd --as referrer --trace trace
image unpublish 127.0.0.1:5000/json:obd
$ use_snapshotter
image pull {_IMAGE}
fsck /var/lib/obdlab/snapshotter
cache list
cache gc
cache verify
cache clear
$ echo '{{}}' >settings.json
config check settings.json
install-tools tools
cleanup --force :: 1
"""
LAB = """
lab dataset list
lab dataset build tiny
lab dataset push tiny 127.0.0.1:5000/tiny:1
lab evaluate --list
$ small_experiments
lab status experiments/quick.toml :: 1
lab run experiments/quick.toml
lab resume quick
lab plan experiments/declared.toml --pilot experiments/measured/peers
lab show quick
lab list
lab export quick rows.csv
lab export experiments/quick.toml --to snakemake -o Snakefile
lab bundle quick -o bundle.tar.gz
lab unbundle bundle.tar.gz unbundled
$ mkdir -p results/evaluation-quick
lab report
"""


def runs(text: str = RUNS + LAB) -> list[tuple[str, set[int]]]:
    found = []
    for line in filter(None, text.splitlines()):
        command, _, statuses = line.partition(" :: ")
        found.append((command, {int(status) for status in statuses.split()} or {0}))
    return found


def test_every_command_is_here() -> None:
    named = [f"{group.name} {name}" for group in GROUPS for name in group.names()]
    named += [command.name for command in SINGLE]
    for name in named:
        for part in PARTS.get(name, ("",)):
            words = [*name.split(), *([part] if part else [])]
            has = "--json" in _help_of(words)
            assert has is (name not in WITHOUT), name
            if has and name not in ELSEWHERE:
                assert any(command.startswith(" ".join(words)) for command, _ in runs()), words


def _help_of(words: list[str]) -> str:
    parser = build_parser(words)
    for word in words:
        (group,) = (action for action in parser._actions if action.choices and word in action.choices)
        parser = group.choices[word]  # type: ignore[index]
    return parser.format_help()


@pytest.mark.containerd
@pytest.mark.registry
@pytest.mark.timeout(_TIMEOUT_S + 60)
@pytest.mark.parametrize("text", [RUNS, pytest.param(LAB, marks=pytest.mark.slow)], ids=["host", "lab"])
def test_standard_output_is_json(text: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    storage = stage.fill_storage(tmp_path_factory.mktemp("storage"))
    script = ["cp $STAGE/script ."]
    for number, (command, _) in enumerate(runs(text)):
        if command.startswith("$ "):
            script.append(command[2:])
        else:
            script.append(f"echo '##AT {number}'; obdlab {command} --json >$STAGE/{number}.json; echo \"##ENDED $?\"")
    _, output = stage.run(tmp_path, storage, "\n".join(script), _TIMEOUT_S)
    wrong = []
    ended = dict(stage.parts(output))
    for number, (command, statuses) in enumerate(runs(text)):
        if command.startswith("$ "):
            continue
        said, _, status = ended.get(number, "").partition("##ENDED ")
        if status.split()[:1] not in [[str(each)] for each in statuses]:
            wrong.append(f"obdlab {command}: status {status[:200]}\n{said[-500:]}")
            continue
        try:
            values = _values((tmp_path / f"{number}.json").read_text())
        except ValueError as error:
            wrong.append(f"obdlab {command}: {error}")
        else:
            assert all(isinstance(value, dict | list) for value in values), command
    assert not wrong, "\n".join(wrong)


def _values(text: str) -> list[object]:
    # One value, or one a line.
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]
