"""Measure whether the preparation of targets is hidden behind the training step.

`python -m benchmarks.overlap [--rounds 3] [--json FILE]`. Teacher processes serve the real application on loopback,
with two real tokenizers (Gemma and SmolLM2, written by `tutelage demo --prepare`) and prepared rows, K = 64. Instead of
computing, a teacher sleeps: a fixed time per request, one after the other, plus a fixed latency. Everything between
teachers and student is real: windows, tokenization, HTTP, decoding, byte chains, fusion, labels.

The student's step builds the labels and then sleeps, like a process that waits for its accelerator. Its time without
other work is measured after each run on the same examples. `ratio` is the step time divided by the longer of student
time and time of the slowest teacher: 1 means that the targets cost no time. `control` is the elapsed time of one CPU
second in another process: 1 on an idle machine. CPU times include all threads.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import httpx
import numpy as np
import uvloop
from numpy.typing import NDArray

from alignment import Vocabulary
from benchmarks.processes import server_process
from teachers.protocol.rows import Rows
from teachers.server.process import TeacherServer, listen_on, serve
from teachers.server.service import Service
from tests.serve import FormulaEngine
from trainer.config import RunConfig
from trainer.fusion.run_fuser import Fuser
from trainer.losses.labels import labels_from
from trainer.paths import resolve_model_dir
from trainer.query.stream import ExampleStream
from trainer.records import Batch, Sample
from trainer.sources.windows import cut_windows
from trainer.telemetry.collector import Collector
from trainer.tokenization import SampleTokenizer

STUDENT = "smollm2-135m-instruct"
MODELS = ("gemma-3-270m", STUDENT, "gemma-3-270m")
TOP_K, WINDOW_TOKENS, BATCH_SAMPLES, PREFETCH_BATCHES = 64, 256, 8, 4
STEP_S, LATENCY_S, CONTROL_S, CONTROL_STEPS = 0.25, 0.2, 0.05, 300_000
WARM_UP_STEPS, STEPS = 6, 16
SPEEDS = (4.0, 2.0, 1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Case:
    """Speeds of the teachers relative to the student. The name has their number and the lowest speed."""

    speeds: tuple[float, ...]

    @property
    def teacher_s(self) -> float:
        """Seconds that the slowest teacher takes for one batch."""
        return STEP_S / min(self.speeds)

    @property
    def name(self) -> str:
        return f"{len(self.speeds)}_at_{min(self.speeds):g}x"


CASES = [Case((speed,)) for speed in SPEEDS] + [Case((speed, 2 * speed, 4 * speed)) for speed in SPEEDS]


@dataclass(frozen=True)
class Figures:
    """Means over the steps of a run. `ratio` is step_s / max(student_s, teacher_s)."""

    ratio: float
    step_s: float
    student_s: float
    teacher_s: float
    wait_s: float
    slowest_teacher_wait_s: float
    other_teachers_wait_s: float
    tokenize_s: float
    align_s: float
    fuse_s: float
    process_cpu_s: float
    queued_batches: float
    control: float


def windows_of(vocabulary: Vocabulary) -> list[str]:
    """Return windows of CPython's documentation that all have WINDOW_TOKENS tokens of the student."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = cut_windows(text, vocabulary, WINDOW_TOKENS)
    return [window for window in cut if len(vocabulary.encode(window)) == WINDOW_TOKENS]


class PacedEngine(FormulaEngine):
    """Return prepared rows of the windows. Requests take `window_s` one after the other, plus LATENCY_S."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, max_tokens=2048)
        self.window_s = 0.0
        self._free_at = 0.0
        vocabulary = Vocabulary.load(folder)
        texts = [vocabulary.encode(w).ids for w in windows_of(Vocabulary.load(resolve_model_dir(STUDENT)))]
        sequences = [np.concatenate([self.card.prefix, ids]).astype(np.int64) for ids in texts]
        counts = np.bincount(np.concatenate(sequences), minlength=self.card.vocab_size)
        frequent = np.argsort(-counts)[: int((counts > 0).sum())]
        rng = np.random.default_rng(0)
        self._rows = {ids.tobytes(): prepared_rows(ids, frequent, rng) for ids in sequences}

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        loop = asyncio.get_running_loop()
        self._free_at = max(self._free_at, loop.time()) + self.window_s
        await asyncio.sleep(self._free_at + LATENCY_S - loop.time())
        return self._rows[np.array(sequence, dtype=np.int64).tobytes()]


def prepared_rows(sequence: NDArray[np.int64], frequent: NDArray[np.int64], rng: np.random.Generator) -> Rows:
    """Return rows with Zipf's law over frequent ids, with a random exponent per row.

    The rank of the actual token is drawn from the law of its row. A rank below K replaces the candidate of that rank.
    """
    num_rows = len(sequence) - 1
    exponents_S1 = rng.uniform(0.8, 3.0, (num_rows, 1))
    weights_SV = np.arange(1, len(frequent) + 1) ** -exponents_S1
    logprobs_SV = np.log(weights_SV / weights_SV.sum(axis=1, keepdims=True))
    below_SV = np.exp(logprobs_SV).cumsum(axis=1)
    rank_S = (below_SV < rng.random((num_rows, 1)) * below_SV[:, -1:]).sum(axis=1)
    rank_SK = (rng.geometric(0.01, (num_rows, 1)) + np.arange(TOP_K + 1) * 7) % len(frequent)
    ids_SK = frequent[rank_SK]
    is_actual = ids_SK[:, :TOP_K] == sequence[1:, None]
    ids_SK = np.where(is_actual, ids_SK[:, TOP_K:], ids_SK[:, :TOP_K])
    listed = rank_S < TOP_K
    ids_SK[np.flatnonzero(listed), rank_S[listed]] = sequence[1:][listed]
    listed_SK = logprobs_SV[:, :TOP_K]
    return Rows(
        start=1,
        ids=ids_SK.astype(np.uint32),
        logprobs=listed_SK.astype(np.float32),
        actual=logprobs_SV[np.arange(num_rows), rank_S].astype(np.float32),
        tail=np.maximum(1 - np.exp(listed_SK).sum(axis=1), 0).astype(np.float32),
    )


def run_teacher(model: str, port: int) -> None:
    """Serve like `tutelage serve`, with a route that sets the time per window."""
    engine = PacedEngine(resolve_model_dir(model))
    service = Service(engine)
    server = TeacherServer(service)

    async def set_window_s(window_s: float) -> None:
        engine.window_s = window_s

    app: Any = server.config.app
    app.post("/window_s/{window_s}")(set_window_s)
    uvloop.run(serve(service, listen_on("127.0.0.1", port), server))


def config_of(urls: Sequence[str]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "student": {"model": STUDENT},
            "data": {"sources": [{"files": ["windows"]}], "window_tokens": WINDOW_TOKENS},
            "teachers": [{"name": f"t{n}", "urls": [url], "top_k": TOP_K} for n, url in enumerate(urls)],
            "train": {
                "batch_samples": BATCH_SAMPLES,
                "prefetch_tokens": PREFETCH_BATCHES * BATCH_SAMPLES * WINDOW_TOKENS,
            },
            "output": {"dir": "unused"},
        }
    )


def student_step(batch: Batch) -> None:
    """Build the labels like trainer/training/step.py, then sleep for the time of an accelerator."""
    columns = [example.labels(1) for example in batch.examples]
    labels_from([tokens for tokens, _ in columns], [target for _, target in columns])
    time.sleep(STEP_S)


def run_control(spent: Any) -> None:
    """Compute a short sum repeatedly. Adds its CPU seconds to `spent[0]` and its elapsed seconds to `spent[1]`."""
    while True:
        time.sleep(CONTROL_S)
        cpu, began = time.thread_time(), time.monotonic()
        sum(range(CONTROL_STEPS))
        spent[0] += time.thread_time() - cpu
        spent[1] += time.monotonic() - began


@contextmanager
def control() -> Iterator[Any]:
    """Run a process that needs a tenth of one core. Yields its CPU seconds and its elapsed seconds."""
    context = multiprocessing.get_context("spawn")
    spent = context.Array("d", 2)
    process = context.Process(target=run_control, args=(spent,), daemon=True)
    process.start()
    try:
        yield spent
    finally:
        process.terminate()
        process.join()


def measure(case: Case, urls: Sequence[str], samples: Sequence[Sample], spent: Any) -> Figures:
    """Measure one run."""
    vocabulary = Vocabulary.load(resolve_model_dir(STUDENT))
    used = urls[: len(case.speeds)]
    for url, speed in zip(used, case.speeds, strict=True):
        httpx.post(f"{url}/window_s/{STEP_S / BATCH_SAMPLES / speed}", trust_env=False).raise_for_status()
    config = config_of(used)
    batches = [samples[i : i + BATCH_SAMPLES] for i in range(0, len(samples), BATCH_SAMPLES)]
    items: list[tuple[Batch, Collector]] = []
    fuser = Fuser(config, len(vocabulary))
    with ExampleStream(config, SampleTokenizer(vocabulary, vocabulary.prefix), batches, fuser=fuser) as stream:
        iterator = iter(stream)
        for _ in range(WARM_UP_STEPS):
            student_step(next(iterator)[0])
        cpu, began, before = time.process_time(), time.monotonic(), spent[:]
        for _ in range(STEPS):
            items.append(next(iterator))
            student_step(items[-1][0])
        step_s = (time.monotonic() - began) / STEPS
        cpu = time.process_time() - cpu
        control = (spent[1] - before[1]) / (spent[0] - before[0])
    began = time.monotonic()
    for batch, _ in items[:4]:
        student_step(batch)
    student_s = (time.monotonic() - began) / 4
    slowest = f"t{min(range(len(case.speeds)), key=lambda n: case.speeds[n])}"
    seen = [telemetry for _, telemetry in items]
    others = [f"t{n}" for n in range(len(case.speeds)) if f"t{n}" != slowest]

    def mean(values: Iterator[float]) -> float:
        return sum(values) / STEPS

    return Figures(
        ratio=step_s / max(student_s, case.teacher_s),
        step_s=step_s,
        student_s=student_s,
        teacher_s=case.teacher_s,
        wait_s=mean(b.wait_s for b in seen),
        slowest_teacher_wait_s=mean(b.teacher(slowest).wait_s for b in seen),
        other_teachers_wait_s=mean(b.teacher(name).wait_s for b in seen for name in others),
        tokenize_s=mean(b.seconds["tokenize"] for b in seen),
        align_s=mean(b.seconds["align"] for b in seen),
        fuse_s=mean(b.seconds["fuse"] for b in seen),
        process_cpu_s=cpu / STEPS,
        queued_batches=mean(b.queued_batches for b in seen),
        control=control,
    )


def medians(rounds: Sequence[Figures]) -> Figures:
    return Figures(*(statistics.median(getattr(one, f.name) for one in rounds) for f in fields(Figures)))


def table(figures: dict[str, Figures]) -> str:
    """Format one line per case. Times are milliseconds per step."""
    titles = {f.name: f.name.removesuffix("_s").replace("_", " ") for f in fields(Figures)}
    lines = [" ".join([f"{'ms of a step':<18}", *(f"{title:>9.9}" for title in titles.values())])]
    for name, one in figures.items():
        cells = []
        for field in titles:
            value = getattr(one, field)
            cells.append(f"{1e3 * value:>9.1f}" if field.endswith("_s") else f"{value:>9.3f}")
        lines.append(" ".join([f"{name:<18}", *cells]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="the medians over the rounds are shown")
    parser.add_argument("--json", type=Path, help="write {name: number} to this file")
    arguments = parser.parse_args()
    vocabulary = Vocabulary.load(resolve_model_dir(STUDENT))
    windows = windows_of(vocabulary)[: (WARM_UP_STEPS + STEPS) * BATCH_SAMPLES]
    samples = [Sample(i, f"window {i}", text) for i, text in enumerate(windows)]
    figures: dict[str, Figures] = {}
    with ExitStack() as stack:
        spent = stack.enter_context(control())
        urls = [stack.enter_context(server_process(run_teacher, model)) for model in MODELS]
        for case in CASES:
            figures[case.name] = medians([measure(case, urls, samples, spent) for _ in range(arguments.rounds)])
    sys.stdout.write(table(figures))
    sys.stdout.write(f"load average of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    if arguments.json:
        flat = {f"overlap_{n}_{f.name}": round(getattr(o, f.name), 4) for n, o in figures.items() for f in fields(o)}
        arguments.json.write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
