#!/usr/bin/env python3
"""Loads `den serve` on this machine's loopback, and compares its answers with the offline ones.

    scripts/serve_load.py RUN [--clients 64] [--seconds 60] [--rounds 3] [--proxy haproxy] [--write]

RUN is a run of digits and fashion, such as den demo leaves in runs/demo/den.  Clients send one picture after the
other, of either task, to a server that batches and to one that computes picture by picture (--batch 1), in turns; every
answer is compared with that of `den.load`.  At last the server is sent SIGTERM under load: what it has accepted it must
answer.
--write puts the table into docs/results/serve-load.md.
"""

import argparse
import asyncio
import contextlib
import io
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

import aiohttp
from PIL import Image

import den
from den.data import load_set
from den.support.tables import markdown_table, write_section

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # at the end: an installed den stays the one that is measured

from benchmarks.floors import processor_name  # noqa: E402

PAGE = ROOT / "docs/results/serve-load.md"
CLOSE = 1e-4  # of probabilities, which other batches round otherwise


@dataclass(frozen=True)
class Sent:
    """A picture, and the offline answer."""

    task: str
    body: bytes
    wanted: den.Prediction


@dataclass
class Seen:
    """Answers that clients saw, and what else came."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # seconds, of the answers
    wrong: int = 0
    others: Counter[str] = field(default_factory=Counter)  # what came instead of an answer
    lost: int = 0  # requests that were sent and neither answered nor refused
    batches: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    def milliseconds(self, share: float) -> float:
        """Quantile of the latencies."""
        return 1e3 * sorted(self.latencies)[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


def pictures(run: Path, count: int) -> list[Sent]:
    """Test pictures of both tasks in turns, as PNG files, with the offline answers."""
    network, found = den.load(run, device="cpu"), []
    for name in network.tasks:
        images = [
            Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
            for image in load_set(name, "test").images[:count]
        ]
        for image, wanted in zip(images, network.predict(images, name), strict=True):
            file = io.BytesIO()
            image.save(file, "PNG")
            found.append(Sent(name, file.getvalue(), wanted))
    return [found[start + k] for k in range(count) for start in range(0, len(found), count)]


@contextlib.contextmanager
def server(run: Path, port: int, batch: int, proxy: str) -> Iterator[subprocess.Popen[str]]:
    """`den serve` in a process of its own, ready."""
    options = ["--port", str(port), "--batch", str(batch), "--proxy", proxy]
    command = [sys.executable, "-m", "den", "serve", str(run), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "http://" in line:
                break
        else:
            raise SystemExit(f"{' '.join(command)} ended with {process.wait()}")
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(120)


async def client(session: aiohttp.ClientSession, sent: Sequence[Sent], first: int, end: float, seen: Seen) -> None:
    """Send one picture after the other until `end`, or until the server takes no more."""
    k = first
    while time.perf_counter() < end:
        each, k = sent[k % len(sent)], k + 1
        began = time.perf_counter()
        try:
            async with session.post(
                f"/predict/{each.task}", data=each.body, headers={"Content-Type": "image/png"}
            ) as r:
                reply = await r.json(content_type=None)
        except aiohttp.ClientConnectorError:
            seen.others["no connection"] += 1
            return
        except (aiohttp.ClientError, ValueError) as why:
            seen.others[type(why).__name__] += 1
            seen.lost += 1
            return
        if r.status != 200:
            seen.others[str(r.status)] += 1
            if r.status == 503:
                return
            continue
        seen.latencies.append(time.perf_counter() - began)
        seen.batches.append(reply["batch"])
        seen.wrong += not alike(reply["predictions"], each.wanted)


def alike(found: Sequence[dict], wanted: den.Prediction) -> bool:
    """Return True where an answer is the offline one."""
    [got] = found
    same = (got["task"], got["label"], tuple(got["levels"])) == (wanted.task, wanted.label, wanted.levels)
    return same and abs(got["confidence"] - wanted.confidence) < CLOSE


def load(address: str, sent: Sequence[Sent], clients: int, seconds: float) -> Seen:
    """Send requests from so many clients for so many seconds; returns what they saw."""

    async def run() -> Seen:
        seen, began = Seen(), time.perf_counter()
        connector, timeout = aiohttp.TCPConnector(limit=clients), aiohttp.ClientTimeout(120)
        async with aiohttp.ClientSession(address, connector=connector, timeout=timeout) as session:
            end = began + seconds
            await asyncio.gather(*(client(session, sent, 7 * k, end, seen) for k in range(clients)))
        seen.seconds = time.perf_counter() - began
        return seen

    return asyncio.run(run())


def saved(address: str) -> float:
    """Share of the FLOPs that the server says it has saved."""

    async def run() -> str:
        async with aiohttp.ClientSession() as session, session.get(f"{address}/metrics") as reply:
            return await reply.text()

    time.sleep(1.5)  # replicas report now and then
    [value] = re.findall(r"^den_flops_saved_ratio\{.*\} (\S+)$", asyncio.run(run()), re.MULTILINE)
    return float(value)


def ended(run: Path, sent: Sequence[Sent], port: int, clients: int, proxy: str) -> tuple[Seen, int]:
    """Tell a server to end under load; returns what the clients saw, and its exit status."""
    with server(run, port, 64, proxy) as process:

        async def both() -> Seen:
            async def tell() -> None:
                await asyncio.sleep(5)
                process.send_signal(signal.SIGTERM)

            telling = asyncio.create_task(tell())
            seen = await asyncio.to_thread(load, f"http://127.0.0.1:{port}", sent, clients, 60.0)
            await telling
            return seen

        seen = asyncio.run(both())
        return seen, process.wait(120)


def table(results: dict[int, list[Seen]]) -> str:
    """A row for each kind of server: medians of its rounds."""
    rows = []
    for batch, rounds in results.items():
        median = lambda measure, own=rounds: statistics.median(map(measure, own))  # noqa: E731
        rows.append(
            [
                f"batches of at most {batch}", f"{median(lambda s: s.rate):,.0f}",
                f"{median(lambda s: statistics.mean(s.batches)):.1f}",
                *(f"{median(lambda s, q=q: s.milliseconds(q)):.0f}" for q in (0.5, 0.9, 0.99)),
                f"{sum(len(s.latencies) for s in rounds):,}", str(sum(s.wrong for s in rounds)),
                str(sum(sum(s.others.values()) for s in rounds)),
            ]
        )  # fmt: skip
    head = (
        "server", "answers/s", "mean batch", "p50 ms", "p90 ms", "p99 ms", "answers", "unlike offline", "not answered",
    )  # fmt: skip
    return markdown_table(head, rows)


def main() -> None:
    """Measure, print, and write the page where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--proxy", choices=("haproxy", "ray"), default="haproxy")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    sent, address = pictures(options.run, 200), f"http://127.0.0.1:{options.port}"
    results: dict[int, list[Seen]] = {64: [], 1: []}
    shares = []
    for _ in range(options.rounds):
        for batch, own in results.items():
            with server(options.run, options.port, batch, options.proxy):
                load(address, sent, options.clients, 3.0)
                own.append(load(address, sent, options.clients, options.seconds))
                shares.append(saved(address))
            print(f"at most {batch}: {own[-1].rate:,.0f} answers/s, {dict(own[-1].others)}", flush=True)
    at_end, status = ended(options.run, sent, options.port, options.clients, options.proxy)
    ratios = [many.rate / one.rate for many, one in zip(results[64], results[1], strict=True)]
    lines = [
        table(results), "",
        f"Batches against picture by picture: {statistics.median(ratios):.2f} times the answers (median of"
        f" {len(ratios)} pairs of {options.seconds:g} s: {', '.join(f'{r:.2f}' for r in ratios)}; aim: 3)."
        f" FLOPs saved: {statistics.median(shares):.0%}.", "",
        f"SIGTERM under load: {len(at_end.latencies):,} requests were answered, {at_end.lost} lost, {at_end.wrong}"
        f" unlike offline; then {dict(at_end.others)}; exit status {status}.", "",
        f"{options.clients} clients and {options.proxy} on the same machine, {processor_name()}, {os.cpu_count()} cores"
        f" shared with other work; python {platform.python_version()}, torch {version('torch')}, ray {version('ray')};"
        f" {date.today()}.",
    ]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    if options.write:
        write_section(PAGE, "load", text)


if __name__ == "__main__":
    main()
