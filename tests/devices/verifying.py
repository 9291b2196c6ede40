"""fio writing to a device and checking what it reads back, again and again while the test disturbs it."""

from __future__ import annotations

import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: One run, undisturbed, takes a second natively and ten in an emulated machine.
_JOB = (
    "--name=verify", "--rw=randwrite", "--bsrange=4k-64k", "--size=24m", "--direct=1", "--ioengine=libaio",
    "--iodepth=8", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1",
)  # fmt: skip


@contextmanager
def verified(node: Path, timeout_s: float = 900.0) -> Iterator[None]:
    """Have fio write and verify, run after run, until the block ends; then one that has begun still ends.

    However long the disturbances take, fio is at work during each of them. Fails with fio's output if any run did.
    """
    ending = threading.Event()
    failed: list[str] = []

    def run() -> None:
        while not ending.is_set() and not failed:
            try:
                done = subprocess.run(
                    ["fio", f"--filename={node}", *_JOB],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=timeout_s,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                failed.append(f"fio still runs after {timeout_s:g} s\n{error.stdout!r}")
                return
            if done.returncode != 0 or "err= 0" not in done.stdout:
                failed.append(done.stdout)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
        assert thread.is_alive(), failed
    finally:
        ending.set()
        thread.join(timeout_s + 30)
    assert not thread.is_alive()
    assert not failed, failed[0]
