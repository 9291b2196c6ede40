from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.errors import SourceError
from obdlab.formats import oci
from obdlab.lab.images.basesystem import _deb_lines, is_static_elf
from obdlab.lab.images.builder import build_image, list_images
from obdlab.lab.images.ocilayout import OciLayout, copy_layout
from obdlab.lab.images.recipe import BUILDER_VERSION, Recipe, RecipeLayer, find_recipe
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.process import LabError
from obdlab.lab.testbed.registry import RegistryHost
from tests.lab.conftest import DATASETS


def members(layout: Path, number: int) -> dict[str, tarfile.TarInfo]:
    image = OciLayout(layout)
    with tarfile.open(image.blob_path(image.manifest.layers[number].digest)) as tar:
        return {entry.name: entry for entry in tar.getmembers()}


@pytest.mark.kernel
def test_a_built_image_is_a_whole_oci_layout(tiny_recipe: Recipe, tiny_layout: Path) -> None:
    image = OciLayout(tiny_layout)
    manifest = image.manifest
    assert len(manifest.layers) == len(tiny_recipe.layers) + 1
    for descriptor in (manifest.config, *manifest.layers):
        data = image.blob_path(descriptor.digest).read_bytes()
        assert (oci.digest_of(data), len(data)) == (descriptor.digest, descriptor.size)
    config = oci.Config.parse(image.blob_path(manifest.config.digest).read_bytes())
    assert config.document["config"]["Cmd"] == ["/srv/start"]
    assert config.document["config"]["User"] == "worker"
    assert len(config.diff_ids) == len(manifest.layers)


@pytest.mark.kernel
def test_layers_hold_what_their_step_changed(tiny_layout: Path) -> None:
    data = members(tiny_layout, 2)
    assert data["srv/data/one"].islnk()
    assert data["srv/two"].issym()
    deleted = members(tiny_layout, 3)
    assert {"srv/data/.wh.gone", "srv/old/.wh..wh..opq", "srv/old/new"} <= set(deleted)
    owned = members(tiny_layout, 4)
    assert (owned["srv/data/1"].uid, owned["srv/data/3"].mode) == (1000, 0o4755)
    assert not [name for name in (*data, *deleted, *owned) if name.startswith(("tmp/", "proc/", "dev/", "sys/"))]


@pytest.mark.kernel
def test_building_again_gives_the_same_image(tiny_recipe: Recipe, tiny_layout: Path, tmp_path: Path) -> None:
    again = build_image(tiny_recipe, tmp_path).layout
    assert again != tiny_layout
    assert OciLayout(again).manifest_data == OciLayout(tiny_layout).manifest_data


@pytest.mark.kernel
def test_a_built_image_is_not_built_again(tiny_recipe: Recipe, tiny_layout: Path) -> None:
    lines: list[str] = []
    image = build_image(tiny_recipe, tiny_layout.parent, lines.append)
    assert image.layout == tiny_layout
    assert image.digest == OciLayout(tiny_layout).digest
    assert lines == [f"tiny: built before: {image.digest[:19]} ({tiny_layout})"]


def with_step(recipe: Recipe, command: str) -> Recipe:
    return replace(recipe, layers=(*recipe.layers[:1], RecipeLayer("", (), (), (command,))))


@pytest.mark.kernel
def test_a_failing_step_is_told_and_leaves_nothing(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="the cause is here"):
        build_image(with_step(tiny_recipe, "echo the cause is here; exit 3"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"base-busybox-{BUILDER_VERSION}", "lock"]


@pytest.mark.kernel
def test_where_this_host_keeps_temporary_files_is_not_the_images_business(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TMPDIR", "TMP", "TEMP"):
        monkeypatch.setenv(name, str(tmp_path / "there"))
    command = 'case $(mktemp) in /tmp/*) ;; *) exit 1; esac; [ "$TMP$TEMP" = /tmp/tmp ]'
    build_image(with_step(tiny_recipe, command), tmp_path / "images")


@pytest.mark.kernel
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_build_leaves_no_process_and_no_mount(tmp_path: Path, number: signal.Signals) -> None:
    program = f"""
import sys; from pathlib import Path
from dataclasses import replace
from obdlab.lab.images.builder import build_image
from obdlab.lab.testbed.registry import RegistryHost
from obdlab.lab.images.recipe import RecipeLayer, find_recipe
recipe = find_recipe("tiny", [Path({str(DATASETS)!r})])
build_image(replace(recipe, layers=(RecipeLayer("", (), (), ("echo $$ > /tmp/obdlab/pid; exec sleep 3333",)),)),
            Path({str(tmp_path)!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    try:
        while not list(tmp_path.glob("building-*/stage/pid")) or not sleepers(tmp_path):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.send_signal(number)
        child.wait(30)
    while sleepers(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    # What a killed build leaves are directories; the next build removes them.
    build_image(find_recipe("tiny", [DATASETS]), tmp_path)
    assert not list(tmp_path.glob("building-*"))


def sleepers(work_dir: Path) -> list[str]:
    # The build's own command, by the root directory it runs in.
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        process = Path("/proc") / name
        try:
            if (process / "cmdline").read_bytes() == b"sleep\x003333\x00":
                found += [name] * (str(work_dir) in (process / "mountinfo").read_text())
        except OSError:
            continue
    return found


@pytest.mark.kernel
@pytest.mark.registry
def test_an_image_of_a_registry_is_fetched_whole(
    tiny_recipe: Recipe, tiny_layout: Path, tmp_path: Path, state_dir: Path
) -> None:
    with ExperimentNetwork(state_dir=state_dir) as network, RegistryHost(tmp_path / "registry", network) as registry:
        reference = registry.push_layout(tiny_layout, "lab/tiny")
        recipe = Recipe("named", "", tiny_recipe.probe, image=reference)
        fetched = OciLayout(build_image(recipe, tmp_path / "work").layout)
        assert fetched.manifest_data == OciLayout(tiny_layout).manifest_data
        for descriptor in (fetched.manifest.config, *fetched.manifest.layers):
            assert oci.digest_of(fetched.blob_path(descriptor.digest).read_bytes()) == descriptor.digest
        with pytest.raises(SourceError, match="404"):
            build_image(replace(recipe, image=registry.reference("lab/none")), tmp_path / "work")
    assert build_image(recipe, tmp_path / "work").layout == fetched.root
    assert not list((tmp_path / "work").glob("building-*"))


@pytest.mark.kernel
def test_a_layout_is_copied_over_a_layout_and_over_nothing_else(tiny_layout: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    for _ in range(2):
        copy_layout(tiny_layout, target)
        assert OciLayout(target).manifest_data == OciLayout(tiny_layout).manifest_data
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("precious")
    with pytest.raises(LabError, match="wanted a new or empty directory"):
        copy_layout(tiny_layout, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_sources_of_the_host_are_taken_over_for_the_suite_only() -> None:
    targets = [
        "Packages|http://a.example/debian/|trixie|main",
        "Packages|http://a.example/debian/|trixie|main",
        "Translations|http://a.example/debian/|trixie|main",
        "Packages|https://b.example/sec/|trixie-security|main",
        "Packages|http://a.example/debian/|bookworm|main",
        "Packages|file:/srv/own/|trixie|main",
        "nonsense",
    ]
    assert _deb_lines(targets, "trixie") == [
        "deb http://a.example/debian/ trixie main",
        "deb https://b.example/sec/ trixie-security main",
    ]
    assert _deb_lines(targets, "forky") == []
    assert _deb_lines(targets[3:], "trixie") == []


def test_static_programs_are_told_from_others(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"\x7fELF")
    (tmp_path / "text").write_text("#!/bin/sh\n" * 10)
    assert not is_static_elf(tmp_path / "short")
    assert not is_static_elf(tmp_path / "text")


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.parametrize("name", ["redis", "pydata"])
def test_a_debian_dataset_builds_the_same_twice(name: str, tmp_path: Path) -> None:
    recipe = find_recipe(name, [DATASETS])
    first = build_image(recipe, tmp_path)
    # The base is made again too.
    assert build_image(recipe, tmp_path, newest=True) == first
    assert [image.layout for image in list_images(recipe, tmp_path)] == [first.layout]
    assert len(OciLayout(first.layout).manifest.layers) >= 6
