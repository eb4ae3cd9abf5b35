"""Whole runs in which a tiny student learns from tiny teachers on its own rollouts."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from teachers.protocol.errors import Unavailable
from tests.trainer.ranks import train_on_ranks
from tests.trainer.runs import losses, run_config, served_models, write_corpus
from tests.trainer.test_chat_run import chat_config, write_chats
from trainer.chats.jinja_template import ChatError
from trainer.config import RunConfig
from trainer.errors import CheckpointError
from trainer.rollouts.base import SampledTokens, Sampling
from trainer.rollouts.batches import OnPolicyBatches
from trainer.rollouts.prompts import PromptBuilder
from trainer.rollouts.transformers_engine import TransformersEngine
from trainer.telemetry.jsonl import read_metrics
from trainer.training.loop import train


@pytest.fixture(autouse=True)
def ascii_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiny models write ASCII. They would write bytes that are not UTF-8, which end a rollout."""
    own = PromptBuilder._sampling

    def sampling(builder: PromptBuilder, end_ids: frozenset[int]) -> Sampling:
        token_bytes = builder.tokenizer.vocabulary.token_bytes
        banned = (i for i, data in enumerate(token_bytes) if i not in end_ids and not (data and data.isascii()))
        return replace(own(builder, end_ids), banned_ids=tuple(banned))

    monkeypatch.setattr(PromptBuilder, "_sampling", sampling)


def rollout_config(model: Path, corpus: Path, out: Path, urls: list[str], **rollout: Any) -> RunConfig:
    """Return a run of six steps of four samples, with rollouts of at most 16 tokens."""
    settings = {"prompt_tokens": 8, "max_new_tokens": 16, "top_p": 0.9} | rollout
    return run_config(model, corpus, out, urls, rollout=settings)


def steps_of(out: Path) -> list[Any]:
    return [event for event in read_metrics(out / "metrics.jsonl") if event["event"] == "step"]


def test_a_student_learns_from_teachers_with_other_tokenizers_on_its_own_text(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        train(rollout_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls))
    steps = steps_of(tmp_path / "out")
    assert len(steps) == 6
    for step in steps:
        rollouts = step["rollouts"]
        assert (step["cross_entropy"], rollouts["samples"], rollouts["tokens"]) == (None, 4, step["tokens"])
        assert step["loss"] == pytest.approx(rollouts["divergence"])
        assert rollouts["max_age_steps"] == rollouts["age_steps"] == 0
        assert rollouts["length"] + rollouts["cut"] / 4 <= 16
        assert math.isfinite(step["teachers"]["t1"]["rollout_bpb"])
    # A teacher with the student's weights reads the text as the student wrote it; later the two differ.
    assert steps[0]["teachers"]["t0"]["rollout_bpb"] == pytest.approx(steps[0]["rollouts"]["own_bpb"], rel=1e-4)


def test_held_out_prompts_are_continued_at_every_evaluation(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus = write_corpus(tmp_path)
    with served_models(tiny_byte_level) as urls:
        raw = rollout_config(tiny_byte_level, corpus, tmp_path / "out", urls, eval_prompts=4).model_dump()
        raw["eval"]["every_steps"], raw["optim"]["lr"] = 3, 1e-9
        train(RunConfig.model_validate(raw))
    events = [event for event in read_metrics(tmp_path / "out" / "metrics.jsonl") if event["event"] == "rollout_eval"]
    assert [event["step"] for event in events] == [0, 3, 6]
    for event in events:
        assert event["samples"] == 4
        # The student has hardly changed: it writes the same text again, and the teacher is the same model.
        assert event["own_bpb"] == pytest.approx(events[0]["own_bpb"], rel=1e-4)
        assert event["teachers"]["t0"] == pytest.approx(event["own_bpb"], rel=1e-4)


@pytest.mark.parametrize("staleness", [0, 2])
def test_weights_that_sampled_are_as_old_as_the_setting_permits(
    tmp_path: Path, tiny_byte_level: Path, staleness: int
) -> None:
    with served_models(tiny_byte_level) as urls:
        config = rollout_config(
            tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, max_staleness_steps=staleness
        )
        train(config)
    steps = steps_of(tmp_path / "out")
    assert [step["rollouts"]["max_age_steps"] for step in steps] == [min(n, staleness) for n in range(6)]
    own_nats = [r["own_bpb"] * math.log(2) * r["num_bytes"] for r in (step["rollouts"] for step in steps)]
    trained_nats = [r["cross_entropy"] * r["tokens"] for r in (step["rollouts"] for step in steps)]
    same = [a == pytest.approx(b, rel=1e-5) for a, b in zip(own_nats, trained_nats, strict=True)]
    assert same[0]
    assert all(same) == (staleness == 0)


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_resumed_run_has_the_rollouts_and_the_losses_of_an_uninterrupted_run(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, staleness: int
) -> None:
    corpus = write_corpus(tmp_path)
    settings = {"max_staleness_steps": staleness, "share": 0.5, "samples_per_prompt": 2}
    with served_models(tiny_sentencepiece) as urls:
        uninterrupted, resumed = (
            rollout_config(tiny_byte_level, corpus, tmp_path / name, urls, **settings)
            for name in ("uninterrupted", "resumed")
        )
        train(uninterrupted)
        train(resumed, stop_at=3)
        train(resumed, resume=True)
    one, two = losses(tmp_path / "uninterrupted"), losses(tmp_path / "resumed")
    assert one.keys() == two.keys() == set(range(1, 7))
    assert [two[n] for n in one] == pytest.approx(list(one.values()), abs=1e-6)
    kinds = {step["rollouts"]["samples"] for step in steps_of(tmp_path / "resumed")}
    assert kinds == {4}, "two of the four samples are replaced by two rollouts each"
    assert all(step["cross_entropy"] is not None for step in steps_of(tmp_path / "resumed"))


def test_a_run_that_is_stopped_while_it_samples_continues_as_if_it_had_not_been(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    corpus = write_corpus(tmp_path)
    stops: list[Callable[[], None]] = []

    @contextmanager
    def on_stop(stop: Callable[[], None]) -> Iterator[None]:
        stops.append(stop)
        yield

    def stop_after_step_2(event: Any) -> None:
        if event["event"] == "step" and event["step"] == 2:
            stops[-1]()

    with served_models(tiny_sentencepiece) as urls:
        uninterrupted, stopped = (
            rollout_config(tiny_byte_level, corpus, tmp_path / name, urls, max_staleness_steps=1)
            for name in ("uninterrupted", "stopped")
        )
        train(uninterrupted)
        assert train(stopped, listener=stop_after_step_2, on_stop=on_stop).terminated
        train(stopped, resume=True)
    one, two = losses(tmp_path / "uninterrupted"), losses(tmp_path / "stopped")
    assert two == pytest.approx(one, abs=1e-6)


def test_a_run_with_rollouts_cannot_continue_without_them(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus = write_corpus(tmp_path)
    with served_models(tiny_byte_level) as urls:
        train(rollout_config(tiny_byte_level, corpus, tmp_path / "on", urls), stop_at=1)
        train(run_config(tiny_byte_level, corpus, tmp_path / "off", urls), stop_at=1)
        with pytest.raises(CheckpointError, match=r"\[rollout\] = True, this run has None"):
            train(run_config(tiny_byte_level, corpus, tmp_path / "on", urls), resume=True)
        with pytest.raises(CheckpointError, match=r"\[rollout\] = None, this run has True"):
            train(rollout_config(tiny_byte_level, corpus, tmp_path / "off", urls), resume=True)


def test_an_error_of_a_later_batch_is_raised_although_the_first_batch_is_complete(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = OnPolicyBatches._batch, list[int]()

    def batch(self: OnPolicyBatches, step: int, version: int, should_stop: Callable[[], bool]) -> Any:
        calls.append(step)
        if step == 2:
            while not should_stop():
                time.sleep(0.01)
        samples = own(self, step, version, should_stop)
        refusal = ChatError("the second batch is refused")
        return [replace(each, refusal=refusal) for each in samples or ()] if step == 1 else samples

    monkeypatch.setattr(OnPolicyBatches, "_batch", batch)
    with served_models(tiny_byte_level) as urls:
        config = rollout_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, max_staleness_steps=3)
        with pytest.raises(ChatError, match="the second batch is refused"):
            train(config)
    assert calls == [0, 1, 2]


def test_an_error_of_a_teacher_ends_the_sampling(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def sample_until_stopped(*arguments: Any) -> list[SampledTokens]:
        while not arguments[-1]():
            time.sleep(0.01)
        asked.append(True)
        return []

    monkeypatch.setattr(TransformersEngine, "sample", sample_until_stopped)
    with pytest.raises(Unavailable):
        train(rollout_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", ["http://127.0.0.1:9"]))
    assert asked


@pytest.mark.slow
def test_two_sharded_processes_sample_with_complete_weights(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    corpus = write_corpus(tmp_path)
    with served_models(tiny_sentencepiece) as urls:
        config = rollout_config(tiny_byte_level, corpus, tmp_path / "out", urls, share=0.75)
        train_on_ranks(config, 2)
    for step in steps_of(tmp_path / "out"):
        rollouts = step["rollouts"]
        assert rollouts["samples"] == 3
        own_nats = rollouts["own_bpb"] * math.log(2) * rollouts["num_bytes"]
        assert rollouts["cross_entropy"] * rollouts["tokens"] == pytest.approx(own_nats, rel=1e-4)


@pytest.mark.slow
def test_answers_of_chats_are_scored_in_the_template_of_each_teacher(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        teachers = dict(zip(urls, ("byte_level", "sentencepiece"), strict=True))
        raw = chat_config(tmp_path, tiny_byte_level, teachers, write_chats(tmp_path)).model_dump()
        raw["rollout"] = {"max_new_tokens": 16, "top_p": 0.9}
        train(RunConfig.model_validate(raw))
    steps = steps_of(tmp_path / "out")
    assert sum(step["rollouts"]["samples"] for step in steps) == 16
    assert sum(step["skipped"] for step in steps) == 0, "empty and unfinished answers are scored, too"
    # A teacher with the student's weights and template reads every answer as the student wrote it.
    assert steps[0]["teachers"]["t0"]["rollout_bpb"] == pytest.approx(steps[0]["rollouts"]["own_bpb"], rel=1e-4)
    first = steps[0]["rollouts"]
    own_nats = first["own_bpb"] * math.log(2) * first["num_bytes"]
    assert first["cross_entropy"] * first["tokens"] == pytest.approx(own_nats, rel=1e-4)
    assert steps[0]["coverage"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_chats_that_the_student_cannot_continue_are_skipped(
    tmp_path: Path, tiny_byte_level: Path, share: float
) -> None:
    spelled = [{"role": "user", "content": "What is <|eos|>?"}, {"role": "assistant", "content": "A token."}]
    long = [{"role": "user", "content": "How long? " * 200}, {"role": "assistant", "content": "Long."}]
    with served_models(tiny_byte_level) as urls:
        chats = write_chats(tmp_path, extra=(spelled, long))
        raw = chat_config(tmp_path, tiny_byte_level, {urls[0]: "byte_level"}, chats).model_dump()
        raw["rollout"] = {"max_new_tokens": 16, "share": share}
        raw["data"]["invalid_chats"] = "skip"
        raw["eval"]["held_out_documents"] = 0
        train(RunConfig.model_validate(raw))
    steps = steps_of(tmp_path / "out")
    assert sum(step["skipped"] for step in steps) == 4, "two chats in two epochs"
    if share == 1.0:
        assert all(step["cross_entropy"] is None for step in steps), "they are not trained on as given text"
        assert sum(step["rollouts"]["samples"] for step in steps) == 20
