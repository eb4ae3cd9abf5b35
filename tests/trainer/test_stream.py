"""Prefetching: its limits in tokens and bytes, the order of examples, errors, and the measured waiting times."""

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
from starlette.responses import Response

from alignment import Vocabulary
from teachers.protocol.rows import Rows
from teachers.server.static_responses import StaticResponses
from tests.serve import FormulaEngine, serving, until
from tests.tiny import TEXT
from tests.trainer.runs import run_config, write_corpus
from trainer.cli.console import progress_listener
from trainer.config import RunConfig
from trainer.errors import DataError
from trainer.fusion.base import AllGather, single_process
from trainer.fusion.config import FusionConfig
from trainer.fusion.run_fuser import Fuser
from trainer.query.prefetch import CANDIDATE_BYTES
from trainer.query.score import SampleScorer, Tokenizations
from trainer.query.stream import ExampleStream
from trainer.records import Batch, Sample
from trainer.telemetry.collector import Collector, ResponseTime
from trainer.telemetry.jsonl import read_metrics
from trainer.tokenization import SampleTokenizer
from trainer.training.loop import train

WINDOW, TOP_K = 40, 16
QUIET_S = 0.5


class WatchedEngine(FormulaEngine):
    """Record the lengths of all requests in order, and the maximum of tokens requested but not yet consumed.

    The request of the sample with `held` tokens receives its response only after `release` is set. Requests are
    concurrent, so their order on the server may differ from that of the samples.
    """

    def __init__(self, folder: Path, delay_s: float = 0.0) -> None:
        super().__init__(folder, delay_s)
        self.release = threading.Event()
        self.lengths: list[int] = []
        self.consumed_tokens = self.max_pending_tokens = 0
        self.held: int | None = None

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        self.lengths.append(len(sequence) - len(self.card.prefix))
        self.max_pending_tokens = max(self.max_pending_tokens, self.pending_tokens)
        is_held = self.lengths[-1] == self.held
        while is_held and not self.release.is_set():
            await asyncio.sleep(0.005)
        return await super().score(sequence, start, top_k)

    @property
    def pending_tokens(self) -> int:
        return sum(self.lengths) - self.consumed_tokens

    def await_quiet(self, requests: int = 1, tokens: int = 0) -> int:
        """Wait for this many requests, more pending tokens, and QUIET_S without a request. Return the request count."""
        seen, since, deadline = 0, time.monotonic(), time.monotonic() + 30
        while seen < requests or self.pending_tokens <= tokens or time.monotonic() - since < QUIET_S:
            assert time.monotonic() < deadline, f"{seen} requests, {self.pending_tokens} pending tokens"
            if len(self.lengths) != seen:
                seen, since = len(self.lengths), time.monotonic()
            time.sleep(0.01)
        return seen


def samples_of(vocabulary: Vocabulary, count: int) -> list[Sample]:
    """Return different texts of 10 to 40 tokens."""
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
    config: RunConfig,
    vocabulary: Vocabulary,
    batches: Iterable[Sequence[Sample]],
    all_gather: AllGather = single_process,
) -> Iterator[ExampleStream]:
    fuser = Fuser(config, len(vocabulary), all_gather=all_gather)
    with ExampleStream(config, SampleTokenizer(vocabulary, vocabulary.prefix), batches, fuser=fuser) as stream:
        yield stream


def pairs(samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    return [samples[i : i + 2] for i in range(0, len(samples), 2)]


def names(items: Iterable[tuple[Batch, Collector]]) -> list[str]:
    return [example.sample.name for batch, _ in items for example in batch.examples]


@pytest.mark.slow
def test_prefetching_during_a_slow_step_reaches_and_respects_the_token_limit(
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
                    engine.await_quiet(tokens=allowed - WINDOW)  # fails if it stops before the limit
                engine.consumed_tokens += sum(len(vocabulary.encode(sample.text)) for sample in pair)
                order += names([next(batches)])
    assert engine.max_pending_tokens <= allowed
    assert order == [sample.name for sample in samples]


def test_requests_to_a_slow_teacher_stay_within_the_token_limit(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine, allowed = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level), 120
    engine.open.clear()
    samples = samples_of(vocabulary, 12)
    with serving(engine) as url:
        config = config_of(tiny_byte_level, tmp_path, [url], prefetch_tokens=allowed)
        with stream_of(config, vocabulary, pairs(samples)) as stream:
            engine.await_quiet(tokens=allowed - WINDOW)
            assert engine.pending_tokens <= allowed
            engine.open.set()
            assert names(stream) == [sample.name for sample in samples]


def test_prefetched_bytes_are_limited_by_their_measured_size(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    samples = samples_of(vocabulary, 60)
    estimate = WINDOW * TOP_K * CANDIDATE_BYTES  # of one sample, before its size is known
    allowed = 5 * estimate
    with serving(engine) as url:
        config = config_of(tiny_byte_level, tmp_path, [url], prefetch_bytes=allowed)
        with stream_of(config, vocabulary, [[sample] for sample in samples]) as stream:
            num_requests = engine.await_quiet(6)
            examples = [batch.examples[0] for batch, _ in stream]
    sizes = [example.nbytes for example in examples]
    assert num_requests < 60
    assert allowed - estimate < sum(sizes[:num_requests]) <= allowed


@pytest.mark.parametrize("limit", ["prefetch_tokens", "prefetch_bytes"])
def test_limits_below_one_batch_allow_exactly_one_batch(tmp_path: Path, tiny_byte_level: Path, limit: str) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    drawn: list[int] = []

    def batches() -> Iterator[Sequence[Sample]]:
        for number, pair in enumerate(pairs(samples_of(vocabulary, 12))):
            drawn.append(number)
            yield pair

    with serving(engine) as url:
        with stream_of(config_of(tiny_byte_level, tmp_path, [url], **{limit: 1}), vocabulary, batches()) as stream:
            iterator = iter(stream)
            for taken in range(3):
                assert engine.await_quiet(2 * (taken + 1)) == 2 * (taken + 1)
                assert drawn == list(range(taken + 1))
                next(iterator)
            assert len(names(iterator)) == 6


def test_a_slow_sample_does_not_delay_the_requests_of_later_samples(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    samples = samples_of(vocabulary, 20)
    engine.held = len(vocabulary.encode(samples[0].text))
    with serving(engine) as url:
        with stream_of(config_of(tiny_byte_level, tmp_path, [url]), vocabulary, pairs(samples)) as stream:
            assert engine.await_quiet(20) == 20
            engine.release.set()
            assert names(stream) == [sample.name for sample in samples]


def test_a_pending_sample_is_not_requested_again(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    engine.open.clear()
    pair = samples_of(vocabulary, 2)
    with serving(engine) as url:
        with stream_of(config_of(tiny_byte_level, tmp_path, [url]), vocabulary, [pair] * 4) as stream:
            assert engine.await_quiet(2) == 2
            engine.open.set()
            batches = list(stream)
    assert names(batches) == ["s0", "s1"] * 4
    assert ["align" in telemetry.seconds for _, telemetry in batches] == [True, False, False, False]


def test_an_error_is_raised_in_the_order_of_the_batches(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary = Vocabulary.load(tiny_byte_level)
    samples = samples_of(vocabulary, 4)

    def batches() -> Iterator[Sequence[Sample]]:
        yield from pairs(samples)
        raise DataError("the third batch is invalid")

    with serving(FormulaEngine(tiny_byte_level, delay_s=0.1)) as url:
        with stream_of(config_of(tiny_byte_level, tmp_path, [url]), vocabulary, batches()) as stream:
            seen: list[tuple[Batch, Collector]] = []
            with pytest.raises(DataError, match="the third batch"):
                deque(map(seen.append, stream), maxlen=0)
    assert names(seen) == [sample.name for sample in samples]


def test_closing_a_stream_early_ends_its_thread(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    samples = samples_of(vocabulary, 12)
    engine.held = len(vocabulary.encode(samples[4].text))
    with serving(engine) as url:
        with stream_of(config_of(tiny_byte_level, tmp_path, [url]), vocabulary, pairs(samples)) as stream:
            next(iter(stream))
        assert not [thread for thread in threading.enumerate() if thread.name == "stream"]
        engine.release.set()


def test_a_fusion_that_waits_for_another_process_does_not_block_the_exit(tmp_path: Path, tiny_byte_level: Path) -> None:
    """The other process may wait for the exit of this one, so only daemon threads may remain."""
    vocabulary, started, release = Vocabulary.load(tiny_byte_level), threading.Event(), threading.Event()

    def all_gather(value: Any) -> list[Any]:
        started.set()
        assert release.wait(60)
        return [value]

    before = set(threading.enumerate())
    with serving(FormulaEngine(tiny_byte_level)) as url:
        config = config_of(tiny_byte_level, tmp_path, [url])
        config = config.model_copy(update={"fusion": FusionConfig(method="adaptive")})
        with stream_of(config, vocabulary, pairs(samples_of(vocabulary, 4)), all_gather):
            assert started.wait(20)
    remaining = set(threading.enumerate()) - before
    release.set()
    assert "fusion" in {thread.name for thread in remaining}
    assert all(thread.daemon for thread in remaining), remaining


def test_a_signal_handler_can_stop_a_waiting_iteration(tmp_path: Path, tiny_byte_level: Path) -> None:
    vocabulary, engine = Vocabulary.load(tiny_byte_level), WatchedEngine(tiny_byte_level)
    engine.open.clear()
    with serving(engine) as url:
        config = config_of(tiny_byte_level, tmp_path, [url])
        with stream_of(config, vocabulary, pairs(samples_of(vocabulary, 4))) as stream:
            before = signal.signal(signal.SIGUSR1, lambda *_: stream.stop())
            try:
                engine.await_quiet(4)
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
                assert list(stream) == []
            finally:
                signal.signal(signal.SIGUSR1, before)


def test_a_batch_of_skipped_chats_releases_its_reservation(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, tokenize = Vocabulary.load(tiny_byte_level), SampleScorer.tokenize
    items = list[tuple[Batch, Collector]]()

    async def tokenize_or_skip(scorer: SampleScorer, sample: Sample, collector: Collector) -> Tokenizations | None:
        if sample.name == "s1":
            collector.skipped += 1
            return None
        return await tokenize(scorer, sample, collector)

    monkeypatch.setattr(SampleScorer, "tokenize", tokenize_or_skip)
    with serving(FormulaEngine(tiny_byte_level)) as url:
        config = config_of(tiny_byte_level, tmp_path, [url], prefetch_tokens=WINDOW // 2)
        batches = [[sample] for sample in samples_of(vocabulary, 4)]
        with stream_of(config, vocabulary, batches) as stream:
            reader = threading.Thread(target=lambda: items.extend(stream), daemon=True)
            reader.start()
            reader.join(30)
            assert not reader.is_alive()
    assert [(len(batch.examples), telemetry.skipped) for batch, telemetry in items] == [(1, 0), (0, 1), (1, 0), (1, 0)]


class Panic(BaseException):
    """Like the PanicException of Rust extensions, which derives from BaseException."""


def test_a_panic_on_the_query_thread_is_raised_from_the_iteration(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = Vocabulary.load(tiny_byte_level)

    async def panic(*_: object) -> None:
        raise Panic

    monkeypatch.setattr(SampleScorer, "tokenize", panic)
    with serving(FormulaEngine(tiny_byte_level)) as url:
        with stream_of(config_of(tiny_byte_level, tmp_path, [url]), vocabulary, pairs(samples_of(vocabulary, 4))) as s:
            with pytest.raises(Panic):
                list(s)


@pytest.mark.slow
def test_a_batch_has_the_waiting_time_per_teacher_and_the_queue_length(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    vocabulary = Vocabulary.load(tiny_byte_level)
    fast, slow = WatchedEngine(tiny_byte_level), WatchedEngine(tiny_sentencepiece)
    slow.open.clear()
    with serving(fast) as one, serving(slow) as two:
        config = config_of(tiny_byte_level, tmp_path, [one, two])
        with stream_of(config, vocabulary, pairs(samples_of(vocabulary, 8))) as stream:
            batches = iter(stream)
            fast.await_quiet(8)
            threading.Timer(2.0, slow.open.set).start()
            _, first = next(batches)
            asyncio.run(until(lambda: stream._num_made == 4))
            batch, second = next(batches)
    assert first.teacher("t0").wait_s == 0
    assert first.wait_s >= first.teacher("t1").wait_s > 0.4
    assert (first.queued_batches, first.queued_tokens) == (0, 0)
    assert second.wait_s < 0.1
    assert second.teacher("t0").wait_s == second.teacher("t1").wait_s == 0
    assert second.queued_batches == 3
    assert second.queued_tokens > batch.num_tokens


def test_waiting_time_overlaps_the_time_from_request_to_response() -> None:
    last = ResponseTime("t", requested_at=10.0, received_at=12.0)
    assert last.overlap_s(9.0, 13.0) == 2.0
    assert last.overlap_s(11.0, 13.0) == 1.0
    assert last.overlap_s(9.0, 11.5) == 1.5
    assert last.overlap_s(12.5, 13.0) == 0.0


@pytest.mark.slow
def test_metrics_contain_the_times_of_every_step(
    tmp_path: Path,
    tiny_byte_level: Path,
    tiny_sentencepiece: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listing = StaticResponses.listing

    def slow_listing(responses: StaticResponses) -> Response:
        time.sleep(2.0)
        return listing(responses)

    monkeypatch.setattr(StaticResponses, "listing", slow_listing)
    fast, slow = FormulaEngine(tiny_byte_level), FormulaEngine(tiny_sentencepiece, delay_s=0.6)
    with serving(fast) as one, serving(slow) as two:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [one, two])
        config = config.model_copy(update={"train": config.train.model_copy(update={"prefetch_tokens": 1})})
        train(config, listener=progress_listener("a run"))
    start, *events = read_metrics(tmp_path / "out" / "metrics.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    assert start["connect_s"] > 2.0
    assert steps[0]["wait_s"] < start["connect_s"] + 0.6  # connecting does not count for the first step
    assert steps[0]["teachers"]["t1"]["wait_s"] > 0.2
    for step in steps[:3]:  # the second epoch is cached
        assert step["teachers"]["t0"]["wait_s"] == 0
        assert sum(t["wait_s"] for t in step["teachers"].values()) <= step["wait_s"]
        assert min(step["tokenize_s"], step["align_s"], step["fuse_s"]) > 0
        assert 0 <= step["queued_batches"] <= 1  # prefetch_tokens
        assert step["mass"] + step["tail"] == pytest.approx(1, abs=1e-5)
        assert step["coverage"] == 1
        assert 0 < step["teachers"]["t1"]["tokens_per_s"] < 4 * 62 / 0.6  # at most four windows in 0.6 s
        assert step["teachers"]["t0"]["tokens_per_s"] > 0
        assert {"weight", "own_bpb", "aligned_bpb", "mass", "pool"} <= step["teachers"]["t0"].keys()
    assert all(step["align_s"] == 0 for step in steps[3:])
    assert "s for t1)" in capsys.readouterr().err
