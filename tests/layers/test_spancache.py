"""Decoded pieces: each is decoded once, by one thread, and no more is kept than the limit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from obdlab.errors import CorruptBlobError, SourceError
from obdlab.layers import spancache
from obdlab.layers.spancache import SpanCache


def test_the_least_recently_used_are_dropped() -> None:
    cache, decoded = SpanCache(250), list[int]()

    def get(number: int) -> bytes:
        return cache.get((0, number), lambda: decoded.append(number) or bytes(100))

    for number in (1, 2, 1, 3, 1, 2):
        assert get(number) == bytes(100)
    assert decoded == [1, 2, 3, 2]
    assert cache.size == 200


def test_a_piece_larger_than_all_is_returned_and_not_kept() -> None:
    cache = SpanCache(50)
    assert cache.get((0, 1), lambda: bytes(100)) == bytes(100)
    assert cache.size == 0


def test_threads_that_want_the_same_piece_wait_for_the_one_that_decodes_it() -> None:
    cache, begun, go = SpanCache(), threading.Event(), threading.Event()
    count = 0

    def decode() -> bytes:
        nonlocal count
        count += 1
        begun.set()
        assert go.wait(10)
        return b"piece"

    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(cache.get, (0, 1), decode)
        assert begun.wait(10)
        others = [threads.submit(cache.get, (0, 1), decode) for _ in range(3)]
        assert cache.get((0, 2), lambda: b"other") == b"other"  # not held up
        go.set()
        assert [each.result(10) for each in (first, *others)] == [b"piece"] * 4
    assert count == 1


def test_an_error_reaches_all_who_wait_and_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, begun, go = SpanCache(), threading.Event(), threading.Event()

    def fail() -> bytes:
        begun.set()
        assert go.wait(10)
        raise CorruptBlobError("damaged")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.get, (0, 1), fail)
        assert begun.wait(10)
        second = threads.submit(cache.get, (0, 1), fail)
        while not second.running():
            threading.Event().wait(0.01)
        go.set()
        for each in (first, second):
            with pytest.raises(CorruptBlobError, match="damaged"):
                each.result(10)
    assert cache.get((0, 1), lambda: b"sound") == b"sound"


def test_a_wait_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spancache, "_LONGEST_WAIT_S", 0.05)
    cache, begun, go = SpanCache(), threading.Event(), threading.Event()

    def slow() -> bytes:
        begun.set()
        assert go.wait(10)
        return b"piece"

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(cache.get, (0, 1), slow)
        assert begun.wait(10)
        with pytest.raises(SourceError, match="in time") as caught:
            cache.get((0, 1), slow)
        assert caught.value.temporary
        go.set()
        assert first.result(10) == b"piece"


def test_what_is_dropped_is_decoded_once_more_even_if_it_was_being_decoded() -> None:
    cache = SpanCache()

    def decode() -> bytes:
        cache.drop(0, 1, 1)
        return b"old"

    assert cache.get((0, 1), decode) == b"old"
    assert cache.get((0, 1), lambda: b"new") == b"new"
    assert cache.get((0, 2), lambda: b"two") == b"two"
    cache.drop(0, 1, 1)
    assert cache.size == 3
    assert cache.get((0, 1), lambda: b"newer") == b"newer"


def test_only_an_owners_own_pieces_are_dropped() -> None:
    cache = SpanCache()
    one, two = cache.new_owner(), cache.new_owner()
    keys = [(one, 1), (one, 2, 0), (one, 2, 1), (one, 3), (two, 2)]
    for key in keys:
        cache.get(key, lambda: b"piece")
    cache.drop(one, 2, 2)
    again = [key for key in keys if cache.get(key, lambda: b"made again") == b"made again"]
    assert again == [(one, 2, 0), (one, 2, 1)]
