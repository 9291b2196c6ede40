"""DART's hashes, orders and trees: vectors that its own programs give."""

from __future__ import annotations

import pytest

from obdlab.peers.topology import Group, Rendezvous
from obdlab.peers.topology import rendezvous as hrw

IDENTITY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
URL = "https://registry.example.com/v2/lib/app/blobs/uploads-no-digest"
WEIGHTS = {f"obd-{number}": 1.0 for number in range(1, 8)}


def hosts(numbers: str) -> list[str]:
    return [f"obd-{number}" for number in numbers]


@pytest.mark.parametrize(
    ("identity", "chunk", "key", "order"),
    [
        (IDENTITY, 0, 0x3D46DBAE3DA00F75, "6145273"),
        (IDENTITY, 1, 0x5EECA10BD6256375, "4352617"),
        (IDENTITY, -1, 0xF2C3F8D9D4B38E00, "4623157"),
        (URL, 3, 0xBDEE7C396C8D160B, "7421635"),
    ],
)
def test_keys_and_orders(identity: str, chunk: int, key: int, order: str) -> None:
    assert hrw.chunk_key(identity, chunk) == key
    assert hrw.rank(key, WEIGHTS) == hosts(order)


def test_host_hashes() -> None:
    assert [hrw.host_hash(4415458026088042357, host) for host in WEIGHTS] == [
        15264751134355787496,
        5965110055764834717,
        1076743440613055836,
        13751396006703178068,
        7706530732969000470,
        16034330841947520625,
        1894852591950897162,
    ]


def test_epochs_and_weights() -> None:
    weighted = {"obd-2": 2.0, "obd-3": 4.0, "obd-1": 1.0}
    assert hrw.epoch({}) == 17280346270528514342
    assert hrw.epoch(WEIGHTS) == 1216183246988123786
    assert hrw.epoch(weighted) == 3542621161450453726
    assert hrw.rank(0x3D46DBAE3DA00F75, weighted) == hosts("123")
    assert hrw.rank(0x3D46DBAE3DA00F75, dict.fromkeys(WEIGHTS, 0.0)) == hosts("6145273")


@pytest.mark.parametrize(
    ("chunk", "tree"),
    [
        (0, {"6": "12", "1": "45", "2": "73"}),
        (1, {"4": "36", "3": "52", "6": "17"}),
    ],
)
def test_trees(chunk: int, tree: dict[str, str]) -> None:
    topology = Rendezvous()
    topology.admit(Group(IDENTITY, chunk), WEIGHTS)
    found = topology.parents(Group(IDENTITY, chunk), 0.0)
    wanted = {f"obd-{child}": f"obd-{parent}" for parent, children in tree.items() for child in children}
    assert {child: parent for child, parent in found.items() if parent} == wanted
    assert found[f"obd-{next(iter(tree))}"] is None


@pytest.mark.parametrize(("arity", "deepest", "mean"), [(2, 9, 8.0), (4, 5, 4.6)])
def test_depths(arity: int, deepest: int, mean: float) -> None:
    order = [str(number) for number in range(1000)]
    depths: dict[str, int] = {}
    for host, parent in sorted(hrw.tree(order, arity).items(), key=lambda item: int(item[0])):
        depths[host] = depths[parent] + 1 if parent else 0
    assert max(depths.values()) == deepest
    assert sum(depths.values()) / 999 == pytest.approx(mean, abs=0.05)


def test_highest_hashes_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": 2**64 - 1, "b": 5, "c": 2**63}
    monkeypatch.setattr(hrw, "host_hash", lambda key, host: values[host])
    assert hrw.rank(1, dict.fromkeys(values, 1.0)) == ["c", "b", "a"]


def test_separator_and_arity_are_refused() -> None:
    with pytest.raises(ValueError, match="separator"):
        hrw.chunk_key("x", 0, "a\x1fb")
    with pytest.raises(ValueError, match="arity: wanted 1 or more, got 0"):
        hrw.tree(["a"], 0)
