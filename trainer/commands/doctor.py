"""Every start-up check of a run, before anything is spent: what is wrong, and with which teacher."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment import TokenizerError, Vocabulary
from teachers.asking.pool import TeacherPool
from teachers.errors import TeacherError
from teachers.protocol import PROBE, Card
from trainer.config import DataConfig, RunConfig, TeacherConfig
from trainer.data.reading import Reader, chat_template, readable
from trainer.data.samples import Corpus, Sample, SourceCounts, load_corpus
from trainer.data.template import ChatError
from trainer.errors import UserError
from trainer.learning.student import check_device, check_folder, reader_of
from trainer.places import find_model
from trainer.run import total_steps
from trainer.targets.asking import address_of, checked_vocabulary
from trainer.targets.fuser import check_routes

EXAMINED = 4096  # samples that are read as every model reads them; they stand for the others where there are more
BOS_MATTERS = 1.1  # nats with and without BOS that differ by more than a tenth are no accident


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is well, and what was seen or has to change."""

    subject: str
    ok: bool
    detail: str


def examine(config: RunConfig) -> list[Finding]:
    """Check student, data and every teacher; a failed check does not keep the others from being made."""
    findings: list[Finding] = []
    samples: Sequence[Sample] = ()
    try:
        check_device(config.student.device)
        folder = find_model(config.student.model)
        vocabulary = Vocabulary.load(folder)
        vocabulary = vocabulary.with_roles(config.student.roles).within(check_folder(folder, config))
        findings.append(Finding("student", True, f"{vocabulary.name}: {len(vocabulary)} tokens"))
        corpus = load_corpus(config.data, config.eval, vocabulary, config.train.seed)
        findings += [Finding("data", True, _holds(source)) for source in corpus.sources]
        check_routes(corpus.train, config)
        samples = _examined(corpus)
        num_read = sum(1 for _ in readable(samples, reader_of(folder, vocabulary, config), config.data))
        if num_read < len(samples):
            detail = (
                f"{len(samples) - num_read} of {len(samples)} samples are chats that cannot be read and are skipped"
            )
            findings.append(Finding("data", True, detail))
        detail = f"{len(corpus.train)} windows to train on, {len(corpus.held_out)} held out"
        findings.append(Finding("data", True, f"{detail}, {total_steps(config, corpus)} steps"))
    except (UserError, TokenizerError) as error:
        findings.append(Finding("data" if findings else "student", False, str(error)))
    return findings + _output(Path(config.output.dir).expanduser()) + asyncio.run(_examine_teachers(config, samples))


def _output(out: Path) -> list[Finding]:
    if out.is_dir() and any(out.iterdir()):
        return [Finding("output", True, f"{out} holds a run already: only --resume goes on with it")]
    return [Finding("output", False, f"output.dir: {out} is a file")] if out.is_file() else []


def _holds(source: SourceCounts) -> str:
    tokens = "chats" if source.tokens is None else f"{source.tokens:,} tokens"
    broken = f"; {source.broken} broken ({'; '.join(source.first_broken)})" if source.broken else ""
    return (
        f"{source.name}: {source.documents:,} documents, {source.windows:,} windows, {tokens}, "
        f"{source.num_bytes:,} bytes; {source.epoch_samples:,} samples an epoch{broken}"
    )


def _examined(corpus: Corpus) -> list[Sample]:
    """All samples, or as many as are examined, at even distances."""
    total, num_train = len(corpus.train) + len(corpus.held_out), len(corpus.train)
    chosen = range(0, total, -(-total // EXAMINED))
    return [corpus.train[i] if i < num_train else corpus.held_out[i - num_train] for i in chosen]


async def _examine_teachers(config: RunConfig, samples: Sequence[Sample]) -> list[Finding]:
    groups = await asyncio.gather(*(_examine_teacher(t, samples, config.data) for t in config.teachers))
    return [finding for group in groups for finding in group]


async def _examine_teacher(teacher: TeacherConfig, samples: Sequence[Sample], data: DataConfig) -> list[Finding]:
    """Card, tokenizer, K, lengths; then a probe sentence, with and without BOS."""
    findings: list[Finding] = []
    who = f"teacher {teacher.name}"
    try:
        async with TeacherPool([address_of(teacher)]) as pool:
            card, files = await pool.connect(teacher.name)
            findings.append(
                Finding(who, True, f"{card.model} on {card.engine}, {card.dtype}, up to K = {card.max_top_k}")
            )
            vocabulary = checked_vocabulary(teacher, card, files)
            findings.append(Finding(who, True, f"tokenizer of {len(vocabulary)} tokens is the one of its card"))
            template = None
            if any(sample.is_chat for sample in samples):
                template = chat_template(files, vocabulary, teacher.roles, teacher.chat_template)
            reader = Reader(vocabulary, card.prefix, template)
            findings.append(_length(teacher, card, reader, samples, data))
            findings.append(await _probe(pool, teacher, card, vocabulary))
    except (UserError, TeacherError, TokenizerError) as error:
        findings.append(Finding(who, False, str(error).removeprefix(who).lstrip(": ")))
    return findings


def _length(teacher: TeacherConfig, card: Card, reader: Reader, samples: Sequence[Sample], data: DataConfig) -> Finding:
    """Every sample, as this teacher will be asked."""
    lengths = [0]
    for sample in samples:
        try:
            lengths.append(len(card.prefix) + len(reader.read(sample)))
        except ChatError:
            if data.broken_chats != "skip":
                raise
    detail = f"takes {card.max_tokens} tokens; the longest of {len(samples)} samples is {max(lengths)} of them"
    fits, shortens = max(lengths) <= card.max_tokens, data.too_long == "shorten"
    advice = "" if fits else "; it is shortened for all" if shortens else ": lower data.window_tokens"
    return Finding(f"teacher {teacher.name}", fits or shortens, detail + advice)


async def _probe(pool: TeacherPool, teacher: TeacherConfig, card: Card, vocabulary: Vocabulary) -> Finding:
    """Score a sentence as the run will, and the other way about BOS, if there is one."""
    ids = vocabulary.encode(PROBE).ids.tolist()
    with_bos = None if card.bos_id is None else await _nats(pool, teacher, [card.bos_id, *ids], 2)
    without = await _nats(pool, teacher, ids, 1)
    used, other = (with_bos, without) if card.expects_bos else (without, with_bos)
    seen = f"probe sentence {used or 0:.2f} nats per token {'with' if card.expects_bos else 'without'} BOS"
    if used is None or (other is not None and used > other * BOS_MATTERS):
        flag = "no" if card.expects_bos else "yes"
        return Finding(
            f"teacher {teacher.name}", False, f"{seen}, {other:.2f} the other way: serve it with --bos {flag}"
        )
    return Finding(f"teacher {teacher.name}", True, seen)


async def _nats(pool: TeacherPool, teacher: TeacherConfig, sequence: list[int], start: int) -> float:
    rows = await pool.score(teacher.name, sequence, start, teacher.top_k)
    return -float(rows.actual.mean())
