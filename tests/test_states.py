"""States that change only as their table says; every table of the package."""

from __future__ import annotations

import enum
import importlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.cache import unitstate
from obdlab.layers import upperstate
from obdlab.server import keeperstate
from obdlab.states import IllegalTransitionError, StateOf

TABLES = {
    "keeper": (keeperstate.TRANSITIONS, {keeperstate.State.STARTING, keeperstate.State.REPLACING}),
    "unit": (unitstate.TRANSITIONS, {unitstate.State.MISSING}),
    "upper": (upperstate.TRANSITIONS, {upperstate.State.WRITABLE, upperstate.State.READ_ONLY}),
}


class Light(enum.Enum):
    RED = 1
    GREEN = 2
    BROKEN = 3


TABLE = {
    Light.RED: frozenset({Light.GREEN, Light.BROKEN}),
    Light.GREEN: frozenset({Light.RED}),
    Light.BROKEN: frozenset(),
}


@given(st.sampled_from(Light), st.lists(st.sampled_from(Light), max_size=12))
def test_a_walk_follows_the_table(start: Light, walk: list[Light]) -> None:
    state = StateOf("light", start, TABLE)
    for wanted in walk:
        before = state.now
        if wanted is before or wanted in TABLE[before]:
            state.check(wanted)
            assert state.now is before
            state.become(wanted)
            assert state.now is wanted
        else:
            for call in (state.check, state.become):
                with pytest.raises(IllegalTransitionError, match=f"light: no way from {before} to {wanted}"):
                    call(wanted)
            assert state.now is before


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_whole(name: str) -> None:
    table, starts = TABLES[name]
    states = type(next(iter(table)))
    assert set(table) == set(states)
    assert all(state not in following for state, following in table.items())
    reached = set(starts)
    for _ in states:
        reached |= {state for each in reached for state in table[each]}
    assert reached == set(states)  # each state can come
    ends = {state for state, following in table.items() if not following}
    assert len(ends) == 1 or (not ends and name == "unit")
    ends = ends or set(starts)  # units are fetched and evicted for ever
    leads = set(ends)
    for _ in states:
        leads |= {state for state, following in table.items() if following & leads}
    assert leads == set(states)  # and from each there is a way to the end


def test_the_page_shows_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs"))
    page = importlib.import_module("states").page()
    for table, _ in TABLES.values():
        for state, following in table.items():
            names = ", ".join(f"`{each.value}`" for each in type(state) if each in following)
            assert re.search(rf"^\| `{state.value}` \| [^|\n]+ \| {names or '-'} \|$", page, re.MULTILINE), state
