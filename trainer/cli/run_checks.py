"""The checks of `tutelage doctor`: the checks at the start of a run, and a test request to every teacher.

Student, data and settings are checked by the functions that `train` calls (trainer/training/start_checks.py), teachers
by those that a run uses to connect (trainer/query/connect.py). All checks run even if one fails, except that the data
cannot be checked without the student.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignment import AlignmentError, TokenizerError
from teachers.client.pool import TeacherPool
from teachers.protocol.errors import TeacherError
from teachers.protocol.messages import PROBE
from trainer.chats.jinja_template import ChatError
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.query.config import TeacherConfig
from trainer.query.connect import ConnectedTeacher, connect_teacher, teacher_address
from trainer.records import Sample
from trainer.sources.config import DataConfig
from trainer.sources.corpus import Corpus, SourceCounts
from trainer.student.checks import check_weights
from trainer.student.loading import resolve_precision, student_tokenizer
from trainer.tokenization import tokenize_samples
from trainer.training.start_checks import StudentFiles, check_data, check_settings, check_student

MAX_EXAMINED = 4096  # samples that are tokenized for every model, evenly spaced
BOS_RATIO = 1.1  # the served choice of BOS is wrong if its loss is this many times that of the other


@dataclass(frozen=True)
class Finding:
    """The result of one check: its subject, whether it passed, and what was found or what to change."""

    subject: str
    ok: bool
    detail: str


def examine(config: RunConfig) -> list[Finding]:
    """Check settings, student, data and every teacher of a run file."""
    findings = [*_check_settings(config)]
    student, student_findings = _check_student(config)
    findings += student_findings
    samples: Sequence[Sample] = ()
    if student is not None:
        samples, data_findings = _check_data(config, student)
        findings += data_findings
    return findings + asyncio.run(_check_teachers(config, samples))


def _check_settings(config: RunConfig) -> list[Finding]:
    try:
        check_settings(config)
    except UserError as error:
        return [Finding("settings", False, str(error))]
    out = Path(config.output.dir).expanduser()
    if out.is_dir() and any(out.iterdir()):
        return [Finding("output", True, f"{out} already contains a run: only --resume continues it")]
    return []


def _check_student(config: RunConfig) -> tuple[StudentFiles | None, list[Finding]]:
    try:
        student = check_student(config)
        check_weights(student.folder)
        precision = resolve_precision(config.student.precision, config.student.device)
    except (UserError, TokenizerError) as error:
        return None, [Finding("student", False, str(error))]
    vocabulary = student.vocabulary
    detail = f"{vocabulary.name}: {len(vocabulary)} tokens, {precision} on {config.student.device}"
    return student, [Finding("student", True, detail)]


def _check_data(config: RunConfig, student: StudentFiles) -> tuple[Sequence[Sample], list[Finding]]:
    findings: list[Finding] = []
    samples: Sequence[Sample] = ()
    try:
        corpus, num_steps = check_data(config, student.vocabulary)
        findings += [Finding("data", True, _describe(source)) for source in corpus.sources]
        findings += [Finding("data", True, f"warning: {each}") for source in corpus.sources for each in source.repeated]
        samples = _evenly_spaced(corpus)
        tokenizer = student_tokenizer(student.folder, student.vocabulary, config.student, config.data)
        num_tokenized = sum(1 for _ in tokenize_samples(samples, tokenizer, config.data))
        if num_tokenized < len(samples):
            skipped = f"{len(samples) - num_tokenized} of {len(samples)} samples are chats that cannot be rendered"
            findings.append(Finding("data", True, f"{skipped}; they are skipped"))
        detail = f"{len(corpus.train)} windows to train on, {len(corpus.held_out)} held out, {num_steps} steps"
        findings.append(Finding("data", True, detail))
    except (UserError, TokenizerError) as error:
        findings.append(Finding("data", False, str(error)))
    return samples, findings


def _describe(source: SourceCounts) -> str:
    tokens = "chats" if source.tokens is None else f"{source.tokens:,} tokens"
    invalid = f"; {source.invalid} invalid ({'; '.join(source.first_invalid)})" if source.invalid else ""
    return (
        f"{source.name}: {source.documents:,} documents, {source.windows:,} windows, {tokens}, "
        f"{source.num_bytes:,} bytes; {source.epoch_samples:,} samples per epoch{invalid}"
    )


def _evenly_spaced(corpus: Corpus) -> list[Sample]:
    """Return training and held-out samples, at most MAX_EXAMINED of them."""
    total, num_train = len(corpus.train) + len(corpus.held_out), len(corpus.train)
    chosen = range(0, total, -(-total // MAX_EXAMINED))
    return [corpus.train[i] if i < num_train else corpus.held_out[i - num_train] for i in chosen]


async def _check_teachers(config: RunConfig, samples: Sequence[Sample]) -> list[Finding]:
    groups = await asyncio.gather(*(_check_teacher(t, samples, config.data) for t in config.teachers))
    return [finding for group in groups for finding in group]


async def _check_teacher(config: TeacherConfig, samples: Sequence[Sample], data: DataConfig) -> list[Finding]:
    """Check card, tokenizer, top_k and sample lengths, then score a probe sentence with and without BOS."""
    findings: list[Finding] = []
    subject = f"teacher {config.name}"
    try:
        async with TeacherPool([teacher_address(config)]) as pool:
            teacher = await connect_teacher(pool, config, data)
            card = teacher.card
            detail = f"{card.model} on {card.engine}, {card.dtype}, up to K = {card.max_top_k}"
            findings.append(Finding(subject, True, detail))
            num_tokens = len(teacher.tokenizer.vocabulary)
            findings.append(Finding(subject, True, f"the tokenizer of {num_tokens} tokens matches the card"))
            findings.append(_check_lengths(teacher, samples, data))
            findings.append(await _check_bos(pool, teacher))
    except (UserError, TeacherError, TokenizerError, AlignmentError) as error:
        findings.append(Finding(subject, False, str(error).removeprefix(subject).lstrip(": ")))
    return findings


def _check_lengths(teacher: ConnectedTeacher, samples: Sequence[Sample], data: DataConfig) -> Finding:
    """Compare the longest sample with the teacher's limit, BOS and EOS included."""
    lengths, card = [0], teacher.card
    for sample in samples:
        try:
            lengths.append(len(card.prefix) + len(teacher.tokenizer.tokenize(sample)))
        except ChatError:
            if data.invalid_chats != "skip":
                raise
    detail = f"takes {card.max_tokens} tokens; the longest of {len(samples)} samples has {max(lengths)}"
    fits, shortens = max(lengths) <= card.max_tokens, data.too_long == "shorten"
    advice = "" if fits else "; it is shortened for all models" if shortens else ": lower data.window_tokens"
    return Finding(f"teacher {teacher.config.name}", fits or shortens, detail + advice)


async def _check_bos(pool: TeacherPool, teacher: ConnectedTeacher) -> Finding:
    """Score a sentence with and without BOS, if the teacher has BOS, and compare the losses."""
    card, subject = teacher.card, f"teacher {teacher.config.name}"
    if card.expects_bos and card.bos_id is None:
        return Finding(subject, False, "its card expects BOS but names no BOS token: serve the teacher with --bos no")
    ids = teacher.tokenizer.vocabulary.encode(PROBE).ids.tolist()
    if card.masks_positions:  # the server decides about BOS, and may not score a text without it
        return await _check_masked(pool, teacher, [*card.prefix, *ids])
    without = await _nats(pool, teacher, ids, 1)
    with_bos = without if card.bos_id is None else await _nats(pool, teacher, [card.bos_id, *ids], 2)
    used, other = (with_bos, without) if card.expects_bos else (without, with_bos)
    result = f"probe sentence {used:.2f} nats per token {'with' if card.expects_bos else 'without'} BOS"
    if used > other * BOS_RATIO:
        flag = "no" if card.expects_bos else "yes"
        return Finding(subject, False, f"{result}, {other:.2f} otherwise: serve the teacher with --bos {flag}")
    return Finding(subject, True, result)


async def _check_masked(pool: TeacherPool, teacher: ConnectedTeacher, sequence: list[int]) -> Finding:
    """Score a sentence of a server that returns no ids, and count the masked tokens."""
    subject, top_k = f"teacher {teacher.config.name}", teacher.config.top_k
    rows = await pool.score(teacher.config.name, sequence, 1, top_k)
    known = rows.actual[~np.isnan(rows.actual)]
    if not len(known):
        return Finding(subject, False, f"every token of the probe sentence is masked at top_k = {top_k}: lower top_k")
    detail = f"probe sentence {-float(known.mean()):.2f} nats per token; {rows.num_masked} of {len(rows)} tokens masked"
    return Finding(subject, True, f"{detail}, mean tail {float(rows.tail[~np.isnan(rows.actual)].mean()):.2f}")


async def _nats(pool: TeacherPool, teacher: ConnectedTeacher, sequence: list[int], start: int) -> float:
    rows = await pool.score(teacher.config.name, sequence, start, teacher.config.top_k)
    return -float(rows.actual.mean())
