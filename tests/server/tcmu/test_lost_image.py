"""An image that cannot be opened any more: its device's requests fail, flushes too."""

from __future__ import annotations

import pytest

from obdlab.blob import Blob
from obdlab.devices.tcmu.disk import ScsiDisk
from obdlab.errors import SourceError
from obdlab.server.tcmu.server import LostImage, _close
from obdlab.system.pauses import wait_until
from tests.devices.blobs import MemoryWritable

SYNCHRONIZE_CACHE_10 = bytes((0x35, *bytes(9)))


def failing() -> Blob:
    raise SourceError("no layer", blob="layer")


def test_a_flush_fails_while_the_image_is_lost() -> None:
    image = LostImage(failing, "no layer", "device")
    disk = ScsiDisk(image, serial="1", description="d")
    with pytest.raises(SourceError, match="the image cannot be opened: no layer"):
        disk.execute(SYNCHRONIZE_CACHE_10, b"")
    image.close()


def test_a_flush_reaches_the_image_that_is_back() -> None:
    found = MemoryWritable(4096)
    image = LostImage(lambda: found, "no layer", "device", retry_s=0.01)
    assert wait_until(lambda: image._image is found, 60, look_s=0.01)
    assert ScsiDisk(image, serial="1", description="d").execute(SYNCHRONIZE_CACHE_10, b"") == b""
    assert found.flushes == 1
    image.close()


def test_an_image_that_stays_lost_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    image = LostImage(failing, "no layer", "device")
    _close(image)
    assert image._closed.is_set()
    assert "the image cannot be opened: no layer" in caplog.text


def test_a_writable_image_is_flushed_before_it_is_closed() -> None:
    image = MemoryWritable(4096)
    _close(image)
    assert image.flushes == 1
