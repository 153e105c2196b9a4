"""The service on Ray Serve: replicas over a cluster, one address, an end that loses nothing."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from den.serve.app import Service, create_app
from den.serve.board import PERIOD, Board
from den.serve.network import open_network
from den.serve.settings import Serve

APPLICATION = "den"
QUIET = {"enable_access_log": False, "log_level": "WARNING"}
OTHERS = 64  # requests for the page, metrics and health, and those that are sent away, beside those that are held


@dataclass(frozen=True, eq=False)
class Deployed:
    """A service that runs."""

    board: Any

    def end(self, seconds: float) -> None:
        """Take no more requests, wait until all are answered (at most so long), and end the replicas."""
        stop = time.monotonic() + seconds
        with contextlib.suppress(RayError):  # the board is gone: replicas end without being told before
            ray.get(self.board.end.remote())
            while not ray.get(self.board.idle.remote()) and time.monotonic() < stop:
                time.sleep(PERIOD / 5)
        with contextlib.suppress(RayError):  # Ray is gone, and with it the service
            serve.delete(APPLICATION)
            ray.kill(self.board)
        ray.shutdown()  # of a Ray of its own this ends everything, of a cluster the connection


def deploy(command: Serve) -> Deployed:
    """Start the service, on a cluster or on a Ray of its own; returns when it answers.

    Raises OSError where Ray or the service does not start.
    """
    cores = os.cpu_count() or 1
    threads = command.threads or max(1, cores // command.replicas)
    _start_ray(command.ray_address, max(cores, threads * command.replicas))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Board).remote()
    limits = command.limits
    deployment = serve.deployment(
        serve.ingress(_builder(command, threads, board))(),
        name="network",
        num_replicas=command.replicas,
        max_ongoing_requests=2 * limits.queue + OTHERS,
        max_queued_requests=limits.queue,
        ray_actor_options={"num_cpus": threads, "num_gpus": int(_on_gpu(command.device))},
        graceful_shutdown_timeout_s=limits.seconds + 5,
        graceful_shutdown_wait_loop_s=PERIOD,
        logging_config=QUIET,
    )
    address = {"host": command.host, "port": command.port}
    try:
        serve.start(proxy_location="EveryNode", http_options=address, logging_config=QUIET)
        serve.run(deployment.bind(), name=APPLICATION, route_prefix="/")
    except (RuntimeError, RayError) as why:
        ray.shutdown()
        raise OSError(f"serve: the service did not start: {why}") from why
    return Deployed(board)


def _start_ray(address: str | None, cores: int) -> None:
    """Find the cluster, or start Ray on this machine with so many cores to give away; OSError where that fails."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    local = {} if address else {"num_cpus": cores, "include_dashboard": False}
    try:
        ray.init(address or "local", logging_level="ERROR", **local)
    except Exception as why:  # a bare Exception where the machine is too busy, ConnectionError where no cluster is
        raise OSError(f"serve: Ray must be there at {address or 'this machine'}, got {why}") from why


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _builder(command: Serve, threads: int, board: Any) -> Callable[[], Any]:
    """A function that builds the application in a replica."""
    folder = command.network.resolve()  # processes of Ray run elsewhere

    def build() -> Any:
        torch.set_num_threads(threads)
        network = open_network(folder, checkpoint=command.checkpoint, device=command.device, batch=command.limits.batch)
        name = serve.get_replica_context().replica_id.unique_id

        async def text(service: Service) -> str:
            try:
                return await board.text.remote()
            except RayError:  # the board went with the process that started the service
                return service.metrics.text()

        async def report(service: Service) -> None:
            """Tell the board, now and then, what this replica does."""
            while True:
                with contextlib.suppress(RayError):
                    service.ending = await board.report.remote(name, service.metrics.text(), service.held)
                await asyncio.sleep(PERIOD)

        return create_app(network, command.limits, metrics_text=text, beside=report)

    return build
