"""Live snapshots of an image: the configuration and the layers change as one, also when the process is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.errors import ObdlabError, SourceError
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.image.open import WritableImage, open_image
from obdlab.layerfiles import snapshot as module
from obdlab.layerfiles.snapshot import SnapshotError, make_next, snapshot
from obdlab.layers import layerfile
from obdlab.settings.settings import Settings
from tests.layers.test_kills import DISK, kills, prepared
from tests.layers.uppers import KINDS, Files

LATE = b"late" * 1024


def configs(folder: Path, kind: str) -> tuple[Path, Path]:
    """The configuration of what "prepared" makes, and the one for going on in "new"."""
    old, new = (Files.named(folder, kind, name) for name in ("old", "new"))
    paths = folder / "config.v1.json", folder / "next.json"
    ImageConfig(upper=UpperConfig(data=str(old.data), index=str(old.index))).save(paths[0])
    upper = UpperConfig(data=str(new.data), index=str(new.index))
    ImageConfig(lowers=(LowerConfig(file=str(old.data)),), upper=upper).save(paths[1])
    return paths


def opened(config: Path) -> WritableImage:
    image = open_image(ImageConfig.load(config), Settings())
    assert isinstance(image, WritableImage)
    return image


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_step(tmp_path: Path, kind: str) -> None:
    model = prepared(tmp_path / "base", kind)
    Files.named(tmp_path / "base", kind, "new").create(0).close()

    def body(folder: Path) -> None:
        module.sync_directory = layerfile.sync_directory  # a place to be killed at
        config, following = configs(folder, kind)
        image = opened(config)
        image.write_at(0, LATE)
        image.flush()
        (folder / "flushed").touch()
        snapshot(image, config, following)
        (folder / "taken").touch()
        image.write_at(8192, LATE)
        image.flush()
        (folder / "written").touch()

    marked_and_switched = 0
    for folder, done in kills(tmp_path / "base", tmp_path / "work", body):
        config = folder / "config.v1.json"
        if not config.exists():  # killed before there was anything
            continue
        wanted = bytearray(model)
        switched = len(ImageConfig.load(config).lowers) == 1
        marked_and_switched += switched and (folder / "old.data.restacking").exists()
        assert switched or not (folder / "taken").exists()
        for _ in range(2):
            with opened(config) as image:
                content = bytearray(image.read_at(0, DISK))
                for at, promised in ((0, "flushed"), (8192, "written")):
                    if (folder / promised).exists():
                        wanted[at : at + 4096] = LATE
                    elif content[at : at + 4096] == LATE:
                        content[at : at + 4096] = wanted[at : at + 4096]
                assert content == wanted
                image.write_at(16384, LATE)
                image.flush()
                wanted[16384 : 16384 + 4096] = LATE
            assert not (folder / "old.data.restacking").exists()
        assert not done or (folder / "written").exists()
    assert marked_and_switched >= 2


def test_a_switch_that_cannot_be_made_lasting_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "base"
    model = prepared(folder, "append")
    Files.named(folder, "append", "new").create(0).close()
    config, following = configs(folder, "append")
    before = config.read_bytes()

    def refuse(path: str) -> None:
        raise SourceError("flushing the directory failed", blob=path)

    with opened(config) as image:
        with monkeypatch.context() as patch:
            patch.setattr(module, "sync_directory", refuse)
            with pytest.raises(SourceError, match="flushing the directory"):
                snapshot(image, config, following)
        assert config.read_bytes() == before
        assert following.exists()
        image.write_at(0, LATE)
        assert image.read_at(4096, DISK - 4096) == model[4096:]
        taken = snapshot(image, config, following)
        assert taken.sealed == str(folder / "old.data")
    assert not following.exists()
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.v1.json", "new.data", "new.index", "old.data", "old.index"]
    )


def test_configuration_keeps_mode_and_unknown_keys(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    prepared(folder, "append")
    Files.named(folder, "append", "new").create(0).close()
    config, following = configs(folder, "append")
    config.chmod(0o640)
    text = following.read_text().replace("{", '{"mine":1,', 1)
    following.write_text(text)
    link = tmp_path / "link.json"
    link.symlink_to(config)
    with opened(link) as image:
        snapshot(image, link, following)
    assert link.is_symlink()
    assert config.read_text() == text
    assert config.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kind", KINDS)
def test_make_next(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "base"
    model = prepared(folder, "append")
    config, following = configs(folder, "append")
    fresh = Files.named(tmp_path, kind, "fresh")
    made = make_next(config, fresh.data, fresh.index if kind == "append" else None)
    made.save(following)
    with opened(config) as image:
        snapshot(image, config, following)
        assert image.read_at(0, DISK) == model
    with pytest.raises(ObdlabError, match="File exists"):
        make_next(config, fresh.data, fresh.index if kind == "append" else None)
    ImageConfig(lowers=(LowerConfig(file="x"),)).save(following)
    with pytest.raises(SnapshotError, match="no writable layer"):
        make_next(following, tmp_path / "other", None)
