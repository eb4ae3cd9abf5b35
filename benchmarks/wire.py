"""Cost of score responses: the native route in a vLLM server and the server's own route, K = 8, 64, 128.

`python -m benchmarks.wire [--json FILE]` starts a vLLM server with the plugin on SmolLM2-135M, and a second vLLM in
another process without HTTP. Every round requests the same 8 × 512 tokens from all of them, one after the other, in a
rotating order. The results are those of the best round, since other work on the machine only slows a round down (on
two shared cores, medians differed by a factor of three between runs).

- *native*: POST /v1/score, rows decoded and checked by `teachers.protocol.wire_format.read_stream`
- *stock*: POST /v1/completions with prompt_logprobs, parsed by msgspec, without conversion to rows, which favors it
- *flat*: vLLM's own flat logprobs in process;  *none*: the engine alone, without log-probabilities
- *decode*: tokens per second of one core for decoding a response
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import httpx
import msgspec

from alignment import Vocabulary
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.wire_format import read_stream
from tests.vllm_server import ENV, KEY, vllm_openai_server
from trainer.paths import resolve_model_dir

MODEL, TOP_KS, SEQUENCES, LENGTH, ROUNDS = "smollm2-135m-instruct", (8, 64, 128), 8, 512, 6
SCORED = SEQUENCES * (LENGTH - 1)
DECODE_ROUNDS = 20
HEADERS = {"authorization": f"Bearer {KEY}"}


def texts() -> list[list[int]]:
    """Return SEQUENCES pieces of CPython's documentation of LENGTH tokens."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = Vocabulary.load(resolve_model_dir(MODEL)).encode(text[: SEQUENCES * LENGTH * 8]).ids.tolist()
    return [ids[n * LENGTH : (n + 1) * LENGTH] for n in range(SEQUENCES)]


class Native:
    """The native route, one request for all sequences."""

    def __init__(self, http: httpx.Client, sequences: list[list[int]], top_k: int) -> None:
        self.http = http
        self.request = ScoreRequest(sequences=sequences, starts=[1] * len(sequences), top_k=top_k)
        self.card = TeacherCard.model_validate_json(http.get("/v1/teacher").raise_for_status().content)

    def fetch(self) -> bytes:
        headers = {"content-type": "application/json"}
        response = self.http.post("/v1/score", content=self.request.model_dump_json(), headers=headers)
        return response.raise_for_status().content

    def decode(self, body: bytes) -> None:
        rows = read_stream(body, self.request, self.card)
        assert sum(map(len, rows)) == SCORED


class VllmRoute:
    """The server's own route, one request for all sequences."""

    def __init__(self, http: httpx.Client, sequences: list[list[int]], top_k: int) -> None:
        self.http = http
        self.body = {
            "model": MODEL, "prompt": sequences, "max_tokens": 1, "temperature": 0, "prompt_logprobs": top_k
        }  # fmt: skip

    def fetch(self) -> bytes:
        return self.http.post("/v1/completions", json=self.body).raise_for_status().content

    def decode(self, body: bytes) -> None:
        choices = msgspec.json.decode(body)["choices"]
        assert sum(len(choice["prompt_logprobs"]) - 1 for choice in choices) == SCORED


class Reference:
    """vLLM without HTTP in another process: see benchmarks/vllm_in_process.py."""

    def __init__(self, process: "subprocess.Popen[str]", sequences: list[list[int]]) -> None:
        self._process, self._sequences = process, sequences
        self._line()

    def seconds(self, top_k: int | None) -> float:
        """Return the time for all sequences, with flat logprobs of this K or without any."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"sequences": self._sequences, "top_k": top_k}) + "\n")
        self._process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("benchmarks.vllm_in_process ended: run it alone to see the reason")
        return line


@contextmanager
def reference(sequences: list[list[int]]) -> Iterator[Reference]:
    command = [sys.executable, "-m", "benchmarks.vllm_in_process", str(resolve_model_dir(MODEL))]
    pipe, env = subprocess.PIPE, os.environ | ENV
    process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    try:
        yield Reference(process, sequences)
    finally:
        process.communicate("", timeout=60)  # the process ends when its input closes


def measure(http: httpx.Client, peer: Reference, sequences: list[list[int]], top_k: int) -> dict[str, float]:
    """Return all results of one K."""
    routes: dict[str, Native | VllmRoute] = {
        "native": Native(http, sequences, top_k), "stock": VllmRoute(http, sequences, top_k)
    }  # fmt: skip
    bodies = {name: route.fetch() for name, route in routes.items()}  # also a warm-up
    timers: dict[str, Callable[[], float]] = {name: _route_seconds(route) for name, route in routes.items()}
    timers |= {"flat": lambda: peer.seconds(top_k), "none": lambda: peer.seconds(None)}
    peer.seconds(top_k)
    rounds = [{name: timers[name]() for name in rotated(list(timers), n)} for n in range(ROUNDS)]
    best = {name: min(r[name] for r in rounds) for name in timers}
    figures = {f"{name}/tokens_per_s": SEQUENCES * LENGTH / seconds for name, seconds in best.items()}
    for name, route in routes.items():
        figures[f"{name}/bytes_per_token"] = len(bodies[name]) / SCORED
        figures[f"{name}/decode_tokens_per_s"] = SCORED / _decode_seconds(route, bodies[name])
    for other in ("stock", "flat", "none"):
        figures[f"native_over_{other}"] = best[other] / best["native"]
    return figures


def rotated(names: list[str], by: int) -> list[str]:
    """Rotate the order in every round: the threads of the previous engine still spin when the next one starts."""
    by %= len(names)
    return names[by:] + names[:by]


def _route_seconds(route: Native | VllmRoute) -> Callable[[], float]:
    def seconds() -> float:
        began = time.perf_counter()
        route.decode(route.fetch())
        return time.perf_counter() - began

    return seconds


def _decode_seconds(route: Native | VllmRoute, body: bytes) -> float:
    taken = []
    for _ in range(DECODE_ROUNDS):
        began = time.thread_time()
        route.decode(body)
        taken.append(time.thread_time() - began)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write {name: number} here")
    options = parser.parse_args()
    sequences = texts()
    figures: dict[str, float] = {}
    with (
        vllm_openai_server(resolve_model_dir(MODEL), max_top_k=max(TOP_KS), max_tokens=1023) as url,
        reference(sequences) as peer,
    ):
        with httpx.Client(base_url=url, headers=HEADERS, timeout=None) as http:
            for top_k in TOP_KS:
                results = measure(http, peer, sequences, top_k)
                figures |= {f"{top_k}/{name}": round(value, 3) for name, value in results.items()}
                sys.stdout.write(f"K = {top_k}\n")
                sys.stdout.writelines(f"  {name:28}{value:14,.2f}\n" for name, value in results.items())
                sys.stdout.flush()
    sys.stdout.write(f"load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
