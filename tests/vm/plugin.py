"""pytest: tests marked ``vm`` run in the virtual machine, all selected ones in one boot, and are reported here.

In the machine, or with ``OBDLAB_VM_GUEST=1`` on a host that has what they need, they run as any other test.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from tests.vm import machine
from tests.vm.kernel import VmError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Loaded before the tests. A test that needs another one loads it.
MODULES = ("configfs", "target_core_user", "tcm_loop", "sd_mod", "ublk_drv", "fuse", "loop", "ext4", "xfs", "erofs")
_BOOT_S = 300.0
_EACH_S = 120.0
_REPORTS = "reports.jsonl"
#: Passed on to the machine.
_VARIABLES = ("OBDLAB_LONG", "OBDLAB_ROUNDS")
_SELECTED = pytest.StashKey[list[pytest.Item]]()
_REPORTED = pytest.StashKey[tuple[dict[str, list[Any]], str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vm: runs in the virtual machine of tests/vm")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    if machine.in_guest() or machine.missing():
        return
    # One that is slow is skipped on this side already, unless it is asked for.
    unwanted = "" if os.environ.get("OBDLAB_LONG") == "1" else "slow"
    selected = [item for item in items if item.get_closest_marker("vm") and not item.get_closest_marker(unwanted)]
    session.stash[_SELECTED] = selected
    limit = pytest.mark.timeout(_limit_s(selected) + 60)  # whichever comes first waits for all of them
    for item in selected:
        item.add_marker(limit, append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if item not in item.session.stash.get(_SELECTED, ()):
        return None
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports_of(item):
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # A test before it in its file left up what the two share, for this one.
    item.session._setupstate.teardown_exact(nextitem)
    return True


# In the machine: a line for each setup, call and teardown, so that what a crash leaves is known.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    share = machine.GUEST_SHARE
    if machine.in_guest() and share.is_dir() and item.get_closest_marker("vm"):
        data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
        with (share / _REPORTS).open("a") as stream:
            stream.write(json.dumps(data) + "\n")
    return report  # type: ignore[no-any-return]


def _reports_of(item: pytest.Item) -> list[Any]:
    stash = item.session.stash
    if _REPORTED not in stash:
        stash[_REPORTED] = _run(stash[_SELECTED], item.config)
    reported, trouble = stash[_REPORTED]
    reports = reported.get(item.nodeid, [])
    if not reports or reports[-1].when != "teardown":  # the machine died before, or during this test
        # Names only: a mark cannot be sent to the process that collects the reports, which would end the whole run.
        names: dict[str, Literal[1]] = dict.fromkeys(item.keywords, 1)
        lost = pytest.TestReport(item.nodeid, item.location, names, "failed", trouble, "call")
        return [*reports, lost]
    return reports


def _run(selected: list[pytest.Item], config: pytest.Config) -> tuple[dict[str, list[Any]], str]:
    with tempfile.TemporaryDirectory(prefix="vm-tests-") as name:
        share = Path(name)
        (share / "selected").write_text("".join(f"{item.nodeid}\n" for item in selected))
        # Only the plugins that are used: looking for all of them takes 20 s in an emulated machine.
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
        command.append(f"@{machine.GUEST_SHARE / 'selected'}")
        variables = {key: os.environ[key] for key in _VARIABLES if key in os.environ}
        try:
            done = machine.run(
                command,
                directory=config.rootpath,
                environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "NO_COLOR": "1"} | variables,
                modules=MODULES,
                share=share,
                timeout_s=_limit_s(selected),
            )
            trouble = f"the machine did not report this test; its output:\n{done.output}\nconsole:\n{done.console}"
        except VmError as error:
            trouble = str(error)
        reported: dict[str, list[Any]] = {}
        if (share / _REPORTS).exists():
            for line in (share / _REPORTS).read_text().splitlines():
                report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
                reported.setdefault(report.nodeid, []).append(report)
        return reported, trouble


def _limit_s(selected: list[pytest.Item]) -> float:
    markers = [item.get_closest_marker("timeout") for item in selected]
    return _BOOT_S + sum(float(marker.args[0]) if marker else _EACH_S for marker in markers)
