"""docs/reference/metrics.md names exactly what the exporter serves, with its kind and labels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import Metric

from obdlab.metrics import families
from obdlab.metrics.exporter import Collected, ObdlabCollector, Server, Snapshot
from obdlab.observe.counters import Table
from obdlab.server.rundir import DeviceRecord

PAGE = (Path(__file__).parents[1] / "docs" / "reference" / "metrics.md").read_text()


class OneDevice(Collected):
    """As if one server had just counted something under each name."""

    def look_at_snapshotters(self) -> list[Table]:
        return [{"rpc_seconds:Stat": {"20": 1.0, "sum": 0.001}, "rpc_errors": {"Stat:NOT_FOUND": 1.0}}]

    def look(self) -> Snapshot:
        table = {family.name: {"": 1.0} for family in families.COUNTERS if not family.label}
        table |= {family.name: {"x": 1.0} for family in families.COUNTERS if family.label}
        table |= {family.name: {"20": 1.0, "sum": 0.001} for family in families.HISTOGRAMS}
        record = DeviceRecord(
            device_id="d",
            config="c",
            config_sha256="",
            kind="fuse+loop",
            path="/dev/loop0",
            size=512,
            read_only=True,
            pid=1,
            start_time=1,
        )
        server = Server("d", "1:1", table, {}, [1.0], 1)
        return Snapshot({"d": "alive"}, {"d": record}, [server], {"d": table}, table, 0.1)


def served(tmp_path: Path) -> list[Metric]:
    return list(ObdlabCollector(OneDevice(tmp_path), tmp_path).collect())


def full_name(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def labels_of(metric: Metric) -> set[str]:
    return {name for sample in metric.samples for name in sample.labels} - {"le"}


def described() -> dict[str, tuple[str, set[str]]]:
    """Of each name in a table's first column its kind and labels; those without a prefix stand for two families."""
    found = {}
    for row in re.findall(r"^\| (`.*?) \|$", PAGE, re.MULTILINE):
        names, kind, labels = row.split(" | ")[:3]
        found.update(
            {
                name: (kind, set(re.findall(r"`(\w+)`", part)))
                for name, part in zip(re.findall(r"`(\w+)`", names), parts_of(names, labels), strict=True)
            }
        )
    return found


def parts_of(names: str, labels: str) -> Iterable[str]:
    count = names.count("`") // 2
    return labels.split(";") if ";" in labels else [labels] * count


def test_every_family_is_described_and_nothing_else(tmp_path: Path) -> None:
    page = described()
    wanted = {}
    for name, (kind, labels) in page.items():
        if name.startswith(("obdlab_", "OverlayBD_", "grpc_", "is_alive")):
            wanted[name] = (kind, labels)
        else:
            wanted[f"obdlab_{name}"] = (kind, labels)
            wanted[f"obdlab_device_{name}"] = (kind, labels | {"device"})
    got = {full_name(metric): (metric.type, labels_of(metric)) for metric in served(tmp_path)}
    assert len(got) > 60
    assert got == wanted


def test_samples_and_values_of_labels_are_as_described(tmp_path: Path) -> None:
    for family in families.COUNTERS:
        if family.values:
            assert f"`{family.label}`: {', '.join(family.values)}" in PAGE
    names = {sample.name for metric in served(tmp_path) for sample in metric.samples}
    alerts = (Path(__file__).parents[1] / "packaging" / "prometheus" / "alerts.yml").read_text()
    used = set(re.findall(r"obdlab_\w+", alerts))
    assert len(used) > 10
    assert used <= names
