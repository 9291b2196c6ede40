"""containerd's image store: names for manifests and indexes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.field_mask_pb2 import FieldMask

from obdlab.containerd._pb import images_pb2 as pb
from obdlab.containerd._pb import types_pb2
from obdlab.containerd.errors import AlreadyExistsError
from obdlab.containerd.services import make_stub

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obdlab.containerd._pb.images_pb2_grpc import ImagesStub
    from obdlab.containerd.channel import Connection

# Removing an image with sync waits for the garbage collection, which deletes snapshots one by one.
_REMOVAL_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Image:
    """A name, and the descriptor of its manifest or index."""

    name: str
    media_type: str
    digest: str
    size: int
    labels: Mapping[str, str]


class ImageStore:
    """The image service."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub: ImagesStub = make_stub(connection.channel, pb.DESCRIPTOR, "Images")

    def get(self, name: str) -> Image:
        """Return an image. Raises NotFoundError."""
        answer = self._connection.call(self._stub.Get, pb.GetImageRequest(name=name), f"image {name}")
        return _image(answer.image)

    def list(self, *filters: str) -> list[Image]:
        """Return the images that match any of containerd's filter expressions; all of them without one."""
        answer = self._connection.call(self._stub.List, pb.ListImagesRequest(filters=filters), "listing images")
        return [_image(image) for image in answer.images]

    def put(self, image: Image) -> None:
        """Create the image, or give its name the new target and labels."""
        doing = f"image {image.name}"
        target = types_pb2.Descriptor(media_type=image.media_type, digest=image.digest, size=image.size)
        record = pb.Image(name=image.name, labels=image.labels, target=target)
        try:
            self._connection.call(self._stub.Create, pb.CreateImageRequest(image=record), doing)
        except AlreadyExistsError:
            mask = FieldMask(paths=["target", *(f"labels.{key}" for key in image.labels)])
            self._connection.call(self._stub.Update, pb.UpdateImageRequest(image=record, update_mask=mask), doing)

    def delete(self, name: str, *, sync: bool = False) -> None:
        """Delete a name; ``sync`` waits for the garbage collection that follows. Raises NotFoundError."""
        request = pb.DeleteImageRequest(name=name, sync=sync)
        self._connection.call(self._stub.Delete, request, f"removing image {name}", timeout_s=_REMOVAL_TIMEOUT_S)


def _image(image: pb.Image) -> Image:
    target = image.target
    return Image(image.name, target.media_type, target.digest, target.size, dict(image.labels))
