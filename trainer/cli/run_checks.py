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
from trainer.cli.supervised_text import SupervisedText, supervised_text
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.query.config import TeacherConfig
from trainer.query.connect import ConnectedTeacher, connect_teacher, teacher_address
from trainer.records import Sample, TokenizedSample
from trainer.sources.config import DataConfig
from trainer.sources.corpus import Corpus, SourceCounts, unclosed_texts
from trainer.student.loading import prepare_module, resolve_precision, student_tokenizer
from trainer.tokenization import raise_unless_skipped, tokenize_samples
from trainer.training.chat_checks import check_chats, describe_supervision
from trainer.training.start_checks import StudentFiles, check_data, check_settings, check_student, unreached_steps

MAX_EXAMINED = 4096  # samples that are tokenized for every model, evenly spaced
NUM_EXAMPLES = 3
WARNING = "warning: "
BOS_RATIO = 1.1  # the served choice of BOS is wrong if its loss is this many times that of the other


@dataclass(frozen=True)
class Finding:
    """The result of one check: its subject, whether it passed, what was found or what to change, and examples."""

    subject: str
    ok: bool
    detail: str
    examples: tuple[SupervisedText, ...] = ()

    @property
    def is_warning(self) -> bool:
        """Whether the check passed with a warning."""
        return self.ok and self.detail.startswith(WARNING)


def examine(config: RunConfig, *, wait: bool = False) -> list[Finding]:
    """Check settings, student, data and every teacher of a run file.

    With `wait`, wait for teachers that do not respond yet, as a run does.
    """
    findings = [*_check_settings(config)]
    student, student_findings = _check_student(config)
    findings += student_findings
    data = _Data()
    if student is not None:
        data, data_findings = _check_data(config, student)
        findings += data_findings
    return findings + asyncio.run(_check_teachers(config, data, wait))


@dataclass(frozen=True, eq=False)
class _Data:
    """The corpus, None if it could not be read, and the samples that are tokenized for every model."""

    corpus: Corpus | None = None
    samples: Sequence[Sample] = ()


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
        prepare_module(config.student, student.folder)
        precision = resolve_precision(config.student.precision, config.student.device)
    except (UserError, TokenizerError) as error:
        return None, [Finding("student", False, str(error))]
    vocabulary = student.vocabulary
    bos = "with" if vocabulary.prefix else "without"
    detail = f"{vocabulary.name}: {len(vocabulary)} tokens, {bos} BOS, {precision} on {config.student.device}"
    return student, [Finding("student", True, detail)]


def _check_data(config: RunConfig, student: StudentFiles) -> tuple[_Data, list[Finding]]:
    findings: list[Finding] = []
    data = _Data()
    try:
        corpus, num_steps = check_data(config, student.vocabulary)
        findings += [Finding("data", True, _describe(source)) for source in corpus.sources]
        findings += [Finding("data", True, f"{WARNING}{each}") for source in corpus.sources for each in source.repeated]
        warnings = unreached_steps(config, num_steps) + unclosed_texts(corpus.sources, config.data)
        findings += [Finding("data", True, warning) for warning in warnings]
        data = _Data(corpus, samples := _evenly_spaced(corpus))
        tokenizer = student_tokenizer(student.folder, student.vocabulary, config.student, config.data, corpus.has_chats)
        remarks = check_chats(corpus, {"student": tokenizer}, config.data)
        tokenized = _Tokenized("student")
        for sample in samples:
            for one in tokenize_samples([sample], tokenizer, config.data, on_skip=tokenized.skipped.append):
                tokenized.add(sample, one)
        findings += _describe_skipped("data", tokenized.skipped, len(samples))
        detail = f"{len(corpus.train)} windows to train on, {len(corpus.held_out)} held out, {num_steps} steps"
        findings.append(Finding("data", True, detail))
        findings += _supervision(tokenized, describe_supervision(corpus, config.data), remarks)
    except (UserError, TokenizerError) as error:
        findings.append(Finding("data", False, str(error)))
    return data, findings


def _supervision(tokenized: "_Tokenized", supervision: str, remarks: Sequence[str]) -> list[Finding]:
    """Report the supervision in force, with examples, and the remarks of `check_chats`."""
    findings = [Finding(tokenized.model, True, f"supervised are {supervision}", tuple(tokenized.examples))]
    return findings + [Finding(tokenized.model, True, remark) for remark in [*tokenized.omissions(), *remarks]]


class _Tokenized:
    """Counts of the samples that one model tokenizes, with the first ones as examples, and the skipped chats."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.count = self.longest = 0
        self.examples: list[SupervisedText] = []
        self.skipped: list[ChatError] = []
        self._omissions: dict[str, list[str]] = {}

    def add(self, sample: Sample, tokenized: TokenizedSample) -> None:
        """Add one sample."""
        self.count += 1
        self.longest = max(self.longest, len(tokenized))
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(supervised_text(self.model, sample.name, tokenized))
        for omission in tokenized.rendered.omissions if tokenized.rendered is not None else ():
            kind = "drops or rewrites a text" if omission.problem else "drops the reasoning of an earlier turn"
            self._omissions.setdefault(kind, []).append(f"{sample.name}: {omission.text!r}")

    def omissions(self) -> list[str]:
        """Describe what the chat template of the model does not render, with the first example of each kind."""
        return [
            f"the chat template {kind} {len(found)} times in {self.count} samples, first in {found[0]}"
            for kind, found in self._omissions.items()
        ]


def _describe_skipped(subject: str, skipped: Sequence[ChatError], num_samples: int) -> list[Finding]:
    """Report the chats that are skipped because one model cannot represent them. A run needs one that is not."""
    if not skipped:
        return []
    detail = f"{len(skipped)} of {num_samples} samples are chats that are skipped (the first one: {skipped[0]})"
    return [Finding(subject, len(skipped) < num_samples, detail)]


def _describe(source: SourceCounts) -> str:
    tokens = "chats" if source.tokens is None else f"{source.tokens:,} tokens"
    invalid = f"; {source.invalid} invalid ({'; '.join(source.first_invalid)})" if source.invalid else ""
    empty = f"; {source.empty} empty" if source.empty else ""
    return (
        f"{source.name}: {source.format}; {source.documents:,} documents, {source.windows:,} windows, {tokens}, "
        f"{source.num_bytes:,} bytes; {source.epoch_samples:,} samples per epoch{empty}{invalid}"
    )


def _evenly_spaced(corpus: Corpus) -> list[Sample]:
    """Return training and held-out samples, at most MAX_EXAMINED of them."""
    total, num_train = len(corpus.train) + len(corpus.held_out), len(corpus.train)
    chosen = range(0, total, -(-total // MAX_EXAMINED))
    return [corpus.train[i] if i < num_train else corpus.held_out[i - num_train] for i in chosen]


async def _check_teachers(config: RunConfig, examined: _Data, wait: bool) -> list[Finding]:
    groups = await asyncio.gather(*(_check_teacher(t, examined, config, wait) for t in config.teachers))
    return [finding for group in groups for finding in group]


async def _check_teacher(config: TeacherConfig, examined: _Data, run: RunConfig, wait: bool) -> list[Finding]:
    """Check card, tokenizer, top_k, sample lengths and chats, then score a probe sentence with and without BOS."""
    findings: list[Finding] = []
    data = run.data
    subject = f"teacher {config.name}"
    try:
        async with TeacherPool([teacher_address(config, wait=wait)]) as pool:
            has_chats = any(sample.is_chat for sample in examined.samples)
            teacher = await connect_teacher(pool, config, data, has_chats, closes_texts=run.rollout is not None)
            card = teacher.card
            detail = f"{card.model} on {card.engine}, dtype {card.dtype}, up to K = {card.max_top_k}"
            findings.append(Finding(subject, True, detail))
            if card.protocol_cost:
                findings.append(Finding(subject, True, card.protocol_cost))
            num_tokens = len(teacher.tokenizer.vocabulary)
            findings.append(Finding(subject, True, f"the tokenizer of {num_tokens} tokens matches the card"))
            remarks = check_chats(examined.corpus, {subject: teacher.tokenizer}, data) if examined.corpus else []
            tokenized = _tokenize(teacher, examined.samples, data)
            findings.append(_check_lengths(teacher, tokenized, data))
            findings += _describe_skipped(subject, tokenized.skipped, len(examined.samples))
            if teacher.tokenizer.template is not None:
                findings += _supervision(tokenized, data.supervision.describe(), remarks)
            findings.append(await _check_bos(pool, teacher))
    except (UserError, TeacherError, TokenizerError, AlignmentError) as error:
        findings.append(Finding(subject, False, str(error).removeprefix(subject).lstrip(": ")))
    return findings


def _tokenize(teacher: ConnectedTeacher, samples: Sequence[Sample], data: DataConfig) -> _Tokenized:
    """Tokenize the samples for a teacher, except chats that are skipped."""
    tokenized = _Tokenized(f"teacher {teacher.config.name}")
    for sample in samples:
        try:
            tokenized.add(sample, teacher.tokenizer.tokenize(sample))
        except ChatError as error:
            raise_unless_skipped(error, data)
            tokenized.skipped.append(error)
    return tokenized


def _check_lengths(teacher: ConnectedTeacher, tokenized: _Tokenized, data: DataConfig) -> Finding:
    """Compare the longest sample with the teacher's limit, BOS and EOS included."""
    card, longest = teacher.card, len(teacher.card.prefix) + tokenized.longest if tokenized.count else 0
    detail = f"takes {card.max_tokens} tokens; the longest of {tokenized.count} samples has {longest}"
    fits, shortens = longest <= card.max_tokens, data.too_long == "shorten"
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
