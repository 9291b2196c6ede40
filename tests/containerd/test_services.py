"""Stubs and handlers made of descriptors, against each other over a socket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest

from obdlab.containerd._pb import content_pb2 as pb
from obdlab.containerd.services import make_stub, serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVICE = pb.DESCRIPTOR.services_by_name["Content"]


class Content:
    """Answers one call of each kind that containerd's services have; the others are refused."""

    Update = Delete = Read = Abort = staticmethod(
        lambda request, context: context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")
    )

    def Info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoResponse:
        return pb.InfoResponse(info=pb.Info(digest=request.digest, size=7))

    def List(self, request: pb.ListContentRequest, context: grpc.ServicerContext) -> Iterator[pb.ListContentResponse]:
        for digest in request.filters:
            yield pb.ListContentResponse(info=[pb.Info(digest=digest)])

    def Write(
        self, requests: Iterator[pb.WriteContentRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.WriteContentResponse]:
        offset = 0
        for request in requests:
            offset += len(request.data)
            yield pb.WriteContentResponse(offset=offset)


@pytest.fixture
def server() -> Iterator[grpc.Server]:
    made = grpc.server(ThreadPoolExecutor(2))
    yield made
    made.stop(None).wait()


def test_calls_of_each_kind(server: grpc.Server, tmp_path: Path) -> None:
    serve(server, SERVICE, Content())
    server.add_insecure_port(f"unix:{tmp_path}/socket")
    server.start()
    with grpc.insecure_channel(f"unix:{tmp_path}/socket") as channel:
        content = make_stub(channel, pb.DESCRIPTOR, "Content")
        assert content.Info(pb.InfoRequest(digest="d"), timeout=30).info == pb.Info(digest="d", size=7)
        answers = content.List(pb.ListContentRequest(filters=["a", "b"]), timeout=30)
        assert [answer.info[0].digest for answer in answers] == ["a", "b"]
        writes = content.Write(iter([pb.WriteContentRequest(data=data) for data in (b"12", b"345")]), timeout=30)
        assert [answer.offset for answer in writes] == [2, 5]
        with pytest.raises(grpc.RpcError) as raised:
            content.Delete(pb.DeleteContentRequest(digest="d"), timeout=30)
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_servicer_must_have_all_methods(server: grpc.Server) -> None:
    with pytest.raises(AttributeError, match="Info"):
        serve(server, SERVICE, object())


def test_a_service_that_the_file_lacks() -> None:
    with grpc.insecure_channel("unix:/nowhere") as channel, pytest.raises(KeyError, match="Contents"):
        make_stub(channel, pb.DESCRIPTOR, "Contents")
