from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from obdlab.lab.build import build_image
from obdlab.lab.lock import check_lock, installed_packages, read_lock, write_lock
from obdlab.lab.process import LabError
from obdlab.lab.recipe import Recipe, RecipeError, list_recipes
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


def test_what_the_archive_changed_is_named() -> None:
    with pytest.raises(LabError, match=r"got a:all 2 \(wanted 1\), b:all absent \(wanted 1\), c:all 1 \(wanted abs"):
        check_lock("x", ["a:all=1", "b:all=1"], ["a:all=2", "c:all=1"])


@pytest.mark.kernel
def test_an_image_that_is_not_what_was_pinned_is_not_built(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="libc6:amd64 absent"):
        build_image(replace(tiny_recipe, locked=("libc6:amd64=2.41",)), tmp_path)
    assert not list(tmp_path.glob("tiny-*"))


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
