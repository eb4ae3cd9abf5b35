"""How fast each alignment is, and how much of a teacher it delivers: method × pair × text × length, K = 64.

`python -m benchmarks.alignment [--json FILE]` scores windows of CPython's documentation and source with SmolLM2-135M
and Gemma 3 270M (made by `tutelage demo --prepare`; two minutes on two cores), aligns them in both directions, and
prints one table. Speeds are student tokens a second of one pinned core's time, finding the boundaries included.
*fresh*: every window once, nothing of it seen before, as in a run over new text. *again*: the same windows once more.
*threads*: two threads against one, which needs two cores that nobody else uses. The peer is the paper's own code: 348
to 441 tokens a second at K = 10, measured on another machine; `em` and `min_ed` are its two methods, ours to the id.
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
from teachers.rows import Rows, as_received
from trainer.data.windows import cut_windows
from trainer.places import find_model, tables_dir

MODELS = {"smollm2": "smollm2-135m-instruct", "gemma": "gemma-3-270m"}
LENGTHS, NUM_WINDOWS, TOP_K, ROUNDS = (512, 2048), 4, 64, 5
TEXTS = {
    "prose": "\n\n".join(topics[name] for name in sorted(topics)),
    "code": inspect.getsource(argparse) + inspect.getsource(tarfile),
}

Aligner = Callable[..., Target]


@dataclass(frozen=True, eq=False)
class Case:
    """One window, scored by one teacher, to be read by one student."""

    rows: Rows
    first_row: int
    teacher: Tokens
    student: Tokens


@dataclass(frozen=True)
class Line:
    """One line of the table. Bits per byte are over the blocks that are valid throughout; inf: the text is unlisted."""

    fresh_per_s: float
    again_per_s: float
    threads: float
    coverage: float
    mass: float
    own_bpb: float
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
    """Every window of every text and length, by teacher, student, text and length."""
    out: dict[tuple[str, str, str, int], list[Case]] = {}
    for teacher, student in (("gemma", "smollm2"), ("smollm2", "gemma")):
        engine = TransformersEngine(find_model(MODELS[teacher]))
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
    """Each method with nothing remembered of any text."""
    yield "chain", partial(align, translation=translation)
    for method in METHODS:
        mapping = token_map(translation.teacher, translation.student, method)
        yield method, partial(fusellm_target, mapping=mapping)


def measure(aligned: Aligner, windows: list[Case], translation: Translation) -> Line:
    """One line; what is compiled was compiled before."""
    tokens = sum(len(case.student) for case in windows)

    def all_of_them(some: list[Case]) -> list[Target]:
        return [aligned(case.rows, case.first_row, case.teacher, case.student) for case in some]

    with one_core():
        fresh, targets = _timed(lambda: all_of_them(windows), time.thread_time)
        again = statistics.median(_timed(lambda: all_of_them(windows), time.thread_time)[0] for _ in range(ROUNDS))
    with ThreadPoolExecutor(2) as pool:
        halves = [windows * 2, windows * 2]
        both = statistics.median(
            _timed(lambda: [t for part in pool.map(all_of_them, halves) for t in part])[0] for _ in range(ROUNDS)
        )
        alone = statistics.median(_timed(lambda: all_of_them(windows * 2))[0] for _ in range(ROUNDS))
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
    done = work()
    return clock() - began, done


@contextmanager
def one_core() -> Iterator[None]:
    """Pin this thread to one core and keep the tokenizer's own threads out of the measurement."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


HEADER = f"{'method':8}{'pair':18}{'text':7}{'tokens':>7}{'fresh/s':>11}{'again/s':>11}{'threads':>9}{'coverage':>10}"


def shown(where: tuple[str, str, str, int], method: str, line: Line) -> str:
    teacher, student, text, length = where
    speeds = f"{line.fresh_per_s:11,.0f}{line.again_per_s:11,.0f}{line.threads:9.2f}"
    arrived = f"{line.coverage:10.3f}{line.mass:8.3f}{line.own_bpb:9.4f}{line.aligned_bpb:9.4f}"
    return f"{method:8}{teacher + ' → ' + student:18}{text:7}{length:7}{speeds}{arrived}"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write {name: number} here")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    vocabularies = {name: Vocabulary.load(find_model(folder)) for name, folder in MODELS.items()}
    figures: dict[str, float] = {}
    sys.stdout.write(f"{HEADER}{'mass':>8}{'own':>9}{'aligned':>9}\n")
    for where, windows in cases(vocabularies).items():
        teacher, student = (vocabularies[name] for name in where[:2])
        translation = translate(teacher, student, cache=tables_dir())
        short = teacher.encode("Once."), student.encode("Once.")
        for method, aligned in aligners(translation):
            aligned(_few(windows[0].rows, len(short[0])), 0, *short)  # compiles
            line = measure(aligned, windows, translation)
            sys.stdout.write(shown(where, method, line) + "\n")
            sys.stdout.flush()
            prefix = "/".join(map(str, (method, *where)))
            figures |= {f"{prefix}/{name}": round(value, 4) for name, value in asdict(line).items() if value < math.inf}
    sys.stdout.write(f"load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _few(rows: Rows, count: int) -> Rows:
    """The first rows, as if they were those of another text."""
    return Rows(rows.start, rows.ids[:count], rows.logprobs[:count], rows.actual[:count], rows.tail[:count])


if __name__ == "__main__":
    main()
