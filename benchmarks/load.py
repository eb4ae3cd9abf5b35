"""Load of one teacher process: many concurrent clients for minutes, and the cost of the server alone.

`python -m benchmarks.load [--seconds 300] [--clients 64] [--json FILE]` serves windows of 512 tokens at K = 64 with
prepared rows (no model: everything around it is measured). Each client has its own connection and requests one window
after the other. Every response is checked and compared with the prepared rows.

Server and clients are one process each. If both share two cores, the clients' decoding limits the throughput; the cost
of the server is its CPU seconds, which /metrics contains, like its memory. Latencies are those of a closed loop: N
clients that never pause always wait for N responses.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from argparse import ArgumentParser
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import uvloop
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import server_process
from teachers.client.dialects.native import NativeClient
from teachers.client.http import Transport
from teachers.protocol.errors import TeacherError
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows
from teachers.server.process import TeacherServer, listen_on, serve
from teachers.server.service import Service

VOCAB_SIZE, WINDOW_TOKENS, NUM_WINDOWS, TOP_K = 49_152, 512, 32, 64
WARM_UP_S = 10.0
# Preparing the rows leaves 75 freed megabytes resident in glibc, which hides leaks: one of 40 MB showed as 0.1. With
# fixed thresholds, well above the 200 kB of a response, freed memory is returned, and a leak of 4.0 MB shows as 4.5.
# They cost CPU time, 2.6 µs per token instead of 2.2 (three pairs of short runs), so the cost in the table is an upper
# bound.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
CARD = TeacherCard(
    model="prepared", fingerprint="0" * 64, engine="prepared", dtype="float32", vocab_size=VOCAB_SIZE,
    tokenizer_sha256="0" * 64, bos_id=None, eos_id=None, expects_bos=False, max_tokens=WINDOW_TOKENS, max_top_k=TOP_K,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Window:
    """One sequence and its rows."""

    sequence: list[int]
    rows: Rows


def prepare() -> list[Window]:
    """Return windows with realistic rows: Zipf's law at every position, with exponents from 0.8 to 3.

    The first id of a window is its number; every other id is sampled from its own row.
    """
    rng = np.random.default_rng(0)
    weights_LV = np.arange(1, VOCAB_SIZE + 1) ** -np.linspace(0.8, 3.0, 64)[:, None]
    probs_LV = weights_LV / weights_LV.sum(axis=1, keepdims=True)
    return [_window(number, np.log(probs_LV), rng) for number in range(NUM_WINDOWS)]


def _window(number: int, logprobs_LV: NDArray[np.float64], rng: np.random.Generator) -> Window:
    law_S = rng.integers(0, len(logprobs_LV), WINDOW_TOKENS - 1)
    below_LV = np.exp(logprobs_LV).cumsum(axis=1)
    rank_S = np.array([np.searchsorted(below_LV[law], rng.random() * below_LV[law, -1]) for law in law_S])
    first_S1 = rng.integers(0, VOCAB_SIZE, (len(law_S), 1))

    def ids(ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        return (first_S1 + ranks * 7_919) % VOCAB_SIZE  # a prime that does not divide VOCAB_SIZE: distinct ids

    listed_SK = logprobs_LV[law_S, :TOP_K]
    rows = Rows(
        start=1,
        ids=ids(np.arange(TOP_K)[None]).astype(np.uint32),
        logprobs=listed_SK.astype(np.float32),
        actual=logprobs_LV[law_S, rank_S].astype(np.float32),
        tail=(1 - np.exp(listed_SK).sum(axis=1)).astype(np.float32),
    )
    return Window([number, *ids(rank_S[:, None])[:, 0].tolist()], rows)


class PreparedEngine:
    """An engine that returns prepared rows at once."""

    def __init__(self) -> None:
        self.card = CARD
        self.tokenizer_files: dict[str, bytes] = {}
        self._windows = prepare()

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        return self._windows[sequence[0]].rows

    async def check(self) -> None:
        return None

    def close(self) -> None:
        return None


def run_server(port: int) -> None:
    """Serve like `tutelage serve`."""
    service = Service(PreparedEngine())
    uvloop.run(serve(service, listen_on("127.0.0.1", port), TeacherServer(service)))


@dataclass
class Tally:
    """Results of the clients since the warm-up; latencies in seconds."""

    latencies: list[float] = field(default_factory=list)
    num_bytes: int = 0
    errors: int = 0


@dataclass(frozen=True)
class Probe:
    """Values of the server's /metrics at one time."""

    at_s: float
    cpu_s: float
    rss_mb: float
    sent_mb: float


@dataclass(frozen=True)
class Figures:
    """The results. Costs are those of the server process."""

    clients: int
    seconds: float
    tokens_per_s: float
    mb_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int
    server_cores_used: float
    server_tokens_per_s_per_core: float
    server_us_per_token: float
    rss_mb_after_warm_up: float
    rss_mb_max: float
    rss_mb_at_end: float
    rss_mb_per_minute: float


async def probe(http: Transport) -> Probe:
    text = (await http.get("/metrics", 30.0, 1 << 20)).decode()
    values = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    return Probe(
        time.monotonic(),
        values["process_cpu_seconds_total"],
        values["process_resident_memory_bytes"] / 1e6,
        values["tutelage_sent_bytes_total"] / 1e6,
    )


async def one_client(url: str, number: int, windows: list[Window], tally: Tally, until: float) -> None:
    """Request one window after the other."""
    client = NativeClient(f"client-{number}", url)
    turn = number
    while time.monotonic() < until:
        turn += 1
        window = windows[turn % NUM_WINDOWS]
        began = time.monotonic()
        try:
            (rows,) = await client.score(ScoreRequest(sequences=[window.sequence], starts=[1], top_k=TOP_K), CARD, 60.0)
        except TeacherError as error:
            sys.stderr.write(f"{error}\n")
            tally.errors += 1
            continue
        tally.latencies.append(time.monotonic() - began)
        same = np.array_equal(rows.ids, window.rows.ids) and np.array_equal(rows.actual, window.rows.actual)
        tally.errors += not same
    await client.aclose()


async def watch(http: Transport, tally: Tally, until: float) -> list[Probe]:
    """Read the metrics once per second. Results before the end of the warm-up are discarded."""
    probes: list[Probe] = []
    warm = min(WARM_UP_S, (until - time.monotonic()) / 3)
    await asyncio.sleep(warm)
    tally.latencies.clear()
    while time.monotonic() < until:
        probes.append(await probe(http))
        await asyncio.sleep(1.0)
    probes.append(await probe(http))
    return probes


async def load(url: str, seconds: float, num_clients: int) -> Figures:
    http, tally = Transport("load", url), Tally()
    windows = prepare()
    until = time.monotonic() + seconds
    clients = [one_client(url, number, windows, tally, until) for number in range(num_clients)]
    watching = asyncio.create_task(watch(http, tally, until))
    await asyncio.gather(*clients)
    probes = await watching
    await http.aclose()
    return figures(tally, probes, num_clients)


def figures(tally: Tally, probes: list[Probe], num_clients: int) -> Figures:
    first, last = probes[0], probes[-1]
    seconds, cpu_s = last.at_s - first.at_s, last.cpu_s - first.cpu_s
    tokens = len(tally.latencies) * (WINDOW_TOKENS - 1)
    p50, p99 = np.quantile(tally.latencies, (0.5, 0.99)) * 1e3
    rss = [p.rss_mb for p in probes]
    slope = np.polyfit([p.at_s / 60 for p in probes], rss, 1)[0] if len(probes) > 2 else 0.0
    return Figures(
        clients=num_clients, seconds=seconds, tokens_per_s=tokens / seconds,
        mb_per_s=(last.sent_mb - first.sent_mb) / seconds, p50_ms=float(p50), p99_ms=float(p99), errors=tally.errors,
        server_cores_used=cpu_s / seconds, server_tokens_per_s_per_core=tokens / cpu_s,
        server_us_per_token=cpu_s / tokens * 1e6, rss_mb_after_warm_up=rss[0], rss_mb_max=max(rss),
        rss_mb_at_end=rss[-1], rss_mb_per_minute=float(slope),
    )  # fmt: skip


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write {name: number} here")
    options = parser.parse_args()
    os.environ.update(MALLOC)  # read when a process starts
    with server_process(run_server) as url:
        results = asdict(uvloop.run(load(url, options.seconds, options.clients)))
    for name, value in results.items():
        sys.stdout.write(f"{name:>30}  {value:,.3f}\n")
    sys.stdout.write(f"load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    if options.json:
        rounded = {name: round(value, 4) for name, value in results.items()}
        options.json.write_text(json.dumps(rounded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if results["errors"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
