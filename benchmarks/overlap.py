"""Are the targets free? Step time of a real pipeline beside the longer of student and slowest teacher.

`python -m benchmarks.overlap [--rounds 3] [--json FILE]`. The teachers are processes of their own that serve the real
application on loopback with two real tokenizers (Gemma's and SmolLM2's, made by `tutelage demo --prepare`) and rows at
K = 64 that were prepared: candidates by how often they stand in the text, Zipf's law at every position. An answer takes
its set share of the teacher's time, one after the other, and its set latency on top, asleep. Between teachers and
student everything is real: windows of text, tokenizing, HTTP, decoding, byte chains, fusion, labels.

The student's step makes the labels and then sleeps, as a process does that waits for its accelerator. What it takes
alone is measured after each run, on the same lessons and with nothing beside it. A teacher's time is the set one. So a
ratio of 1 means that the targets cost nothing. `control` is how long one CPU second takes meanwhile in a process that
needs few of them: 1 on a machine that nobody else uses. CPU times are seconds on threads beside the step.
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
from teachers.rows import Rows
from teachers.serving.process import TeacherServer, listen_on, serve
from teachers.serving.service import Service
from tests.serve import FormulaEngine
from trainer.config import RunConfig
from trainer.data.reading import Reader
from trainer.data.samples import Sample
from trainer.data.windows import cut_windows
from trainer.learning.labels import labels_from
from trainer.places import find_model
from trainer.targets.fuser import Fuser
from trainer.targets.pipeline import Batch, TargetStream, labels_of

STUDENT = "smollm2-135m-instruct"
MODELS = ("gemma-3-270m", STUDENT, "gemma-3-270m")
TOP_K, WINDOW_TOKENS, BATCH_SAMPLES, AHEAD_BATCHES = 64, 256, 8, 4
STEP_S, LATENCY_S, CONTROL_S, CONTROL_STEPS = 0.25, 0.2, 0.05, 300_000
WARM_UP_STEPS, STEPS = 6, 16
SPEEDS = (4.0, 2.0, 1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Case:
    """How fast each teacher is, relative to the student; called by their number and the slowest."""

    speeds: tuple[float, ...]

    @property
    def teacher_s(self) -> float:
        """What the slowest takes for one batch."""
        return STEP_S / min(self.speeds)

    @property
    def name(self) -> str:
        return f"{len(self.speeds)}_at_{min(self.speeds):g}x"


CASES = [Case((speed,)) for speed in SPEEDS] + [Case((speed, 2 * speed, 4 * speed)) for speed in SPEEDS]


@dataclass(frozen=True)
class Figures:
    """Seconds of one step, means over a run; the ratio is that of the step to what took longer by itself."""

    ratio: float
    step_s: float
    student_s: float
    teacher_s: float
    waited_s: float
    waited_on_slowest_s: float
    waited_on_others_s: float
    read_s: float
    align_s: float
    fuse_s: float
    process_cpu_s: float
    queued_batches: float
    control: float


def windows_of(vocabulary: Vocabulary) -> list[str]:
    """Pages of CPython's documentation, cut as a run cuts them; all of one length in the student's tokens."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = cut_windows(text, vocabulary, WINDOW_TOKENS)
    return [window for window in cut if len(vocabulary.encode(window)) == WINDOW_TOKENS]


class PacedEngine(FormulaEngine):
    """Knows the answers to the windows; gives each after its share of the teacher's time, in turn, and a latency."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, max_tokens=2048)
        self.window_s = 0.0
        self._free_at = 0.0
        vocabulary = Vocabulary.load(folder)
        texts = [vocabulary.encode(w).ids for w in windows_of(Vocabulary.load(find_model(STUDENT)))]
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
    """Zipf's law at every position, from nearly certain to nearly anything, over ids that are frequent; the actual
    token has a rank of its law, and takes the place of the candidate there."""
    num_rows = len(sequence) - 1
    exponents_S1 = rng.uniform(0.8, 3.0, (num_rows, 1))
    weights_SV = np.arange(1, len(frequent) + 1) ** -exponents_S1
    logprobs_SV = np.log(weights_SV / weights_SV.sum(axis=1, keepdims=True))
    below_SV = np.exp(logprobs_SV).cumsum(axis=1)
    rank_S = (below_SV < rng.random((num_rows, 1)) * below_SV[:, -1:]).sum(axis=1)
    place_SK = (rng.geometric(0.01, (num_rows, 1)) + np.arange(TOP_K + 1) * 7) % len(frequent)
    ids_SK = frequent[place_SK]
    known = ids_SK[:, :TOP_K] == sequence[1:, None]
    ids_SK = np.where(known, ids_SK[:, TOP_K:], ids_SK[:, :TOP_K])
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
    """As `tutelage teach` serves, with a route that sets the pace."""
    engine = PacedEngine(find_model(model))
    service = Service(engine)
    server = TeacherServer(service)

    async def set_pace(window_s: float) -> None:
        engine.window_s = window_s

    app: Any = server.config.app
    app.post("/pace/{window_s}")(set_pace)
    uvloop.run(serve(service, listen_on("127.0.0.1", port), server))


def config_of(urls: Sequence[str]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "student": {"model": STUDENT},
            "data": {"sources": [{"files": ["windows"]}], "window_tokens": WINDOW_TOKENS},
            "teachers": [{"name": f"t{n}", "urls": [url], "top_k": TOP_K} for n, url in enumerate(urls)],
            "train": {
                "batch_samples": BATCH_SAMPLES,
                "prefetch_tokens": AHEAD_BATCHES * BATCH_SAMPLES * WINDOW_TOKENS,
            },
            "output": {"dir": "unused"},
        }
    )


def student_step(batch: Batch) -> None:
    """Labels as trainer/learning/step.py makes them, then as long as an accelerator takes."""
    columns = [labels_of(lesson, 1) for lesson in batch.lessons]
    labels_from([tokens for tokens, _ in columns], [target for _, target in columns])
    time.sleep(STEP_S)


def run_control(spent: Any) -> None:
    """A little arithmetic now and then; adds up its CPU seconds and how long they took."""
    while True:
        time.sleep(CONTROL_S)
        cpu, began = time.thread_time(), time.monotonic()
        sum(range(CONTROL_STEPS))
        spent[0] += time.thread_time() - cpu
        spent[1] += time.monotonic() - began


@contextmanager
def control() -> Iterator[Any]:
    """A process that needs the processor a tenth of the time: CPU seconds, and how long they took."""
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
    """One run."""
    vocabulary = Vocabulary.load(find_model(STUDENT))
    used = urls[: len(case.speeds)]
    for url, speed in zip(used, case.speeds, strict=True):
        httpx.post(f"{url}/pace/{STEP_S / BATCH_SAMPLES / speed}", trust_env=False).raise_for_status()
    config = config_of(used)
    batches = [samples[i : i + BATCH_SAMPLES] for i in range(0, len(samples), BATCH_SAMPLES)]
    seen: list[Batch] = []
    fuser = Fuser(config, len(vocabulary))
    with TargetStream(config, Reader(vocabulary, vocabulary.prefix), batches, fuser=fuser) as stream:
        iterator = iter(stream)
        for _ in range(WARM_UP_STEPS):
            student_step(next(iterator))
        cpu, began, before = time.process_time(), time.monotonic(), spent[:]
        for _ in range(STEPS):
            seen.append(next(iterator))
            student_step(seen[-1])
        step_s = (time.monotonic() - began) / STEPS
        cpu = time.process_time() - cpu
        control = (spent[1] - before[1]) / (spent[0] - before[0])
    began = time.monotonic()
    for batch in seen[:4]:
        student_step(batch)
    student_s = (time.monotonic() - began) / 4
    slowest = f"t{min(range(len(case.speeds)), key=lambda n: case.speeds[n])}"

    def mean(values: Iterator[float]) -> float:
        return sum(values) / STEPS

    return Figures(
        ratio=step_s / max(student_s, case.teacher_s),
        step_s=step_s,
        student_s=student_s,
        teacher_s=case.teacher_s,
        waited_s=mean(b.waited_s for b in seen),
        waited_on_slowest_s=mean(b.waited_on.get(slowest, 0.0) for b in seen),
        waited_on_others_s=mean(s for b in seen for name, s in b.waited_on.items() if name != slowest),
        read_s=mean(b.read_s for b in seen),
        align_s=mean(b.align_s for b in seen),
        fuse_s=mean(b.fuse_s for b in seen),
        process_cpu_s=cpu / STEPS,
        queued_batches=mean(b.queued_batches for b in seen),
        control=control,
    )


def medians(rounds: Sequence[Figures]) -> Figures:
    return Figures(*(statistics.median(getattr(one, f.name) for one in rounds) for f in fields(Figures)))


def table(figures: dict[str, Figures]) -> str:
    """One line per case, in milliseconds of a step."""
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
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are shown")
    parser.add_argument("--json", type=Path, help="write {name: number} here")
    arguments = parser.parse_args()
    vocabulary = Vocabulary.load(find_model(STUDENT))
    windows = windows_of(vocabulary)[: (WARM_UP_STEPS + STEPS) * BATCH_SAMPLES]
    samples = [Sample(i, f"window {i}", text) for i, text in enumerate(windows)]
    figures: dict[str, Figures] = {}
    with ExitStack() as stack:
        spent = stack.enter_context(control())
        urls = [stack.enter_context(server_process(run_teacher, model)) for model in MODELS]
        for case in CASES:
            figures[case.name] = medians([measure(case, urls, samples, spent) for _ in range(arguments.rounds)])
    sys.stdout.write(table(figures))
    sys.stdout.write(f"load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    if arguments.json:
        flat = {f"overlap_{n}_{f.name}": round(getattr(o, f.name), 4) for n, o in figures.items() for f in fields(o)}
        arguments.json.write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
