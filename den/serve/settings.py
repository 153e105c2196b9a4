"""Settings of den serve."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from den.support.limits import Range, check_ranges


@dataclass(frozen=True)
class Limits:
    """Bounds of what one replica takes."""

    batch: Annotated[int, Range(1, 65_536)] = 64
    """Images, of all tasks together, that are computed at once at most."""
    wait_ms: Annotated[float, Range(0, 10_000)] = 0.0
    """Milliseconds that a batch waits for more images; 0: what has come while the last one was computed is the next."""
    queue: Annotated[int, Range(1, 1_000_000)] = 256
    """Requests that a replica holds at most (read, waiting, computed); beyond them the answer is 503."""
    seconds: Annotated[float, Range(0, 86_400, open_low=True)] = 30.0
    """Time for a request, from its first byte to its answer; beyond it the answer is 504 (408 while it is sent)."""
    body_mb: Annotated[float, Range(0, 1_024, open_low=True)] = 16.0
    """Size of a body, in millions of bytes; beyond it the answer is 413."""
    megapixels: Annotated[float, Range(0, 1_000, open_low=True)] = 50.0
    """Size of a picture, in millions of pixels; beyond it the answer is 413, before they are decoded."""


@dataclass(frozen=True)
class Serve:
    """Answer pictures over HTTP with a trained network, on Ray Serve (extra: serve)."""

    network: tyro.conf.Positional[Path]
    """Folder of a run (den train), or of an engine (Engine.save_pretrained with kept=...)."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: on all of the machine's."""
    port: Annotated[int, Range(1, 65_535)] = 8000
    """Port to listen on."""
    replicas: Annotated[int, Range(1, 10_000)] = 1
    """Processes that compute, over all machines of the cluster."""
    threads: Annotated[int, Range(0, 1_024)] = 0
    """Cores that a replica computes on; 0: the machine's cores, shared by the replicas."""
    proxy: Literal["auto", "haproxy", "ray"] = "auto"
    """What takes the connections: the HAProxy that comes with Ray Serve, or Ray Serve's own proxy, which spends more on
    a request.  auto: HAProxy where it is installed.  A cluster (--ray-address) has chosen before."""
    ray_address: str | None = None
    """Ray cluster to run on, such as auto or ray://HOST:10001; None: Ray is started on this machine alone."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits()
    """Bounds of a replica."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of a run's checkpoints: the last one, or the best on held-out images."""
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU.  Or cpu, cuda, cuda:N."""

    def check(self) -> None:
        """Raise ValueError where a value is out of its range."""
        check_ranges(self.limits, "serve")
        check_ranges(self, "serve")
        if self.proxy == "haproxy" and self.ray_address is not None:
            raise ValueError(
                "serve: proxy must be auto or ray with a ray_address (start that cluster's Ray with"
                " RAY_SERVE_ENABLE_HA_PROXY=1), got haproxy"
            )
