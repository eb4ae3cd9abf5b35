"""What is under way ahead of the step: never more than allowed, never less than there is room for; who is waited on."""

import asyncio
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from alignment import Vocabulary
from teachers.rows import Rows
from tests.serve import FormulaEngine, serving, until
from tests.tiny import TEXT
from tests.trainer.runs import run_config, write_corpus
from trainer.commands.console import watching
from trainer.config import FusionConfig, RunConfig
from trainer.data.reading import Reader
from trainer.data.samples import Sample
from trainer.errors import DataError
from trainer.loop import train
from trainer.reports.metrics import read_metrics
from trainer.targets.ahead import CANDIDATE_BYTES
from trainer.targets.asking import Read, Teachers
from trainer.targets.fuser import Fuser
from trainer.targets.fusion import Gathered, alone
from trainer.targets.pipeline import Batch, LastAnswer, TargetStream

WINDOW, TOP_K = 40, 16
QUIET_S = 0.5


class WatchedEngine(FormulaEngine):
    """Remembers what it was asked, in order, and the most tokens that were asked for and not taken by the step.

    The question whose number is `held` it answers only once `release` is set.
    """

    def __init__(self, folder: Path, delay_s: float = 0.0) -> None:
        super().__init__(folder, delay_s)
        self.release = threading.Event()
        self.lengths: list[int] = []
        self.taken_tokens = self.most_tokens = 0
        self.held: int | None = None

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        self.lengths.append(len(sequence) - len(self.card.prefix))
        self.most_tokens = max(self.most_tokens, self.under_way)
        held = len(self.lengths) - 1 == self.held
        while held and not self.release.is_set():
            await asyncio.sleep(0.005)
        return await super().score(sequence, start, top_k)

    @property
    def under_way(self) -> int:
        return sum(self.lengths) - self.taken_tokens

    def settled(self, questions: int = 1, tokens: int = 0) -> int:
        """Questions so far, once there are so many, with more tokens than these, and none has come for a while."""
        seen, since, deadline = 0, time.monotonic(), time.monotonic() + 30
        while seen < questions or self.under_way <= tokens or time.monotonic() - since < QUIET_S:
            assert time.monotonic() < deadline, f"{seen} questions, {self.under_way} tokens under way"
            if len(self.lengths) != seen:
                seen, since = len(self.lengths), time.monotonic()
            time.sleep(0.01)
        return seen


def samples_of(vocabulary: Vocabulary, count: int) -> list[Sample]:
    """Texts of 10 to 40 tokens, all different."""
    tokens = vocabulary.encode(TEXT)
    ends = [0, *tokens.ends.tolist()]
    lengths = [10 + 7 * n % 30 for n in range(count)]
    texts = [tokens.text[ends[n] : ends[n + length]].decode() for n, length in enumerate(lengths)]
    samples = [Sample(n, f"s{n}", text) for n, text in enumerate(texts)]
    assert all(5 < len(vocabulary.encode(sample.text)) <= WINDOW for sample in samples)
    return samples


def config_of(model: Path, folder: Path, urls: list[str], **train: Any) -> RunConfig:
    sections = {"data": {"window_tokens": WINDOW}, "train": {"target_cache_bytes": 0} | train}
    return run_config(model, folder / "corpus", folder / "out", urls, **sections)


@contextmanager
def stream_of(
    config: RunConfig, vocabulary: Vocabulary, batches: Iterable[Sequence[Sample]], gathered: Gathered = alone
) -> Iterator[TargetStream]:
    fuser = Fuser(config, len(vocabulary), gathered=gathered)
    with TargetStream(config, Reader(vocabulary, vocabulary.prefix), batches, fuser=fuser) as stream:
        yield stream


def pairs(samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    return [samples[i : i + 2] for i in range(0, len(samples), 2)]


def names(batches: Iterable[Batch]) -> list[str]:
    return [lesson.sample.name for batch in batches for lesson in batch.lessons]


def test_a_slow_step_stops_the_asking_at_the_tokens_allowed_and_nowhere_before(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    vocabulary, engine, allowed = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level), 300
    samples = samples_of(vocabulary, 60)
    with serving(engine) as url:
        config = config_of(tiny_byte_level, tmp_path, [url], prefetch_tokens=allowed)
        with stream_of(config, vocabulary, pairs(samples)) as stream:
            batches, order = iter(stream), list[str]()
            for number, pair in enumerate(pairs(samples)):
                if number < 5:
                    engine.settled(tokens=allowed - WINDOW)  # or there was room, and it stayed idle
                engine.taken_tokens += sum(len(vocabulary.encode(sample.text)) for sample in pair)
                order += names([next(batches)])
    assert engine.most_tokens <= allowed
    assert order == [sample.name for sample in samples]


def test_a_slow_teacher_is_asked_for_no_more_tokens_than_allowed(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine, allowed = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level), 120
    engine.open.clear()
    samples = samples_of(vocabulary, 12)
    with serving(engine) as url:
        config = config_of(tiny_byte_level, tmp_path, [url], prefetch_tokens=allowed)
        with stream_of(config, vocabulary, pairs(samples)) as stream:
            engine.settled(tokens=allowed - WINDOW)
            assert engine.under_way <= allowed
            engine.open.set()
            assert names(stream) == [sample.name for sample in samples]


def test_the_bytes_that_wait_are_bounded_as_they_are_measured(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    samples = samples_of(vocabulary, 60)
    most = WINDOW * TOP_K * CANDIDATE_BYTES  # of one sample, before it is read
    allowed = 5 * most
    with serving(engine) as url:
        config = config_of(tiny_byte_level, tmp_path, [url], prefetch_bytes=allowed)
        with stream_of(config, vocabulary, [[sample] for sample in samples]) as stream:
            num_asked = engine.settled(6)
            lessons = [batch.lessons[0] for batch in stream]
    waiting = [lesson.reading.nbytes + lesson.target.nbytes for lesson in lessons if lesson.target is not None]
    assert num_asked < 60
    assert allowed - most < sum(waiting[:num_asked]) <= allowed


@pytest.mark.parametrize("bound", ["prefetch_tokens", "prefetch_bytes"])
def test_one_batch_is_always_under_way_and_no_second_one_beyond_the_bounds(
    tmp_path: Path, tiny_byte_level: Path, bound: str
) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    drawn: list[int] = []

    def batches() -> Iterator[Sequence[Sample]]:
        for number, pair in enumerate(pairs(samples_of(vocabulary, 12))):
            drawn.append(number)
            yield pair

    with serving(engine) as url:
        with stream_of(config_of(tiny_byte_level, tmp_path, [url], **{bound: 1}), vocabulary, batches()) as stream:
            taking = iter(stream)
            for taken in range(3):
                assert engine.settled(2 * (taken + 1)) == 2 * (taken + 1)
                assert drawn == list(range(taken + 1))
                next(taking)
            assert len(names(taking)) == 6


def test_a_slow_sample_keeps_no_later_one_from_being_asked(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    engine.held = 0  # the first question is not answered until it is released
    samples = samples_of(vocabulary, 20)
    with serving(engine) as url:
        with stream_of(config_of(tiny_byte_level, tmp_path, [url]), vocabulary, pairs(samples)) as stream:
            assert engine.settled(20) == 20
            engine.release.set()
            assert names(stream) == [sample.name for sample in samples]


def test_a_sample_that_is_on_its_way_is_not_asked_again(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    engine.open.clear()
    pair = samples_of(vocabulary, 2)
    with serving(engine) as url:
        with stream_of(config_of(tiny_byte_level, tmp_path, [url]), vocabulary, [pair] * 4) as stream:
            assert engine.settled(2) == 2
            engine.open.set()
            batches = list(stream)
    assert names(batches) == ["s0", "s1"] * 4
    assert [batch.align_s > 0 for batch in batches] == [True, False, False, False]


def test_an_error_comes_in_its_place_in_the_order(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary = Vocabulary.load(tiny_byte_level)
    samples = samples_of(vocabulary, 4)

    def batches() -> Iterator[Sequence[Sample]]:
        yield from pairs(samples)
        raise DataError("the third batch cannot be read")

    with serving(FormulaEngine(tiny_byte_level, delay_s=0.1)) as url:
        with stream_of(config_of(tiny_byte_level, tmp_path, [url]), vocabulary, batches()) as stream:
            seen: list[Batch] = []
            with pytest.raises(DataError, match="the third batch"):
                deque(map(seen.append, stream), maxlen=0)
    assert names(seen) == [sample.name for sample in samples]


def test_a_stream_that_is_left_in_the_middle_ends_its_thread(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    engine.held = 4
    with serving(engine) as url:
        with stream_of(
            config_of(tiny_byte_level, tmp_path, [url]), vocabulary, pairs(samples_of(vocabulary, 12))
        ) as stream:
            next(iter(stream))
        assert not [thread for thread in threading.enumerate() if thread.name == "targets"]
        engine.release.set()


def test_a_fusion_that_waits_for_another_process_does_not_hold_up_the_end_of_this_one(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    """The other one may wait for that end: only daemons may be left."""
    vocabulary, begun, release = Vocabulary.load(tiny_byte_level), threading.Event(), threading.Event()

    def gathered(mine: Any) -> list[Any]:
        begun.set()
        assert release.wait(60)
        return [mine]

    before = set(threading.enumerate())
    with serving(FormulaEngine(tiny_byte_level)) as url:
        config = config_of(tiny_byte_level, tmp_path, [url])
        config = config.model_copy(update={"fusion": FusionConfig(method="adaptive")})
        with stream_of(config, vocabulary, pairs(samples_of(vocabulary, 4)), gathered):
            assert begun.wait(20)
    left = set(threading.enumerate()) - before
    release.set()
    assert "waits for others" in {thread.name for thread in left}
    assert all(thread.daemon for thread in left), left


def test_a_signal_handler_ends_an_iteration_that_waits(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    engine.open.clear()
    with serving(engine) as url:
        config = config_of(tiny_byte_level, tmp_path, [url])
        with stream_of(config, vocabulary, pairs(samples_of(vocabulary, 4))) as stream:
            before = signal.signal(signal.SIGUSR1, lambda *_: stream.stop())
            try:
                engine.settled(4)
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
                assert list(stream) == []
            finally:
                signal.signal(signal.SIGUSR1, before)


def test_a_batch_of_skipped_chats_alone_makes_room_for_the_next(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, read, batches = Vocabulary.load(tiny_byte_level), Teachers.read, list[Batch]()

    async def read_or_skip(teachers: Teachers, sample: Sample) -> Read | None:
        return None if sample.name == "s1" else await read(teachers, sample)

    monkeypatch.setattr(Teachers, "read", read_or_skip)
    with serving(FormulaEngine(tiny_byte_level)) as url:
        config = config_of(tiny_byte_level, tmp_path, [url], prefetch_tokens=WINDOW // 2)
        alone = [[sample] for sample in samples_of(vocabulary, 4)]
        with stream_of(config, vocabulary, alone) as stream:
            taking = threading.Thread(target=lambda: batches.extend(stream), daemon=True)
            taking.start()
            taking.join(30)
            assert not taking.is_alive()
    assert [(len(batch.lessons), batch.num_skipped) for batch in batches] == [(1, 0), (0, 1), (1, 0), (1, 0)]


class Panic(BaseException):
    """As what is written in Rust raises it."""


def test_a_panic_on_the_way_is_raised_from_the_iteration(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = Vocabulary.load(tiny_byte_level)

    async def panic(*_: object) -> None:
        raise Panic

    monkeypatch.setattr(Teachers, "read", panic)
    with serving(FormulaEngine(tiny_byte_level)) as url:
        with stream_of(config_of(tiny_byte_level, tmp_path, [url]), vocabulary, pairs(samples_of(vocabulary, 4))) as s:
            with pytest.raises(Panic):
                list(s)


def test_the_step_knows_on_whom_it_waited_and_how_deep_the_queue_was(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    vocabulary = Vocabulary.load(tiny_byte_level)
    fast, slow = WatchedEngine(tiny_byte_level), WatchedEngine(tiny_sentencepiece)
    slow.open.clear()
    with serving(fast) as one, serving(slow) as two:
        config = config_of(tiny_byte_level, tmp_path, [one, two])
        with stream_of(config, vocabulary, pairs(samples_of(vocabulary, 8))) as stream:
            batches = iter(stream)
            fast.settled(8)
            threading.Timer(2.0, slow.open.set).start()
            first = next(batches)
            asyncio.run(until(lambda: stream._made == 4))
            second = next(batches)
    assert first.waited_on.keys() == {"t1"}
    assert first.waited_s >= first.waited_on["t1"] > 0.4
    assert (first.queued_batches, first.queued_tokens) == (0, 0)
    assert second.waited_s < 0.1
    assert not second.waited_on
    assert second.queued_batches == 3
    assert second.queued_tokens > second.num_tokens


def test_only_the_time_between_question_and_answer_is_a_teachers() -> None:
    last = LastAnswer("t", asked_at=10.0, came_at=12.0)
    assert last.missing_s(9.0, 13.0) == 2.0
    assert last.missing_s(11.0, 13.0) == 1.0
    assert last.missing_s(9.0, 11.5) == 1.5
    assert last.missing_s(12.5, 13.0) == 0.0


class SlowToConnect(FormulaEngine):
    @property
    def tokenizer_files(self) -> dict[str, Path]:
        time.sleep(2.0)
        return super().tokenizer_files


def test_metrics_say_where_the_time_of_every_step_went(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast, slow = SlowToConnect(tiny_byte_level), FormulaEngine(tiny_sentencepiece, delay_s=0.6)
    with serving(fast) as one, serving(slow) as two:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [one, two])
        config = config.model_copy(update={"train": config.train.model_copy(update={"prefetch_tokens": 1})})
        train(config, listener=watching("a run"))
    start, *events = read_metrics(tmp_path / "out" / "metrics.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    assert start["connect_s"] > 2.0
    assert steps[0]["waited_s"] < start["connect_s"] + 0.6  # connecting is not the first step's
    assert steps[0]["teachers"]["t1"]["waited_s"] > 0.2
    for step in steps[:3]:  # the second epoch comes from memory
        assert step["teachers"]["t0"]["waited_s"] == 0
        assert sum(t["waited_s"] for t in step["teachers"].values()) <= step["waited_s"]
        assert min(step["read_s"], step["align_s"], step["fuse_s"]) > 0
        assert 0 <= step["queued_batches"] <= 1  # prefetch_tokens
        assert step["mass"] + step["tail"] == pytest.approx(1, abs=1e-5)
        assert step["coverage"] == 1
        assert 0 < step["teachers"]["t1"]["tokens_per_s"] < 4 * 62 / 0.6  # at most four windows in 0.6 s
        assert step["teachers"]["t0"]["tokens_per_s"] > 0
        assert {"share", "own_bpb", "aligned_bpb", "mass", "fleet"} <= step["teachers"]["t0"].keys()
    assert all(step["align_s"] == 0 for step in steps[3:])
    assert "of them on t1" in capsys.readouterr().err
