"""`tutelage align`: how one teacher's knowledge of one text arrives at one student's tokenizer, and how fast."""

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from alignment import Target, Translation, Vocabulary, align, translate
from alignment.fusellm import fusellm_target, token_map
from alignment.report import AlignmentReport, report
from teachers.asking.address import TeacherAddress
from teachers.asking.pool import TeacherPool
from teachers.errors import Rejected
from teachers.protocol import Card
from teachers.rows import Rows, as_received
from trainer.commands.explain import Explained, explain
from trainer.config import SourceConfig
from trainer.data.sources import Broken, open_file
from trainer.data.windows import cut_windows
from trainer.errors import DataError
from trainer.places import find_model, tables_dir
from trainer.targets.asking import together

MEASURED_S = 2.0
MAX_REPEATS = 9
SHORTEST_BYTES = 32


@dataclass(frozen=True)
class AlignFigures:
    """Figures over a whole text, cut into windows; speed is of alignment alone, warm, on one core.

    aligned_bpb is infinite where a valid position does not list the text.
    """

    positions: int
    valid: int
    teacher_bpb: float
    aligned_bpb: float
    mean_mass: float
    tokens_per_second: float


@dataclass(frozen=True, eq=False)
class _Scored:
    text: str
    rows: Rows
    first_row: int


@dataclass(frozen=True)
class AlignOptions:
    """Whose answers, whose tokenizer, which text.

    teacher  address of a server, or a model's directory or name;  key  the server's bearer key
    student  a model's directory or name;  method  chain, or the paper's em and min_ed for comparison
    """

    teacher: str
    student: str
    text: Path
    top_k: int
    key: str | None
    window_tokens: int
    method: str = "chain"


def align_text(options: AlignOptions) -> AlignFigures:
    """Score the text with a served or local teacher and align it to the student's tokenizer."""
    student = Vocabulary.load(find_model(options.student))
    teacher, vocab_size, scored = _score(options, _windows(options, student))
    translation = translate(teacher, student, vocab_size, cache=tables_dir())
    if options.method == "chain":
        return _measure(translation, scored, partial(align, translation=translation))
    mapping = token_map(teacher, student, options.method, tables_dir())
    try:
        return _measure(translation, scored, partial(fusellm_target, mapping=mapping))
    finally:
        mapping.save()


def explain_text(options: AlignOptions, positions: int) -> list[Explained]:
    """Explain the first positions of the text, as many as are asked for; later windows count on from earlier ones."""
    student, out = Vocabulary.load(find_model(options.student)), list[Explained]()
    windows, needed, held = _windows(options, student), 0, 0
    while needed < len(windows) and held < positions:
        held += len(student.encode(windows[needed]))
        needed += 1
    teacher, vocab_size, scored = _score(options, windows[:needed])
    translation = translate(teacher, student, vocab_size, cache=tables_dir())
    for s in scored:
        pair = (teacher.encode(s.text), student.encode(s.text))
        blocks, begin = out[-1].block + 1 if out else 0, len(out)
        found = explain(s.rows, s.first_row, pair, translation, limit=positions - begin)
        out += [replace(e, position=begin + e.position, block=blocks + e.block) for e in found]
    return out


def _windows(options: AlignOptions, student: Vocabulary) -> list[str]:
    windows: list[str] = []
    for found in open_file(options.text, SourceConfig(files=[str(options.text)])).scan():
        if isinstance(found, Broken):
            raise DataError(found.sentence)
        windows += cut_windows(b"".join(found.stretches).decode(), student, options.window_tokens)
    if len(windows) > 1 and len(windows[-1].encode()) < SHORTEST_BYTES:
        windows[-2:] = ["".join(windows[-2:])]  # a last window of a token or two has nothing to align
    return windows


def _score(options: AlignOptions, windows: list[str]) -> tuple[Vocabulary, int, list[_Scored]]:
    """The teacher's tokenizer, how many ids it scores, and its rows for every window."""
    if options.teacher.startswith(("http://", "https://")):
        return asyncio.run(_from_server(options.teacher, options.key, windows, options.top_k))
    return asyncio.run(_from_directory(find_model(options.teacher), windows, options.top_k))


async def _from_server(
    url: str, key: str | None, windows: list[str], top_k: int
) -> tuple[Vocabulary, int, list[_Scored]]:
    async with TeacherPool([TeacherAddress("teacher", (url,), key=key)]) as pool:
        card, files = await pool.connect("teacher")
        vocabulary = Vocabulary.from_files(files, name=card.model).within(card.vocab_size)
        asked = (_ask(pool, card, vocabulary, window, top_k) for window in windows)
        return vocabulary, card.vocab_size, await together(asked)


async def _ask(pool: TeacherPool, card: Card, vocabulary: Vocabulary, window: str, top_k: int) -> _Scored:
    sequence, prefix = _sequence(card, vocabulary, window, top_k)
    return _Scored(window, await pool.score("teacher", sequence, 1, top_k), 1 - prefix)


async def _from_directory(folder: Path, windows: list[str], top_k: int) -> tuple[Vocabulary, int, list[_Scored]]:
    """A local model, through the same rounding that the wire has."""
    from teachers.engines.transformers import TransformersEngine

    vocabulary, engine = Vocabulary.load(folder), TransformersEngine(folder)
    scored = []
    try:
        for window in windows:
            sequence, prefix = _sequence(engine.card, vocabulary, window, top_k)
            rows = await engine.score(sequence, 1, top_k)
            scored.append(_Scored(window, as_received(rows, sequence, engine.card), 1 - prefix))
    finally:
        engine.close()
    return vocabulary, engine.card.vocab_size, scored


def _sequence(card: Card, vocabulary: Vocabulary, window: str, top_k: int) -> tuple[list[int], int]:
    """The ids to score and how many of them are BOS."""
    sequence = card.prefix + vocabulary.encode(window).ids.tolist()
    if top_k > card.max_top_k:
        raise Rejected(f"teacher {card.model}: top_k is {top_k}, it answers at most {card.max_top_k}")
    if len(sequence) < 2:
        raise DataError(f"the text {window[:20]!r} is a single token of the teacher: give a longer one")
    if len(sequence) > card.max_tokens:
        raise Rejected(f"teacher {card.model}: a window is {len(sequence)} tokens, it takes {card.max_tokens}")
    return sequence, len(card.prefix)


def _measure(translation: Translation, scored: list[_Scored], aligned: Callable[..., Target]) -> AlignFigures:
    pairs = [(translation.teacher.encode(s.text), translation.student.encode(s.text)) for s in scored]
    total = AlignmentReport()
    for s, pair in zip(scored, pairs, strict=True):
        total += report(s.rows, s.first_row, pair, aligned(s.rows, s.first_row, *pair), translation)
    took: list[float] = []
    with _one_core():
        while len(took) < MAX_REPEATS and (len(took) < 3 or sum(took) < MEASURED_S):
            began = time.perf_counter()
            for s, pair in zip(scored, pairs, strict=True):
                aligned(s.rows, s.first_row, *pair)
            took.append(time.perf_counter() - began)
    if not total.num_bytes:
        raise DataError("the text has no block that the teacher speaks of: give a longer one")
    speed = total.positions / statistics.median(took)
    return AlignFigures(
        total.positions, total.valid, total.teacher_bpb, total.aligned_bpb, total.mean_mass, round(speed, 1)
    )


@contextmanager
def _one_core() -> Iterator[None]:
    """Pin this thread to one core and keep the tokenizer's own threads out of the measurement."""
    cores, before = os.sched_getaffinity(0), os.environ.get("TOKENIZERS_PARALLELISM")
    os.sched_setaffinity(0, {min(cores)})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
