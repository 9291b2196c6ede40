"""``obdlab lab dataset``: build the images of the datasets, list their recipes, push them to a registry."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_registry_options, registry_from
from obdlab.cli.jsonoutput import add_json_option, answer, print_json
from obdlab.cli.packing import mb_text

if TYPE_CHECKING:
    import argparse

    from obdlab.lab.images.recipe import Recipe

_LAYOUT_PREFIX = "oci:"


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = "Builds real multi-layer images from Debian packages, by the recipes under datasets/."
    parser.set_defaults(bounded=False)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    build = verbs.add_parser("build", help="build a recipe's image (needs root)")
    build.add_argument("recipe", metavar="RECIPE", help="name of a dataset, or a path of a TOML file")
    build.add_argument(
        "--to",
        metavar="oci:DIR|REF",
        help="also write it to an OCI layout directory, or push it to a registry",
    )
    ways = build.add_mutually_exclusive_group()
    ways.add_argument(
        "--newest",
        action="store_true",
        help="build again from the archive's present packages, even if built",
    )
    ways.add_argument(
        "--update-lock", action="store_true", help="--newest, and write its package versions to packages.lock"
    )
    _add_locked(ways)
    push = verbs.add_parser("push", help="build a recipe's image and push it to a registry (needs root)")
    push.add_argument("recipe", metavar="RECIPE", help="name of a dataset, or a path of a TOML file")
    push.add_argument("to", metavar="REF", help="e.g. registry.example/redis:v1")
    _add_locked(push)
    listing = verbs.add_parser("list", help="list the recipes and their built images")
    add_json_option(listing, "one JSON object a line")
    for verb in (build, push):
        add_json_option(verb)
    for verb in (build, push, listing):
        verb.add_argument(
            "--datasets", type=Path, action="append", metavar="DIR", help="where recipes are (default: datasets)"
        )
        verb.add_argument("--work-dir", type=Path, metavar="DIR", help="where built images and caches are kept")
    add_registry_options(build)
    add_registry_options(push)
    build.set_defaults(run=_build)
    push.set_defaults(run=_build, update_lock=False, newest=False)
    listing.set_defaults(run=_list)


def _add_locked(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--locked", action="store_true", help="fail unless every package is of the version in packages.lock"
    )


def _build(args: argparse.Namespace) -> int:
    from obdlab.lab.images.builder import DEFAULT_WORK_DIR, build_image, update_lock
    from obdlab.lab.images.lock import LOCK_NAME
    from obdlab.lab.images.ocilayout import copy_layout, push_layout
    from obdlab.lab.images.recipe import RecipeError, find_recipe, recipe_path
    from obdlab.registry.reference import Reference

    target = args.to or ""
    reference = Reference.parse(target) if target and not target.startswith(_LAYOUT_PREFIX) else None
    directories = _directories(args)
    name = args.recipe.partition("?")[0]
    if not name.endswith(".toml") and not any((place / name).is_dir() for place in directories):
        raise RecipeError(f"no recipe named {args.recipe!r} in {_places(directories)}")
    work_dir = args.work_dir or DEFAULT_WORK_DIR
    with closing(registry_from(args)) as client:
        if args.update_lock:
            path = recipe_path(args.recipe, directories)
            recipe = find_recipe(args.recipe, directories)
            layout = update_lock(recipe, path.with_name(LOCK_NAME), work_dir, _say).layout
        else:
            recipe = find_recipe(args.recipe, directories)
            ways = {"locked": args.locked, "newest": args.newest}
            layout = build_image(recipe, work_dir, _say, client, **ways).layout
        digest = push_layout(layout, client, reference) if reference is not None else ""
    if digest:
        answer(args, {"image": str(reference), "digest": digest}, f"{reference} {digest}")
        return 0
    if target:
        copy_layout(layout, Path(target.removeprefix(_LAYOUT_PREFIX)))
    image = target or f"{_LAYOUT_PREFIX}{layout}"
    answer(args, {"image": image}, image)
    return 0


def _list(args: argparse.Namespace) -> int:
    from obdlab.lab.images.builder import DEFAULT_WORK_DIR
    from obdlab.lab.images.recipe import RecipeError, list_recipes

    directories = _directories(args)
    recipes = list_recipes(directories)
    if not recipes:
        raise RecipeError(f"no recipes in {_places(directories)}")
    for recipe in recipes:
        if args.json:
            state = _state(recipe, args.work_dir or DEFAULT_WORK_DIR)
            print_json({"name": recipe.name, "state": state, "description": recipe.description})
            continue
        print(f"{recipe.name:10} {_state(recipe, args.work_dir or DEFAULT_WORK_DIR):32} {recipe.description}")
    return 0


def _state(recipe: Recipe, work_dir: Path) -> str:
    from obdlab.lab.images.builder import find_image
    from obdlab.lab.images.ocilayout import OciLayout

    if recipe.image:
        return f"at {recipe.image}"
    image = find_image(recipe, work_dir)
    if image is None:
        return f"{len(recipe.layers) + 1} layers, not built"
    layers = OciLayout(image.layout).manifest.layers
    return f"{len(layers)} layers, built, {mb_text(sum(layer.size for layer in layers))}"


def _directories(args: argparse.Namespace) -> list[Path]:
    from obdlab.lab.workbench import dataset_folders

    return list(args.datasets or dataset_folders())


def _places(directories: list[Path]) -> str:
    return f"{' or '.join(map(str, directories))} (--datasets DIR names another place)"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
