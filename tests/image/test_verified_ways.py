"""Native layers with hash trees on the ways past the registry's own answer: a P2P proxy, and targets of redirects.

Every way may forge every byte. What another way has right is read from there; what none has right is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.errors import CorruptBlobError
from obdlab.formats.oci import digest_of
from obdlab.image.open import ImageOpenError
from obdlab.observe.counters import counted
from tests.cache.origin import wait_until
from tests.image import test_verified_images
from tests.image.test_verified_images import (
    SIZE,
    Place,
    Served,
    flipping,
    lower_of,
    missing,
    put,
    serving,
    some_reads,
)
from tests.image.trees import tree_of
from tests.registry import faulty
from tests.registry.faulty import Answer, Fault, FaultyRegistry, faulty_registry
from tests.registry.proxy import Proxy, running_proxy

FORMS = ("prefix", "HTTP proxy")
place = test_verified_images.place


@contextmanager
def proxied(place: Place, directory: Path, form: str) -> Iterator[tuple[Served, Proxy]]:
    with serving(place, directory, mirrored=False) as served, running_proxy() as proxy:
        address = proxy.address if form == "prefix" else f"http-proxy://127.0.0.1:{proxy.port}"
        served.settings = replace(served.settings, p2p_address=address, verify="require")
        yield served, proxy


@contextmanager
def stored_elsewhere(place: Place, directory: Path) -> Iterator[tuple[Served, FaultyRegistry]]:
    """The registry redirects every read of a blob to a storage."""
    with serving(place, directory, mirrored=False) as served, faulty_registry() as storage:
        put(storage, *place.layers, place.hot)
        served.registry.always(faulty.redirect(f"http://{storage.host}/storage/{{digest}}"))
        served.settings = replace(served.settings, verify="require")
        yield served, storage


def refused() -> float:
    return counted().get("checksum_failures", {}).get("tree", 0)


def healed() -> float:
    return counted().get("corruptions_healed", {}).get("tree", 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_forging_proxy_costs_requests_and_no_wrong_byte(
    place: Place,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    form: str,
) -> None:
    with proxied(place, tmp_path, form) as (served, proxy):
        proxy.fails_with = "lies"
        wrong, right_again = refused(), healed()
        with served.open() as image:
            assert image.read_at(0, SIZE) == place.disk
            assert image.statistics()["wrong_units"] >= len(place.layers)
        assert len({target for target, _ in proxy.asked}) >= len(place.layers)
        assert refused() - wrong >= len(place.layers)
        assert healed() - right_again >= len(place.layers)
        assert f"from P2P proxy {served.settings.p2p_address}, or the registry: fetched again" in caplog.text
        # What is cached is right, too. (Nodes of trees that were read past the cache are fetched again.)
        served.registry.always(missing(*map(digest_of, place.layers)))
        proxy.asked.clear()
        with served.open() as image:
            assert image.read_at(0, SIZE) == place.disk
        assert not [target for target, _ in proxy.asked if target.endswith(tuple(map(digest_of, place.layers)))]


@pytest.mark.parametrize("form", FORMS)
def test_a_proxy_that_forges_trees_alone(
    place: Place,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    form: str,
) -> None:
    files = [digest_of(tree_of(layer).file) for layer in place.layers]
    with proxied(place, tmp_path, form) as (served, proxy):
        served.registry.always(forged_for_the_proxy(*files))
        # The registry itself is asked by a thread that comes while another one finds out if the proxy is there.
        for number in range(20):
            with served.open(f"cache-{number}") as image:
                assert image.read_at(0, SIZE) == place.disk
                assert image.statistics()["wrong_units"] == 0
            if "wrong bytes in the file of its hash tree" in caplog.text:
                break
        assert "wrong bytes in the file of its hash tree" in caplog.text
        assert any(target.endswith(tuple(files)) for target, _ in proxy.asked)


def forged_for_the_proxy(*digests: str) -> Fault:
    """Wrong answers about these blobs for all but obdlab itself: for the proxy."""

    def fault(answer: Answer) -> None:
        own = "obdlab" in answer.handler.headers.get("User-Agent", "")
        if not own and any(digest in answer.handler.path for digest in digests):
            answer.body = bytes(byte ^ 255 for byte in answer.body)
        answer.send()

    return fault


def test_a_proxy_and_a_registry_that_forge_give_errors_alone(place: Place, tmp_path: Path) -> None:
    with proxied(place, tmp_path, "prefix") as (served, proxy), served.open() as image:  # opened while all was well
        proxy.fails_with = "lies"
        served.registry.always(flipping())
        errors = 0
        for at in range(0, SIZE - 9000, SIZE // 40):
            try:
                assert image.read_at(at, 4096) == place.disk[at : at + 4096]
            except CorruptBlobError as error:
                assert "do not match the hash tree" in str(error) or "does not match its root" in str(error)
                errors += 1
        assert errors > 10


def test_a_hot_layer_streams_through_a_forging_proxy(place: Place, tmp_path: Path) -> None:
    with proxied(place, tmp_path, "prefix") as (served, proxy):
        proxy.fails_with = "lies"
        served.config = replace(served.config, lowers=(*place.lowers, replace(lower_of(place.hot), hot=True)))
        with served.open() as image:
            some_reads(image, place)
            wait_until(lambda: "obdlab-stream" not in [thread.name for thread in threading.enumerate()])
            assert image.read_at(0, SIZE) == place.disk


def test_a_download_through_a_forging_proxy_is_whole_and_right(place: Place, tmp_path: Path) -> None:
    with proxied(place, tmp_path, "prefix") as (served, proxy):
        proxy.fails_with = "lies"
        now = {"download_enabled": True, "download_delay_s": 0.0, "download_delay_extra_s": 0.0}
        with served.open(**now) as image:
            wait_until(lambda: image.unverified() == 0)
            wait_until(lambda: "obdlab-download" not in [thread.name for thread in threading.enumerate()])
        served.registry.always(missing("sha256"))
        proxy.fails_with = 404
        with served.open() as image:
            assert image.read_at(0, SIZE) == place.disk


@pytest.mark.parametrize("seed", range(3))
def test_a_redirect_target_that_forges_sometimes(
    place: Place,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    seed: int,
) -> None:
    with stored_elsewhere(place, tmp_path) as (served, storage):
        storage.always(flipping(0.2, seed))
        right = wrong = 0
        for _ in range(20):
            try:
                with served.open() as image:
                    for at in range(0, SIZE - 9000, SIZE // 40):
                        try:
                            assert image.read_at(at, 9000) == place.disk[at : at + 9000]
                            right += 1
                        except CorruptBlobError:
                            wrong += 1
            except ImageOpenError as error:
                assert "hash tree" in str(error)
        assert right
        assert f"from storage {storage.host}: fetched again" in caplog.text


def test_another_redirect_target_has_the_right_bytes(place: Place, tmp_path: Path) -> None:
    """The registry is asked where to read after each wrong unit: a storage's bad node is left so."""
    with ExitStack() as opened:
        served, bad = opened.enter_context(stored_elsewhere(place, tmp_path))
        good = opened.enter_context(faulty_registry())
        put(good, *place.layers)
        bad.always(flipping())
        to_bad = faulty.redirect(f"http://{bad.host}/storage/{{digest}}")
        to_good = faulty.redirect(f"http://{good.host}/storage/{{digest}}")
        seen: set[str] = set()

        def first_bad(answer: Answer) -> None:
            path = answer.handler.path
            (to_good if path in seen else to_bad)(answer)
            seen.add(path)

        served.registry.always(first_bad)
        wrong = refused()
        with served.open() as image:
            assert image.read_at(0, SIZE) == place.disk
        assert bad.blob_requests()
        assert good.blob_requests()
        assert refused() > wrong


def test_a_proxy_that_forges_what_a_storage_has_right(place: Place, tmp_path: Path) -> None:
    with ExitStack() as opened:
        served, storage = opened.enter_context(stored_elsewhere(place, tmp_path))
        proxy = opened.enter_context(running_proxy())
        served.settings = replace(served.settings, p2p_address=proxy.address)
        proxy.fails_with = "lies"
        with served.open() as image:
            assert image.read_at(0, SIZE) == place.disk
            assert image.statistics()["wrong_units"]
        assert any(storage.host in target for target, _ in proxy.asked)
        assert storage.blob_requests()
