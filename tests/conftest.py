"""Markers that probe the machine: ``kernel``, ``containerd``, ``registry``, ``vm``, ``root``, ``tools``, ``slow``."""

from __future__ import annotations

import signal

import hypothesis
import pytest

from tests import capabilities

#: Limits and leftovers; the fixtures ``registry_server`` and ``state_dir``, for every room; pieces of the long tests;
#: tests in the VM.
pytest_plugins = [
    "tests.guard.plugin",
    "tests.lab.statedir",
    "tests.registry.server",
    "tests.shards.plugin",
    "tests.vm.plugin",
]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for capability in ("kernel", "containerd", "registry", "vm", "root"):
        if item.get_closest_marker(capability) is not None:
            capabilities.require(capability)
    for mark in item.iter_markers("tools"):
        capabilities.require_tools(*mark.args)
    if item.get_closest_marker("slow") is not None and not capabilities.LONG:
        pytest.skip("slow: runs in make test-long (OBDLAB_LONG=1)")


# What a shell's "&" and nohup have ignored the programs under test would inherit, and sit out the tests' signals.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

# Neither examples nor their making are timed: the machine may be busy. A test's examples may share a fixture.
# `print_blob` lets a failure seen elsewhere be replayed.
_UNCHECKED = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile("obdlab", deadline=None, print_blob=True, suppress_health_check=_UNCHECKED)
hypothesis.settings.load_profile("obdlab")
