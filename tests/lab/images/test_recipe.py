from __future__ import annotations

import filecmp
import os
import re
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import ObdlabError
from obdlab.lab.images.recipe import Recipe, RecipeError, find_recipe, image_label, list_recipes
from obdlab.lab.workbench import folder
from tests.lab.conftest import DATASETS

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
name = "thing"
description = "a thing"
base = "debian"
[[layer]]
comment = "one"
packages = ["libc6", "gcc-14-base"]
files = [{ path = "/etc/thing", content = "text", mode = "0640" }, { path = "/bin/start", source = "start" }]
run = ["true"]
[config]
command = ["/bin/start"]
environment = { B = "2", A = "1" }
user = "nobody"
ports = ["80/tcp"]
[probe]
ready_line = "READY"
timeout_s = 5
"""


def load(directory: Path, text: str) -> Recipe:
    (directory / "start").write_text("#!/bin/sh\n")
    path = directory / "recipe.toml"
    path.write_text(text)
    return Recipe.load(path)


def test_a_recipe_is_read_whole(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.name == "thing"
    (layer,) = recipe.layers
    assert layer.packages == ("libc6", "gcc-14-base")
    assert [(file.path, file.content, file.mode) for file in layer.files] == [
        ("/etc/thing", b"text", 0o640),
        ("/bin/start", b"#!/bin/sh\n", 0o644),
    ]
    assert recipe.config.environment == (("A", "1"), ("B", "2"))
    assert recipe.probe.timeout_s == 5.0


def test_the_datasets_have_layers_over_their_base() -> None:
    # Those that experiments measure have five or more, as a usual image; the others were added for their traces, and
    # are measured in the standard set alone. The experiment with these traces times nothing.
    recipes = {recipe.name: recipe for recipe in list_recipes([DATASETS])}
    files = folder("experiments").glob("*.toml")
    declared = {file.stem: images_of(tomllib.loads(file.read_text())) for file in files}
    standard = declared.pop("standard")
    assert declared.pop("suggestion") <= standard
    assert standard == set(recipes) - {"tiny"}
    measured = {name for names in declared.values() for name in names} & set(recipes)
    assert {"redis", "pydata", "postgres", "weights"} <= measured
    for recipe in recipes.values():
        assert len(recipe.layers) >= (5 if recipe.name in measured else 3), recipe.name


def images_of(declared: dict[str, Any]) -> set[str]:
    names = [*declared.get("images", ()), *declared.get("axes", {}).get("image", ())]
    return {name.partition("?")[0] for name in names}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "thing"', 'name = "Thing!"', "name: wanted text like"),
        ('name = "thing"', "", "name: missing"),
        ('base = "debian"', 'base = "arch"', "base: unknown"),
        ('base = "debian"', 'base = "busybox"', "no package manager"),
        ('base = "debian"', 'image = "host/name:tag"', "no base and no layers"),
        ('comment = "one"', 'coment = "one"', "unknown key (got 'coment')"),
        ('"gcc-14-base"', '"gcc 14; rm -rf /"', "packages: wanted texts like"),
        ('"gcc-14-base"', '"--allow-unauthenticated"', "packages: wanted texts like"),
        ('"gcc-14-base"', "7", "wanted a list of strings"),
        ('"/etc/thing"', '"etc/thing"', "absolute path"),
        ('"/etc/thing"', '"/etc/../thing"', "absolute path"),
        ('source = "start"', 'source = "../start"', "beside the recipe"),
        ('source = "start"', 'source = "/etc/passwd"', "beside the recipe"),
        ('source = "start"', 'source = "missing"', "No such file"),
        ('"0640"', '"0999"', "mode: wanted text like"),
        ('"80/tcp"', '"http"', "ports: wanted texts like"),
        ('ready_line = "READY"', 'ready_line = "  "', "not blank"),
        ("timeout_s = 5", "timeout_s = 0", "positive"),
        ("timeout_s = 5", "timeout_s = true", "wanted a number"),
        ("timeout_s = 5", "timeout_s = nan", "finite"),
        ("[config]", "[config", "recipe.toml: "),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_empty_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="empty layer"):
        load(tmp_path, GOOD.replace("[config]", '[[layer]]\ncomment = "nothing"\n[config]'))


def test_a_source_that_leads_out_through_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    inside = tmp_path / "recipes"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(RecipeError, match="beside the recipe"):
        load(inside, GOOD.replace('source = "start"', 'source = "link"'))


def test_the_fingerprint_follows_the_image_and_not_the_probe(tmp_path: Path) -> None:
    first = load(tmp_path, GOOD).fingerprint()
    assert load(tmp_path, GOOD.replace("READY", "DONE")).fingerprint() == first
    assert load(tmp_path, GOOD.replace('"text"', '"other"')).fingerprint() != first
    assert load(tmp_path, GOOD.replace('A = "1"', 'A = "3"')).fingerprint() != first


def test_a_registry_image_needs_only_a_probe(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, 'name = "x"\nimage = "host.example/x:1"\n[probe]\nready_line = "up"\ncommand = ["serve"]\n'
    )
    assert (recipe.image, recipe.probe.command) == ("host.example/x:1", ("serve",))


def test_arguments_stand_in_the_whole_recipe(tmp_path: Path) -> None:
    more = "[size_mb_each]\nsize = 0.5\n[arguments]\nsize = 40\nshare = 7\n"
    text = GOOD.replace('"true"', '"make @size@ @other@"').replace('A = "1"', 'A = "@share@"')
    text = f"size_mb = 3\n{text}{more}"
    recipe = load(tmp_path, text)
    assert recipe.layers[0].run == ("make 40 @other@",)
    assert recipe.config.environment[0] == ("A", "7")
    assert recipe.size_mb == 23
    path = tmp_path / "recipe.toml"
    other = find_recipe(f"{path}?size=2&share=9", [])
    assert (other.layers[0].run, other.config.environment[0]) == (("make 2 @other@",), ("A", "9"))
    assert other.size_mb == 4
    assert len({recipe.fingerprint(), other.fingerprint(), find_recipe(f"{path}?share=9", []).fingerprint()}) == 3
    assert find_recipe(f"{path}?size=40", []).fingerprint() == recipe.fingerprint()
    assert image_label(f"{path}?size=2") == "thing?size=2"
    assert image_label("weights?mib=2") == "weights?mib=2"
    for wrong, message in (
        ("sise=2", "unknown (got sise, wanted among size, share)"),
        ("size=x", "wanted name?key=number (got 'size=x')"),
        ("size=-1", "wanted name?key=number"),
        ("size", "wanted name?key=number"),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            find_recipe(f"{path}?{wrong}", [])
    with pytest.raises(RecipeError, match="whole numbers"):
        load(tmp_path, text.replace("share = 7", 'share = "7"'))


def test_the_weights_are_the_same_in_each_build_and_are_checked(tmp_path: Path) -> None:
    def run(name: str, *words: object) -> str:
        command = [sys.executable, DATASETS / "weights" / name, *map(str, words)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
            assert child.stdout is not None
            told = ""
            for line in child.stdout:
                told += line
                if line == "READY\n":
                    child.terminate()
        return told

    first, second = tmp_path / "first", tmp_path / "second"
    run("make_weights.py", first, 24)
    run("make_weights.py", second, 24)
    assert filecmp.cmp(first, second, shallow=False)
    assert first.stat().st_size > 24 << 20
    assert run("serve.py", first, 100) == "24 MiB of 24 MiB read\nREADY\n"
    assert run("serve.py", first, 50) == "12 MiB of 24 MiB read\nREADY\n"
    with first.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")  # no weight's high byte
    assert "damaged weights" in run("serve.py", first, 100)


def test_a_recipe_is_found_by_name_or_path(tmp_path: Path) -> None:
    assert find_recipe("tiny", [tmp_path, DATASETS]) == find_recipe(str(DATASETS / "tiny/recipe.toml"), [])
    with pytest.raises(RecipeError, match="no recipe named 'nothing'"):
        find_recipe("nothing", [DATASETS])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_text_gives_a_recipe_or_a_recipe_error(data: st.DataObject) -> None:
    text = bytearray(GOOD.replace(', { path = "/bin/start", source = "start" }', "").encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=4))
    path = DATASETS / "recipe.toml"
    try:
        values = tomllib.loads(text.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        return
    try:
        Recipe.from_values(values, path).fingerprint()
    except ObdlabError as error:
        assert str(path) in str(error)


_TOML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(["name", "base", "suite", "image", "layer", "config", "probe", "other"]), value=_TOML)
def test_any_value_of_any_key_gives_a_recipe_or_a_recipe_error(key: str, value: object) -> None:
    values = tomllib.loads(GOOD.replace(', { path = "/bin/start", source = "start" }', ""))
    values[key] = value
    try:
        Recipe.from_values(values, DATASETS / "recipe.toml").fingerprint()
    except RecipeError:
        pass


def test_an_image_is_called_by_its_recipes_name(tmp_path: Path) -> None:
    assert image_label("redis") == "redis"
    assert image_label(str(DATASETS / "tiny" / "recipe.toml")) == "tiny"
    assert image_label(str(tmp_path / "gone" / "recipe.toml")) == "gone"
