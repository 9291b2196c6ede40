"""Several stages, targets, scratch, and the layers of earlier builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from obdlab.formats import oci

if TYPE_CHECKING:
    from tests.build.building import Bench

pytestmark = [pytest.mark.kernel, pytest.mark.registry, pytest.mark.tools("runc")]


def test_several_stages(bench: Bench) -> None:
    base = bench.base("stages/base")
    other = bench.base("stages/other", {"theirs": b"theirs"})
    new = f"{bench.host}/stages/new:1"
    bench.context(
        f"""ARG BASE={base}
        FROM $BASE AS tools
        RUN mkdir /out && echo built >/out/program && ln -s program /out/link && chown 3:4 /out/program
        FROM tools AS more
        ENV X=1
        RUN echo more >/out/more
        FROM $BASE AS unused
        RUN exit 1
        FROM scratch AS last
        COPY --from=tools /out /app/
        COPY --from=more /out/more /bin/busybox /
        COPY --from={other} theirs /
        RUN ["/busybox", "sh", "-c", "/busybox stat -c %u:%g /app/program >/stat"]
        ENTRYPOINT ["/busybox"]
        """
    )
    made = bench.build(new)
    assert sorted(bench.ls(new, "/app")) == ["link", "program"]
    assert [bench.cat(new, path) for path in ("/app/link", "/more", "/theirs")] == ["built\n", "more\n", "theirs"]
    assert bench.cat(new, "/stat") == "3:4\n"
    # Neither mount points nor their directories are left of the container.
    assert sorted(bench.ls(new, "/")) == ["app", "busybox", "more", "stat", "theirs"]
    manifest, document = bench.documents(new)
    assert len(manifest.layers) == made["new_layers"] == 5
    assert document["config"] == {"Entrypoint": ["/busybox"]}
    assert document["architecture"]
    # Its parent's layers and settings are a stage's own.
    bench.build(f"{new}-more", "--target", "more")
    manifest, document = bench.documents(f"{new}-more")
    assert sorted(bench.ls(f"{new}-more", "/out")) == ["link", "more", "program"]
    assert (len(manifest.layers), document["config"]["Env"][-1]) == (3, "X=1")
    # Again, from the cache, the same image is made without a device.
    again = bench.build(new)
    assert again["digest"] == made["digest"]
    assert {step["cached"] for step in again["steps"]} == {True}


def test_what_makes_a_step_run_again(bench: Bench) -> None:
    base = bench.base("cache/base")
    new = f"{bench.host}/cache/new:1"
    dockerfile = f"FROM {base}\nARG A=1\nRUN echo $A >/a\nLABEL x=1\nCOPY d /d\nRUN echo last >/last"

    def cached(*options: str) -> list[bool]:
        return [step["cached"] for step in bench.build(new, *options)["steps"]]

    bench.context(dockerfile, {"d/x": "x", "unused": "1"})
    assert cached() == [False] * 3
    bench.context(dockerfile, {"d/x": "x", "unused": "2"})
    assert cached() == [True] * 3
    bench.context(dockerfile.replace("LABEL x=1", "LABEL x=2"))
    assert cached() == [True] * 3
    assert bench.documents(new)[1]["config"]["Labels"] == {"x": "2"}
    bench.context(dockerfile, {"d/x": "y"})
    assert cached() == [True, False, False]
    assert bench.cat(new, "/d/x") == "y"
    (bench.place / "context" / "d" / "x").chmod(0o600)
    assert cached() == [True, False, False]
    assert cached("--build-arg", "A=2") == [False] * 3
    assert cached("--network", "host") == [False] * 3
    assert cached("--no-cache") == [False] * 3
    for blob in (bench.place / "layers").glob("*.obd"):
        blob.write_bytes(blob.read_bytes()[:-1])  # damaged: not the size that was noted
    assert cached() == [False] * 3
    bench.build(new, "--build-cache-quota", "0")
    assert list((bench.place / "layers").glob("*.obd")) == list((bench.place / "layers").glob("*.json")) == []


def test_a_layer_is_the_same_for_later_builds_and_other_destinations(bench: Bench) -> None:
    base = bench.base("cache/kept")
    bench.context(f"FROM {base}\nRUN echo 1 >/one")
    first, second = f"{bench.host}/cache/kept-1:1", f"oci:{bench.place}/layout:1"
    bench.build(first)
    made = bench.build(second)
    assert made["steps"][0]["cached"]
    done = bench.obdlab("image", "cat", f"{second}:/one")
    assert (done.returncode, done.stdout) == (0, "1\n")
    digests = [layer.digest for layer in bench.documents(first)[0].layers]
    done = bench.obdlab("image", "inspect", second)
    assert all(digest in done.stdout for digest in digests)
    assert oci.HASH_TREE not in done.stdout
