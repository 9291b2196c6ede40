"""Claims on building images: one layer (the paper's figure 25), and whole builds on a base that is read lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.lab.paper import questions as q
from obdlab.lab.paper.claim import Check, Claim
from obdlab.lab.paper.results import Results, estimate, floor, ratio
from obdlab.lab.paper.verdicts import Outcome, of_number, of_ratio

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.lab.run.statistics import Estimate

_OVERLAY, _DEVICE = "overlayfs", "obdlab-append"
_DOCKER, _LAZY = "docker", "obdlab"


def _layer(key: str, what: str, enough: float) -> Check:
    def check(results: Results) -> Outcome:
        rows = results.rows(q.BUILD)
        if key == "committed_s":
            rows = [{**row, key: row["build_s"] + row["commit_s"]} for row in rows]
        ours, theirs = ([row for row in rows if row["layer"] == name] for name in (_DEVICE, _OVERLAY))
        return of_ratio(
            ratio(ours, theirs, key),
            what=what,
            paper="",
            below=1.0,
            enough=enough,
            used=[*ours, *theirs],
            run=q.BUILD,
            floor=floor(rows, _OVERLAY, "layer", key),
        )

    return check


def _whole(results: Results) -> Outcome:
    def size(new: str) -> Estimate | None:
        ours, theirs = (results.rows(q.LAZY_BUILD, builder=name, new=new) for name in (_LAZY, _DOCKER))
        return ratio(ours, theirs, "total_s")

    new = _worst(results, size)
    rows = results.rows(q.LAZY_BUILD, new=new)
    ours, theirs = ([row for row in rows if row["builder"] == name] for name in (_LAZY, _DOCKER))
    return of_ratio(
        size(new),
        what=f"pull, build and push of {new} MB, obdlab against docker",
        paper="",
        below=1.0,
        enough=0.5,
        used=[*ours, *theirs],
        run=q.LAZY_BUILD,
        floor=floor(rows, _DOCKER, "builder", "total_s"),
    )


def _base_read(results: Results) -> Outcome:
    def size(new: str) -> Estimate | None:
        return estimate(results.rows(q.LAZY_BUILD, builder=_LAZY, new=new), "base_share")

    new = _worst(results, size)
    return of_number(
        size(new),
        what=f"read of the base by a build of {new} MB",
        unit="of it",
        least=None,
        most=0.05,
        used=results.rows(q.LAZY_BUILD, builder=_LAZY, new=new),
        run=q.LAZY_BUILD,
    )


# A claim is of every number and size of new layers: that with the largest number decides.
def _worst(results: Results, size: Callable[[str], Estimate | None]) -> str:
    known = dict.fromkeys(str(row["new"]) for row in results.rows(q.LAZY_BUILD))
    found = {new: estimate.median for new in known if (estimate := size(new)) is not None}
    return max(found, key=lambda new: found[new], default="")


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "build",
        "Fig 25",
        "image_build",
        "Building an image is 20 to 40 % faster, commit left out.",
        "20 to 40 % in words; the bars' numbers are not recoverable",
        _layer("build_s", "write and chmod, obdlab against overlayfs", 0.8),
    ),
    Claim(
        "build-committed",
        "Fig 25",
        "image_build",
        "(obdlab's own) With the commit, too: of a compressed layer, against a plain tar.",
        "not in the paper",
        _layer("committed_s", "write, chmod and commit, obdlab against overlayfs", 0.8),
    ),
    Claim(
        "build-whole",
        "",
        "image_build",
        "(obdlab's own) On a base read lazily, pull, build and push take at most half of docker's time.",
        "not in the paper; BuildKit's documentation of the original: 0.39 to 0.54",
        _whole,
    ),
    Claim(
        "build-base-read",
        "",
        "image_build",
        "(obdlab's own) Such a build reads at most 5 % of its base.",
        "not in the paper",
        _base_read,
    ),
)
