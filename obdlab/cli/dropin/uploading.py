"""--upload of the original's tools: the layer goes into a file and to a registry at once."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from obdlab.cli.dropin.grammar import ToolError
from obdlab.errors import FormatError
from obdlab.image.registryaccess import open_client
from obdlab.layers.commit import commit
from obdlab.registry.reference import Repository
from obdlab.settings.settings import Settings
from obdlab.system.newfile import new_file

if TYPE_CHECKING:
    import argparse

    from obdlab.blob import Buffer
    from obdlab.layerfiles.writing import Packing
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.sink import Sink
    from obdlab.layers.stack import Stack

_UPLOADS = "uploads"
_MOST_KIB = 1 << 20


def write_and_upload(
    source: Layer | Stack, path: str, packing: Packing, values: argparse.Namespace, **names: Any
) -> str:
    """Write a layer to ``path`` and upload it meanwhile to ``values.upload``; return its digest.

    As in the original, the first header of a ZFile stays as it was written, so that readers need its trailer.
    Raises ToolError and FormatError for options that name no upload, and the errors of source, file and registry.
    """
    if not 1 <= values.upload_bs <= _MOST_KIB:
        raise ToolError(f"invalid '--upload_bs' parameters (got {values.upload_bs}, wanted 1 to {_MOST_KIB})")
    repository = _repository(values.upload)
    settings = replace(
        Settings(),
        credentials_path=Path(values.cred_file_path).absolute() if values.cred_file_path else None,
        tls_client_cert=Path(values.tls_cert_path) if values.tls_cert_path else None,
        tls_client_key=Path(values.tls_key_path) if values.tls_key_path else None,
    )
    plain = frozenset({repository.host}) if repository.plain_http else frozenset[str]()
    with (
        closing(open_client(settings, plain_http_hosts=plain)) as client,
        client.push_stream(repository, chunk=values.upload_bs << 10) as upload,
        new_file(path, force=getattr(values, "f", True)) as file,
    ):
        with replace(packing, rewrite_header=False).around(_Both(file, upload)) as sink:
            commit(source, sink, **names)
        return upload.close()[0]


def _repository(url: str) -> Repository:
    path = urlsplit(url).path.rstrip("/")
    if not path.endswith(f"/blobs/{_UPLOADS}"):
        raise FormatError("not a registry's URL of uploads", blob=url, wanted="https://HOST/v2/NAME/blobs/uploads")
    return Repository.from_blob_url(url.rstrip("/").removesuffix(f"/{_UPLOADS}"))


class _Both:
    def __init__(self, file: Sink, upload: Sink) -> None:
        self._sinks = (file, upload)

    def write(self, data: Buffer, /) -> int:
        for sink in self._sinks:
            sink.write(data)
        return len(data)
