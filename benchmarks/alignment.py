"""Speed of each alignment method, and how much of a teacher arrives: method × pair × text × length, K = 64.

`python -m benchmarks.alignment [--json FILE]` scores windows of CPython's documentation and source with SmolLM2-135M
and Gemma 3 270M (built by `tutelage demo --prepare`; two minutes on two cores), aligns them in both directions, and
prints one table. Speeds are student tokens per second of CPU time on one pinned core, including the search for
boundaries.

fresh    every window once, with empty caches, as in a run over new text
again    the same windows again
threads  throughput of two threads relative to one; this needs two idle cores

The peer is the code of FuseLLM: 348 to 441 tokens per second at K = 10, measured on another machine. `em` and `min_ed`
are its two methods; our implementation gives the same ids.
"""

import argparse
import asyncio
import inspect
import json
import math
import os
import statistics
import sys
import tarfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

from alignment import Target, Tokens, Translation, Vocabulary, align, translate
from alignment.fusellm import METHODS, fusellm_target, token_map
from alignment.report import AlignmentReport, report
from teachers.engines.transformers import TransformersEngine
from teachers.protocol.rows import Rows
from teachers.protocol.wire_format import as_received
from trainer.paths import resolve_model_dir, tables_dir
from trainer.sources.windows import cut_windows

MODELS = {"smollm2": "smollm2-135m-instruct", "gemma": "gemma-3-270m"}
LENGTHS, NUM_WINDOWS, TOP_K, ROUNDS = (512, 2048), 4, 64, 5
TEXTS = {
    "prose": "\n\n".join(topics[name] for name in sorted(topics)),
    "code": inspect.getsource(argparse) + inspect.getsource(tarfile),
}

Aligner = Callable[..., Target]


@dataclass(frozen=True, eq=False)
class Case:
    """One window with the rows of a teacher, tokenized by teacher and student."""

    rows: Rows
    first_row: int
    teacher: Tokens
    student: Tokens


@dataclass(frozen=True)
class Line:
    """One line of the table. Bits per byte are over blocks that are valid throughout; inf if the text is unlisted."""

    fresh_per_s: float
    again_per_s: float
    threads: float
    coverage: float
    mass: float
    teacher_bpb: float
    aligned_bpb: float


async def _score(engine: TransformersEngine, vocabulary: Vocabulary, windows: list[str]) -> list[tuple[Rows, Tokens]]:
    out = []
    for window in windows:
        tokens = vocabulary.encode(window)
        sequence = [*engine.card.prefix, *tokens.ids.tolist()]
        rows = await engine.score(sequence, 1, TOP_K)
        out.append((as_received(rows, sequence, engine.card), tokens))
    return out


def cases(vocabularies: dict[str, Vocabulary]) -> dict[tuple[str, str, str, int], list[Case]]:
    """Score every window of every text and length; the keys are teacher, student, text and length."""
    out: dict[tuple[str, str, str, int], list[Case]] = {}
    for teacher, student in (("gemma", "smollm2"), ("smollm2", "gemma")):
        engine = TransformersEngine(resolve_model_dir(MODELS[teacher]))
        for text, length in ((t, n) for t in TEXTS for n in LENGTHS):
            windows = list(cut_windows(TEXTS[text][: 60 * length], vocabularies[student], length))[:NUM_WINDOWS]
            scored = asyncio.run(_score(engine, vocabularies[teacher], windows))
            out[teacher, student, text, length] = [
                Case(rows, 1 - len(engine.card.prefix), tokens, vocabularies[student].encode(window))
                for window, (rows, tokens) in zip(windows, scored, strict=True)
            ]
        engine.close()
    return out


def aligners(translation: Translation) -> Iterator[tuple[str, Aligner]]:
    """Yield each method with empty caches."""
    yield "byte_chain", partial(align, translation=translation)
    for method in METHODS:
        mapping = token_map(translation.teacher, translation.student, method)
        yield method, partial(fusellm_target, mapping=mapping)


def measure(aligner: Aligner, windows: list[Case], translation: Translation) -> Line:
    """Measure one line. Compiled functions must have been compiled before."""
    tokens = sum(len(case.student) for case in windows)

    def align_all(cases: list[Case]) -> list[Target]:
        return [aligner(case.rows, case.first_row, case.teacher, case.student) for case in cases]

    with one_core():
        fresh, targets = _timed(lambda: align_all(windows), time.thread_time)
        again = statistics.median(_timed(lambda: align_all(windows), time.thread_time)[0] for _ in range(ROUNDS))
    with ThreadPoolExecutor(2) as pool:
        halves = [windows * 2, windows * 2]
        both = statistics.median(
            _timed(lambda: [t for targets in pool.map(align_all, halves) for t in targets])[0] for _ in range(ROUNDS)
        )
        alone = statistics.median(_timed(lambda: align_all(windows * 2))[0] for _ in range(ROUNDS))
    total = AlignmentReport()
    for case, target in zip(windows, targets, strict=True):
        total += report(case.rows, case.first_row, (case.teacher, case.student), target, translation)
    return Line(
        tokens / fresh, tokens / again, 2 * alone / both,
        total.valid / total.positions, total.mean_mass, total.teacher_bpb, total.aligned_bpb,
    )  # fmt: skip


def _timed(
    work: Callable[[], list[Target]], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, list[Target]]:
    began = clock()
    result = work()
    return clock() - began, result


@contextmanager
def one_core() -> Iterator[None]:
    """Pin this thread to one core during a measurement."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


HEADER = f"{'method':12}{'pair':18}{'text':7}{'tokens':>7}{'fresh/s':>11}{'again/s':>11}{'threads':>9}{'coverage':>10}"


def formatted(where: tuple[str, str, str, int], method: str, line: Line) -> str:
    teacher, student, text, length = where
    speeds = f"{line.fresh_per_s:11,.0f}{line.again_per_s:11,.0f}{line.threads:9.2f}"
    quality = f"{line.coverage:10.3f}{line.mass:8.3f}{line.teacher_bpb:9.4f}{line.aligned_bpb:9.4f}"
    return f"{method:12}{teacher + ' → ' + student:18}{text:7}{length:7}{speeds}{quality}"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write {name: number} to this file")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    vocabularies = {name: Vocabulary.load(resolve_model_dir(folder)) for name, folder in MODELS.items()}
    figures: dict[str, float] = {}
    sys.stdout.write(f"{HEADER}{'mass':>8}{'teacher':>9}{'aligned':>9}\n")
    for where, windows in cases(vocabularies).items():
        teacher, student = (vocabularies[name] for name in where[:2])
        translation = translate(teacher, student, cache=tables_dir())
        short = teacher.encode("Once."), student.encode("Once.")
        for method, aligner in aligners(translation):
            aligner(_few_rows(windows[0].rows, len(short[0])), 0, *short)  # compile
            line = measure(aligner, windows, translation)
            sys.stdout.write(formatted(where, method, line) + "\n")
            sys.stdout.flush()
            prefix = "/".join(map(str, (method, *where)))
            figures |= {f"{prefix}/{name}": round(value, 4) for name, value in asdict(line).items() if value < math.inf}
    sys.stdout.write(f"load average of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _few_rows(rows: Rows, count: int) -> Rows:
    """Return the first rows, as rows of a shorter text."""
    return Rows(rows.start, rows.ids[:count], rows.logprobs[:count], rows.actual[:count], rows.tail[:count])


if __name__ == "__main__":
    main()
