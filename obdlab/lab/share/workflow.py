"""Experiments as a workflow of others: a Snakefile, or Kubernetes jobs.

A job is one experiment on one host: its arms are compared on the same machine, in one interleaved order, and rows of
different hosts never meet in one table. Spreading one experiment over several like hosts is the scheduler's work
(``obdlab lab run --scheduler``).
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from obdlab.lab.run.spec import Spec

#: Kubernetes restarts a failed pod so often; each goes on where the one before ended.
_RETRIES = 2
_DNS_LABEL = re.compile(r"[^a-z0-9-]+")
#: In pods: the directory of results, and that of built images.
_RESULTS, _STATE = "/results", "/var/lib/obdlab"


class WorkflowError(ObdlabError):
    """An experiment cannot become a job."""


@dataclass(frozen=True, slots=True)
class Work:
    """An experiment to be run: its declaration's file, and whether by its quick mode."""

    spec: Spec
    declaration: Path
    quick: bool

    @property
    def command(self) -> list[str]:
        """The command that measures it."""
        return ["obdlab", "lab", "run", str(self.declaration), *(["--quick"] if self.quick else [])]


def snakefile(works: Sequence[Work]) -> str:
    """Return a Snakefile with a rule for each experiment, one at a time on a host, and a bundle of all results."""
    names = _names(works, lambda name: re.sub(r"\W", "_", name))
    bundle = shlex.join(["obdlab", "lab", "bundle", *(work.spec.name for work in works)])
    lines = [
        '"""Experiments of obdlab. As root, on hosts that do nothing else:',
        "",
        "snakemake --cores 1 --resources host=1",
        '"""',
        "",
        "rule bundle:",
        "    input:",
        *(f"        {json.dumps(f'results/{work.spec.name}/rows.csv')}," for work in works),
        "    output:",
        '        "bundle.tar.gz",',
        "    shell:",
        f"        {json.dumps(f'{bundle} --results results -o {{output}}')}",
    ]
    for name, work in names.items():
        lines += [
            "",
            f"rule {name}:",
            "    input:",
            f"        {json.dumps(str(work.declaration))},",
            "    output:",
            f"        {json.dumps(f'results/{work.spec.name}/rows.csv')},",
            "    resources:",
            "        host=1,  # two experiments on one host would measure each other",
            f"    retries: {_RETRIES}",
            "    shell:",
            f"        {json.dumps(shlex.join([*work.command, '--results', 'results']))}",
        ]
    return "\n".join(lines) + "\n"


def kubernetes_jobs(works: Sequence[Work], *, image: str, claim: str) -> str:
    """Return Kubernetes jobs, one for each experiment, as a JSON list that ``kubectl apply -f`` reads.

    ``image`` is a container image with obdlab, its packages and the declarations; ``claim`` the name of the
    persistent volume claim for results. Pods are privileged: they make devices, mounts and containers. Jobs keep off
    each other's hosts.
    """
    names = _names(works, lambda name: _DNS_LABEL.sub("-", name.lower()).strip("-")[:50])
    items = [_job(f"obdlab-{name}", work, image, claim) for name, work in names.items()]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=2) + "\n"


def _job(name: str, work: Work, image: str, claim: str) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "obdlab", "obdlab/experiment": name}
    mounts = [{"name": "results", "mountPath": _RESULTS}, {"name": "state", "mountPath": _STATE}]
    container = {
        "name": "obdlab",
        "image": image,
        "command": [*work.command, "--results", _RESULTS],
        "securityContext": {"privileged": True},
        "volumeMounts": mounts,
    }
    alone = {
        "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "obdlab"}},
        "topologyKey": "kubernetes.io/hostname",
    }
    pod = {
        "restartPolicy": "Never",
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [alone]}},
        "containers": [container],
        "volumes": [
            {"name": "results", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "state", "hostPath": {"path": _STATE, "type": "DirectoryOrCreate"}},
        ],
    }
    template = {"metadata": {"labels": labels}, "spec": pod}
    job = {"backoffLimit": _RETRIES, "completions": 1, "parallelism": 1, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "labels": labels}, "spec": job}


def _names(works: Sequence[Work], form: Callable[[str], str]) -> Mapping[str, Work]:
    found: dict[str, Work] = {}
    for work in works:
        name = form(work.spec.name)
        if not name or name in found:
            raise WorkflowError(f"{work.declaration}: two experiments would have one name (got {name!r} again)")
        found[name] = work
    return found
