from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from obdlab.lab.images.builder import build_image, list_images, update_lock
from obdlab.lab.images.lock import (
    LOCK_NAME,
    check_lock,
    compare_lock,
    holds,
    installed_packages,
    read_lock,
    write_lock,
)
from obdlab.lab.images.recipe import Recipe, RecipeError, RecipeFile, RecipeLayer, list_recipes
from obdlab.lab.testbed.process import LabError
from tests.lab.conftest import DATASETS

if TYPE_CHECKING:
    from pathlib import Path

STATUS = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.41-12
Description: text
 with a line: that looks like a field

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1

Package: mawk
Status: hold ok installed
Architecture: amd64
Version: 1:1.3
"""


def test_what_dpkg_holds_installed_is_locked(tmp_path: Path) -> None:
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(STATUS)
    packages = installed_packages([tmp_path / "no", tmp_path])
    assert packages == ("libc6:amd64=2.41-12", "mawk:amd64=1:1.3")
    write_lock(tmp_path / "lock", packages)
    assert read_lock(tmp_path / "lock") == packages
    check_lock("x", packages, packages)
    assert compare_lock(packages, packages) == "2 packages, as in packages.lock"


def test_how_an_image_differs_from_its_lock_is_one_line() -> None:
    locked, installed = ["a:all=1", "b:all=1"], ["a:all=2", "c:all=1"]
    told = compare_lock(locked, installed)
    changes = "a:all 2 (locked 1), b:all absent (locked 1), c:all 1 (locked absent)"
    assert told == f"2 packages, 3 differ from packages.lock: {changes}"
    assert compare_lock([f"{name}:all=1" for name in "abcde"], []).endswith("c:all absent (locked 1) and 2 more")
    assert compare_lock([], installed) == "2 packages, no packages.lock"
    assert compare_lock([], []) == ""
    assert holds(["a:all=1", "b:all=1"], ["a:all=1"])
    assert holds([], [])
    assert not holds(locked, ["a:all=2"])
    with pytest.raises(
        LabError, match=r"x: --locked: 2 packages, 3 differ.*obdlab lab dataset build x --update-lock"
    ):
        check_lock("x", locked, installed)


# A static busybox whose status file says what dpkg would: an image with packages, without an archive.
def _with_packages(recipe: Recipe, version: str, locked: tuple[str, ...]) -> Recipe:
    status = f"Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: {version}\n"
    file = RecipeFile("/var/lib/dpkg/status", status.encode(), 0o644)
    return replace(recipe, layers=(RecipeLayer("", (), (file,), ()),), locked=locked)


@pytest.mark.kernel
def test_a_lock_is_a_record_unless_the_build_is_strict(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = _with_packages(tiny_recipe, "2.41-12", ("libc6:amd64=2.41-11",))
    lines: list[str] = []
    image = build_image(recipe, tmp_path, lines.append)
    difference = "1 packages, 1 differs from packages.lock: libc6:amd64 2.41-12 (locked 2.41-11)"
    assert lines[-1] == f"tiny: {image.digest[:19]}, {difference}"
    assert image.facts()["lock"] == difference
    assert image.facts()["packages"] == ["libc6:amd64=2.41-12"]
    with pytest.raises(LabError, match=r"--locked: 1 packages, 1 differs"):
        build_image(recipe, tmp_path, locked=True)
    assert list_images(recipe, tmp_path) == [image]
    # A lock that is right again needs no other image.
    right = replace(recipe, locked=("libc6:amd64=2.41-12",))
    assert build_image(right, tmp_path, locked=True).layout == image.layout
    layer = RecipeLayer("", ("mawk",), (), ())
    with pytest.raises(LabError, match=r"the recipe has no packages\.lock"):
        build_image(replace(tiny_recipe, base="debian", layers=(layer,)), tmp_path, locked=True)


@pytest.mark.kernel
def test_of_several_images_the_pinned_one_is_taken_or_the_last(tiny_recipe: Recipe, tmp_path: Path) -> None:
    stamp = RecipeLayer("", (), (), ("cat /proc/uptime > /srv/uptime",))
    recipe = replace(tiny_recipe, layers=(stamp,))
    first = build_image(recipe, tmp_path)
    second = build_image(recipe, tmp_path, newest=True)
    assert first.digest != second.digest
    assert build_image(recipe, tmp_path) == second
    assert build_image(recipe, tmp_path, pin=first.digest) == first
    shutil.rmtree(first.layout)
    assert build_image(recipe, tmp_path, pin=first.digest) == second


@pytest.mark.kernel
def test_a_strict_build_keeps_a_base_with_locked_packages_only(tiny_recipe: Recipe, tmp_path: Path) -> None:
    def has_made_base(number: int) -> bool:
        lines: list[str] = []
        layer = RecipeLayer(f"layer {number}", (), (), ())  # another recipe each time, with the same base
        recipe = replace(_with_packages(tiny_recipe, "2.41-12", ("libc6:amd64=2.41-12",)))
        build_image(replace(recipe, layers=(*recipe.layers, layer)), tmp_path, lines.append, locked=True)
        return any("making the base" in line for line in lines)

    assert has_made_base(0)
    assert not has_made_base(1)
    (base,) = tmp_path.glob("base-*")
    status = base / "fs/var/lib/dpkg/status"
    status.parent.mkdir(parents=True, exist_ok=True)
    status.write_text(STATUS.replace("Package: mawk", "Package: libc6"))
    assert has_made_base(2)
    assert not has_made_base(3)


@pytest.mark.kernel
def test_updating_a_lock_writes_what_was_installed(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = _with_packages(tiny_recipe, "2.41-12", ("libc6:amd64=2.41-11",))
    image = update_lock(recipe, tmp_path / LOCK_NAME, tmp_path / "work", lambda line: None)
    assert read_lock(tmp_path / LOCK_NAME) == image.packages == ("libc6:amd64=2.41-12",)
    assert image.facts()["lock"] == "1 packages, as in packages.lock"


def test_a_damaged_lock_is_told(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text((DATASETS / "redis/recipe.toml").read_text())
    for name in ("redis.conf", "start-redis"):
        (tmp_path / name).write_text("")
    (tmp_path / "packages.lock").write_text("libc6\n")
    with pytest.raises(RecipeError, match=r"packages\.lock: wanted lines like"):
        Recipe.load(tmp_path / "recipe.toml")


def test_datasets_that_are_pinned_hold_the_base() -> None:
    pinned = [recipe for recipe in list_recipes([DATASETS]) if recipe.locked]
    assert pinned
    for recipe in pinned:
        assert any(line.startswith("libc6:") for line in recipe.locked), recipe.name
