"""Connect to the teachers of a run: card, tokenizer and signal of each. A run connects once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from alignment import TokenizerError, Vocabulary
from teachers.client.addresses import TeacherAddress
from teachers.client.events import TeacherEvent
from teachers.client.pool import TeacherPool
from teachers.keys import key_from_environment, key_from_file
from teachers.protocol.errors import ProtocolError, Rejected, TeacherError
from teachers.protocol.messages import TeacherCard
from trainer.distributed import number_of_processes
from trainer.errors import ConfigError
from trainer.paths import resolve_tokenizer_dir, tables_dir
from trainer.query.config import TeacherConfig
from trainer.signals import signal_class
from trainer.signals.base import TeacherSignal
from trainer.sources.config import DataConfig
from trainer.sources.corpus import Corpus
from trainer.tokenization import SampleTokenizer, load_chat_template

T = TypeVar("T")
MAX_PADDING_IDS = 65_536  # ids of a model beyond those of its tokenizer; a table of all ids is allocated


@dataclass(frozen=True, eq=False)
class ConnectedTeacher:
    """A teacher whose card and tokenizer are known and checked."""

    config: TeacherConfig
    card: TeacherCard
    tokenizer: SampleTokenizer


@dataclass(frozen=True, eq=False)
class TeacherConnection:
    """The connected teachers of a run, in the order of the run file, and the signal of each."""

    pool: TeacherPool
    teachers: tuple[ConnectedTeacher, ...]
    signals: tuple[TeacherSignal, ...]

    @property
    def cards(self) -> dict[str, TeacherCard]:
        """Cards by name."""
        return {teacher.config.name: teacher.card for teacher in self.teachers}


@asynccontextmanager
async def connect_teachers(
    configs: Sequence[TeacherConfig],
    student: SampleTokenizer,
    data: DataConfig,
    *,
    closes_texts: bool = False,
    on_event: Callable[[TeacherEvent], None] = lambda _: None,
) -> AsyncIterator[TeacherConnection]:
    """Connect to all teachers concurrently, check each, and load or build its signal.

    Waits up to start_timeout_s of each teacher until it responds; an error that only the user can correct is raised at
    once.

    student       the student's tokenizer of samples; teachers need a chat template if it has one
    closes_texts  whether EOS may follow a text, as after a rollout; data.close_documents implies it
    on_event      called when a teacher is lost or joins again
    Raises TeacherError, TokenizerError or ChatError naming the teacher.
    """
    async with TeacherPool([teacher_address(config) for config in configs], on_event) as pool:
        has_chats = student.template is not None
        teachers = await gather(
            connect_teacher(pool, config, data, has_chats, closes_texts=closes_texts) for config in configs
        )
        signals = [await asyncio.to_thread(_signal, teacher, student.vocabulary) for teacher in teachers]
        try:
            yield TeacherConnection(pool, tuple(teachers), tuple(signals))
        finally:
            for signal in signals:
                signal.close()


async def connect_teacher(
    pool: TeacherPool, config: TeacherConfig, data: DataConfig, has_chats: bool, *, closes_texts: bool = False
) -> ConnectedTeacher:
    """Request one teacher's card and tokenizer files, and check them against the run file and its data.

    has_chats     the data has chats, so that the teacher needs a chat template
    closes_texts  EOS may follow a text, as after a rollout
    Raises TeacherError, TokenizerError or ChatError naming the teacher.
    """
    card, files = await pool.connect(config.name)
    if card.masks_positions and not signal_class(config.signal).supports_masked:
        raise TeacherError(
            f"teacher {config.name}: its server returns token strings; positions with ambiguous strings are masked, "
            f"which signal {config.signal} does not support: set teachers.{config.name}.signal to byte_chain"
        )
    vocabulary = checked_vocabulary(config, card, files)
    if (data.close_documents or closes_texts) and "eos" not in vocabulary.roles:
        ends = "documents (data.close_documents)" if data.close_documents else "rollouts"
        raise TokenizerError(
            f"teacher {config.name}: its tokenizer has no EOS for the ends of {ends}; set eos in the roles of this "
            "teacher"
        )
    template = None
    if has_chats:
        template = load_chat_template(files, vocabulary, config.roles, config.chat_template, data.supervision)
    return ConnectedTeacher(config, card, SampleTokenizer(vocabulary, card.prefix, template))


def check_chat_support(teachers: Sequence[TeacherConfig], corpus: Corpus) -> None:
    """Raise ConfigError if the data has chats or masked prompts, and the signal of a teacher is for texts only."""
    for source in corpus.sources:
        for teacher in teachers:
            if (source.is_chat or source.has_prompt) and not teacher.supports_chats:
                raise ConfigError(
                    f"teachers: teacher {teacher.name} has signal {teacher.signal!r}, which is for texts; source "
                    f"{source.name} has {source.format}, which require a signal that supports them, for example "
                    "byte_chain"
                )


def checked_vocabulary(config: TeacherConfig, card: TeacherCard, files: Mapping[str, bytes]) -> Vocabulary:
    """Return the teacher's vocabulary.

    Raises TeacherError or TokenizerError, naming the teacher, if top_k exceeds the teacher's limit, if the tokenizer
    has ids that the model does not have or far fewer ids, or if the BOS of card and tokenizer differ.
    """
    if config.top_k > card.max_top_k:
        raise Rejected(
            f"teacher {config.name}: top_k is {config.top_k}, the teacher returns at most {card.max_top_k}: "
            "lower top_k, or raise the limit of the server (tutelage serve --max-top-k, vllm serve --max-logprobs)"
        )
    vocabulary = Vocabulary.from_files(files, name=config.name)
    if card.vocab_size > max(2 * len(vocabulary), len(vocabulary) + MAX_PADDING_IDS):
        raise ProtocolError(
            f"teacher {config.name}: its card states a vocabulary of {card.vocab_size} ids, its tokenizer has "
            f"{len(vocabulary)}: more than padding explains; serve the model with its own tokenizer"
        )
    vocabulary = vocabulary.within(card.vocab_size).with_roles(config.roles)
    bos = vocabulary.roles.get("bos")
    if card.prefix and bos is not None and card.prefix != [bos]:
        raise TeacherError(
            f"teacher {config.name}: the server puts token {card.prefix[0]} in front of every text, the tokenizer's "
            f"BOS is {bos}; if that is wrong, set bos in the roles of this teacher"
        )
    return vocabulary


def teacher_address(config: TeacherConfig, *, wait: bool = True) -> TeacherAddress:
    """Return the address and the connection settings of a teacher. Without `wait`, connecting tries once.

    Raises TeacherError if the teacher's key cannot be read, and ConfigError if its tokenizer is missing.
    """
    return TeacherAddress(
        name=config.name,
        urls=tuple(config.urls),
        urls_file=Path(config.urls_file) if config.urls_file else None,
        key=_key(config),
        ca_file=Path(config.ca_file) if config.ca_file else None,
        tokenizer=_tokenizer_dir(config),
        dialect=config.dialect,
        model=config.model,
        timeout_s=config.timeout_s,
        start_timeout_s=config.start_timeout_s if wait else 0.0,
        unavailable_timeout_s=config.unavailable_timeout_s,
        on_unavailable=config.on_unavailable,
        concurrency=config.concurrency,
        tokens_per_minute=max(config.tokens_per_minute // number_of_processes(), 1)
        if config.tokens_per_minute
        else None,
    )


def _tokenizer_dir(config: TeacherConfig) -> Path | None:
    try:
        return resolve_tokenizer_dir(config.tokenizer) if config.tokenizer else None
    except ConfigError as error:
        raise ConfigError(f"teachers.{config.name}.tokenizer: {error}") from error


def _key(config: TeacherConfig) -> str | None:
    try:
        if config.key_file is not None:
            return key_from_file(Path(config.key_file))
        return key_from_environment(config.key_env) if config.key_env is not None else None
    except TeacherError as error:
        raise TeacherError(f"teacher {config.name}: {error}") from error


def _signal(teacher: ConnectedTeacher, student: Vocabulary) -> TeacherSignal:
    signal = signal_class(teacher.config.signal)
    return signal(teacher.tokenizer.vocabulary, student, teacher.card.vocab_size, tables_dir())


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently and return their results in order.

    The first error cancels the other coroutines and is raised without an exception group.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
