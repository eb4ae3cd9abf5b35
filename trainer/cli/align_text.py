"""Score a text with one teacher and align the scores to a student's tokenizer, for `tutelage align`."""

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
from teachers.client.addresses import TeacherAddress
from teachers.client.pool import TeacherPool
from teachers.protocol.errors import Rejected
from teachers.protocol.messages import TeacherCard
from teachers.protocol.rows import Rows
from teachers.protocol.wire_format import as_received
from trainer.cli.explain_alignment import ExplainedPosition, explain
from trainer.errors import DataError
from trainer.paths import resolve_model_dir, tables_dir
from trainer.query.connect import gather
from trainer.sources.base import DocumentRef, InvalidRecord
from trainer.sources.config import SourceConfig
from trainer.sources.formats import format_of, open_documents
from trainer.sources.windows import cut_windows

TIMING_S = 2.0  # the alignment is repeated for this time, within the limits of repetitions
MIN_REPEATS, MAX_REPEATS = 3, 9
MIN_WINDOW_BYTES = 32  # a shorter last window is joined with the one before


@dataclass(frozen=True)
class AlignFigures:
    """Results for a whole text, cut into windows.

    positions          student positions
    valid              positions with a target
    teacher_bpb        bits per byte of the teacher
    aligned_bpb        bits per byte of the targets over the same bytes; infinite if a valid position does not list the
                       token of the text
    mean_mass          mean listed probability of the valid positions
    tokens_per_second  student tokens per second of the alignment alone, after warm-up, on one core
    """

    positions: int
    valid: int
    teacher_bpb: float
    aligned_bpb: float
    mean_mass: float
    tokens_per_second: float


@dataclass(frozen=True, eq=False)
class _ScoredWindow:
    text: str
    rows: Rows
    first_row: int


@dataclass(frozen=True)
class AlignOptions:
    """Options of `tutelage align`.

    teacher        URL of a server, or directory or name of a model
    student        directory or name of a model
    text           UTF-8 text file
    top_k          candidates at every position
    key            bearer key of the server
    window_tokens  maximum length of a window in student tokens
    method         byte_chain, or em or min_ed of FuseLLM for comparison
    """

    teacher: str
    student: str
    text: Path
    top_k: int
    key: str | None
    window_tokens: int
    method: str = "byte_chain"


def align_text(options: AlignOptions) -> AlignFigures:
    """Score the text with a served or local teacher, align the scores to the student's tokenizer, and measure both.

    Raises ConfigError, DataError, TokenizerError, TeacherError or AlignmentError.
    """
    student = Vocabulary.load(resolve_model_dir(options.student))
    teacher, vocab_size, windows = _score(options, _windows(options, student))
    translation = translate(teacher, student, vocab_size, cache=tables_dir())
    if options.method == "byte_chain":
        return _measure(translation, windows, partial(align, translation=translation))
    mapping = token_map(teacher, student, options.method, tables_dir())
    try:
        return _measure(translation, windows, partial(fusellm_target, mapping=mapping))
    finally:
        mapping.save()


def explain_text(options: AlignOptions, positions: int) -> list[ExplainedPosition]:
    """Explain the first positions of the text. Positions and blocks are numbered through all windows."""
    student, explained = Vocabulary.load(resolve_model_dir(options.student)), list[ExplainedPosition]()
    texts, num_windows, num_tokens = _windows(options, student), 0, 0
    while num_windows < len(texts) and num_tokens < positions:
        num_tokens += len(student.encode(texts[num_windows]))
        num_windows += 1
    teacher, vocab_size, windows = _score(options, texts[:num_windows])
    translation = translate(teacher, student, vocab_size, cache=tables_dir())
    for window in windows:
        tokens = (teacher.encode(window.text), student.encode(window.text))
        first_block, begin = explained[-1].block + 1 if explained else 0, len(explained)
        new = explain(window.rows, window.first_row, tokens, translation, limit=positions - begin)
        explained += [replace(e, position=begin + e.position, block=first_block + e.block) for e in new]
    return explained


def _windows(options: AlignOptions, student: Vocabulary) -> list[str]:
    """Cut the text into windows. Raises DataError if the file is not a valid text."""
    windows: list[str] = []
    file_format = format_of(options.text) or "text"
    documents = open_documents(options.text, SourceConfig(files=[str(options.text)], file_format=file_format))
    if documents.format.is_chat:
        raise DataError(f"{options.text} has {documents.format.description}: expected texts")
    for document in documents.scan():
        if isinstance(document, InvalidRecord):
            raise DataError(document.message)
        if isinstance(document, DocumentRef):
            windows += cut_windows(b"".join(document.chunks).decode(), student, options.window_tokens)
    if len(windows) > 1 and len(windows[-1].encode()) < MIN_WINDOW_BYTES:
        windows[-2:] = ["".join(windows[-2:])]  # one or two tokens may have no common boundary
    return windows


def _score(options: AlignOptions, windows: list[str]) -> tuple[Vocabulary, int, list[_ScoredWindow]]:
    """Return the teacher's tokenizer, the size of its model's vocabulary, and its rows for every window."""
    if options.teacher.startswith(("http://", "https://")):
        return asyncio.run(_score_on_server(options.teacher, options.key, windows, options.top_k))
    return asyncio.run(_score_locally(resolve_model_dir(options.teacher), windows, options.top_k))


async def _score_on_server(
    url: str, key: str | None, windows: list[str], top_k: int
) -> tuple[Vocabulary, int, list[_ScoredWindow]]:
    async with TeacherPool([TeacherAddress("teacher", (url,), key=key)]) as pool:
        card, files = await pool.connect("teacher")
        vocabulary = Vocabulary.from_files(files, name=card.model).within(card.vocab_size)
        requests = (_request(pool, card, vocabulary, window, top_k) for window in windows)
        return vocabulary, card.vocab_size, await gather(requests)


async def _request(
    pool: TeacherPool, card: TeacherCard, vocabulary: Vocabulary, window: str, top_k: int
) -> _ScoredWindow:
    sequence, num_prefix = _sequence(card, vocabulary, window, top_k)
    return _ScoredWindow(window, await pool.score("teacher", sequence, 1, top_k), 1 - num_prefix)


async def _score_locally(folder: Path, windows: list[str], top_k: int) -> tuple[Vocabulary, int, list[_ScoredWindow]]:
    """Score with a local model; values are rounded as in the wire format."""
    from teachers.engines.transformers import TransformersEngine

    vocabulary, engine = Vocabulary.load(folder), TransformersEngine(folder)
    scored = []
    try:
        for window in windows:
            sequence, num_prefix = _sequence(engine.card, vocabulary, window, top_k)
            rows = await engine.score(sequence, 1, top_k)
            scored.append(_ScoredWindow(window, as_received(rows, sequence, engine.card), 1 - num_prefix))
    finally:
        engine.close()
    return vocabulary, engine.card.vocab_size, scored


def _sequence(card: TeacherCard, vocabulary: Vocabulary, window: str, top_k: int) -> tuple[list[int], int]:
    """Return the ids to score, and how many of them are the prefix (BOS).

    Raises Rejected or DataError if the teacher cannot score them.
    """
    sequence = card.prefix + vocabulary.encode(window).ids.tolist()
    if top_k > card.max_top_k:
        raise Rejected(f"teacher {card.model}: expected a top_k of at most {card.max_top_k}, received {top_k}")
    if len(sequence) < 2:
        raise DataError(f"the window {window[:20]!r} is a single token of the teacher: use a longer text")
    if len(sequence) > card.max_tokens:
        raise Rejected(
            f"teacher {card.model}: expected windows of at most {card.max_tokens} teacher tokens, received one of "
            f"{len(sequence)}: lower --window-tokens"
        )
    return sequence, len(card.prefix)


def _measure(translation: Translation, windows: list[_ScoredWindow], aligner: Callable[..., Target]) -> AlignFigures:
    """Align every window once for the report, then repeatedly for the speed."""
    pairs = [(translation.teacher.encode(w.text), translation.student.encode(w.text)) for w in windows]
    total = AlignmentReport()
    for window, pair in zip(windows, pairs, strict=True):
        target = aligner(window.rows, window.first_row, *pair)
        total += report(window.rows, window.first_row, pair, target, translation)
    durations: list[float] = []
    with _one_core():
        while len(durations) < MAX_REPEATS and (len(durations) < MIN_REPEATS or sum(durations) < TIMING_S):
            began = time.perf_counter()
            for window, pair in zip(windows, pairs, strict=True):
                aligner(window.rows, window.first_row, *pair)
            durations.append(time.perf_counter() - began)
    if not total.num_bytes:
        raise DataError("the teacher has scores for no block of the text: use a longer text")
    speed = total.positions / statistics.median(durations)
    return AlignFigures(
        total.positions, total.valid, total.teacher_bpb, total.aligned_bpb, total.mean_mass, round(speed, 1)
    )


@contextmanager
def _one_core() -> Iterator[None]:
    """Pin this thread to one core, and disable the threads of the tokenizer, in the block."""
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
