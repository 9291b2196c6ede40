"""Workflows: every command in them is one that obdlab takes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from obdlab.cli.main import build_parser, main
from obdlab.lab.run.spec import Spec
from obdlab.lab.share.workflow import Work, WorkflowError, kubernetes_jobs, snakefile


def exported(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["lab", "export", "experiments/codec.toml", "experiments/index.toml", *words]) == 0
    return capsys.readouterr().out


def assert_taken(words: list[str]) -> None:
    assert words[0] == "obdlab"
    build_parser().parse_args(words[1:])


def test_a_snakefile_measures_one_experiment_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    text = exported(capsys, "--to", "snakemake", "--quick")
    shells = [json.loads(line) for line in re.findall(r'shell:\n\s+(".*")', text)]
    assert len(shells) == 3
    for shell in shells:
        assert_taken(shlex.split(shell.replace("{output}", "bundle.tar.gz")))
    assert text.count("host=1,") == 2
    # The bundle waits for the rows that the commands write.
    outputs = re.findall(r'"(results/[^"]+)"', text)
    assert outputs.count("results/codec-quick/rows.csv") == 2
    assert "obdlab lab bundle codec-quick index-quick" in text


def test_kubernetes_jobs_are_alone_on_their_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(exported(capsys, "--to", "kubernetes-job", "--image", "example.org/obdlab:1"))
    names = [job["metadata"]["name"] for job in found["items"]]
    assert names == ["obdlab-codec", "obdlab-index"]
    for job in found["items"]:
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "example.org/obdlab:1"
        assert container["securityContext"] == {"privileged": True}
        assert_taken(container["command"])
        mounted = {each["name"] for each in container["volumeMounts"]}
        assert mounted == {each["name"] for each in pod["volumes"]}
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "obdlab-results"}
        (alone,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert alone["labelSelector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()


def test_what_cannot_become_a_job_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "export", "experiments/quick.toml", "--to", "kubernetes-job"]) == 1
    assert "--image: missing" in capsys.readouterr().err
    assert main(["lab", "export", "quick"]) == 1
    assert "need --to" in capsys.readouterr().err
    spec = Spec.from_values({"name": "a b", "kind": "index"})
    other = Spec.from_values({"name": "a_b", "kind": "index"})
    works = [Work(spec, Path("a.toml"), quick=False), Work(other, Path("b.toml"), quick=False)]
    with pytest.raises(WorkflowError, match="one name"):
        snakefile(works)
    with pytest.raises(WorkflowError, match="one name"):
        kubernetes_jobs(works, image="x", claim="y")
