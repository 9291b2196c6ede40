"""What a kubelet asks of a container runtime (CRI, runtime.v1), for pods in the host's network."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from obdlab.containerd.services import make_stub
from tests.containerd._pb import runtime_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_TIMEOUT_S = 120.0
_HOST_NETWORK = pb.NamespaceOption(network=pb.NODE)


@dataclass(frozen=True)
class Pod:
    """A running sandbox."""

    sandbox_id: str
    config: pb.PodSandboxConfig


class Kubelet:
    """A client of containerd's CRI plugin."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(f"unix:{address}", options=[("grpc.default_authority", "localhost")])
        self.runtime = make_stub(self._channel, pb.DESCRIPTOR, "RuntimeService")
        self.images = make_stub(self._channel, pb.DESCRIPTOR, "ImageService")

    def close(self) -> None:
        self._channel.close()

    def pull(self, image: str) -> str:
        """Pull an image for pods; return its ID."""
        request = pb.PullImageRequest(image=pb.ImageSpec(image=image))
        return self.images.PullImage(request, timeout=_TIMEOUT_S, wait_for_ready=True).image_ref

    def remove_image(self, image: str) -> None:
        self.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=image)), timeout=_TIMEOUT_S)

    @contextmanager
    def pod(self, name: str, logs: Path) -> Iterator[Pod]:
        """Run a pod, and remove it with all its containers at the end."""
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="default"),
            log_directory=str(logs),
            linux=pb.LinuxPodSandboxConfig(
                security_context=pb.LinuxSandboxSecurityContext(namespace_options=_HOST_NETWORK)
            ),
        )
        sandbox_id = self.runtime.RunPodSandbox(
            pb.RunPodSandboxRequest(config=config), timeout=_TIMEOUT_S, wait_for_ready=True
        ).pod_sandbox_id
        try:
            yield Pod(sandbox_id, config)
        finally:
            self.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox_id), timeout=_TIMEOUT_S)
            self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox_id), timeout=_TIMEOUT_S)

    def start(self, pod: Pod, image: str, name: str, command: Sequence[str]) -> str:
        """Create and start a container of the pod; return its ID. Its output goes to NAME.log."""
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=image),
            command=command,
            log_path=f"{name}.log",
            linux=pb.LinuxContainerConfig(
                security_context=pb.LinuxContainerSecurityContext(namespace_options=_HOST_NETWORK)
            ),
        )
        container_id = self.runtime.CreateContainer(
            pb.CreateContainerRequest(pod_sandbox_id=pod.sandbox_id, config=config, sandbox_config=pod.config),
            timeout=_TIMEOUT_S,
        ).container_id
        self.runtime.StartContainer(pb.StartContainerRequest(container_id=container_id), timeout=_TIMEOUT_S)
        return container_id

    def execute(self, container_id: str, *command: str) -> str:
        """Run a command in a container, as probes do; return its output."""
        request = pb.ExecSyncRequest(container_id=container_id, cmd=command, timeout=int(_TIMEOUT_S))
        answer = self.runtime.ExecSync(request, timeout=_TIMEOUT_S)
        assert answer.exit_code == 0, answer.stderr
        return answer.stdout.decode()

    def stop(self, container_id: str) -> None:
        """Kill a container and remove it."""
        self.runtime.StopContainer(pb.StopContainerRequest(container_id=container_id), timeout=_TIMEOUT_S)
        self.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container_id), timeout=_TIMEOUT_S)
