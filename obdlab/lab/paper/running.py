"""Running the evaluation: every experiment that its questions need, one after the other."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from obdlab.errors import ObdlabError
from obdlab.lab.paper.questions import Run, question, runs
from obdlab.lab.run import interrupts
from obdlab.lab.run.declaration import load, open_experiment
from obdlab.lab.run.diskspace import DiskFullError
from obdlab.lab.run.spec import SpecError
from obdlab.lab.workbench import folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from obdlab.lab.paper.results import Results
    from obdlab.lab.paths import LabPaths
    from obdlab.lab.run.spec import Spec


def chosen_runs(keys: Sequence[str]) -> tuple[Run, ...]:
    """Return the experiments of these questions; without keys all experiments. Raises UnknownQuestionError."""
    wanted = {run.name for key in keys for run in question(key).runs}
    return tuple(run for run in runs() if not keys or run.name in wanted)


def specs(
    chosen: Sequence[Run],
    *,
    quick: bool,
    changes: Mapping[str, Mapping[str, Any]],
    declarations: Path | None = None,
) -> dict[str, Spec]:
    """Return the checked spec of each experiment by its name; ``changes`` are by experiment name as well.

    ``declarations`` is the folder of the declarations (default: the workbench's). Raises SpecError if ``changes``
    names an unknown experiment or a ``precision``, or a declaration is missing or malformed.
    """
    unknown = sorted(set(changes) - {run.name for run in chosen})
    if unknown:
        known = ", ".join(run.name for run in chosen)
        raise SpecError(f"no such experiment here (got {unknown[0]!r}, wanted one of {known})")
    found = {}
    for run in chosen:
        spec = load((declarations or folder("experiments")) / run.declaration, quick=quick)
        found[run.name] = spec.with_values(name=run.name, **run.changes, **changes.get(run.name, {}))
        if found[run.name].precision:
            raise SpecError(f"{run.name}: precision: the ledger judges fixed numbers of repeats (wanted 0)")
    return found


def run_all(
    planned: Mapping[str, Spec], results: Results, say: Callable[[str], None], paths: LabPaths | None = None
) -> dict[str, str]:
    """Run the experiments that are not measured yet; return the reasons of those that failed, by name.

    An experiment that cannot run here (missing program or kernel feature) is skipped: ``say`` gets the reason, and
    the results keep it. Optional ones are not among those that failed.
    """
    failed = {}
    optional = {run.name for run in runs() if run.optional}
    for number, (name, spec) in enumerate(planned.items(), 1):
        directory = results.root / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "not_run.txt").unlink(missing_ok=True)
        say(f"[{number}/{len(planned)}] {name}")
        began_s = time.monotonic()
        try:
            measured = open_experiment(spec, directory, paths).run()
        except DiskFullError:
            raise  # the other experiments need the same disk
        except ObdlabError as error:
            interrupts.check(error)
            if name not in optional:
                failed[name] = str(error)
            (directory / "not_run.txt").write_text(f"{error}\n")
            say(f"[{number}/{len(planned)}] {name}: could not be run: {error}")
            continue
        taken = f"{measured} measured in {time.monotonic() - began_s:.0f} s" if measured else "all measured before"
        say(f"[{number}/{len(planned)}] {name}: {taken}")
    return failed
