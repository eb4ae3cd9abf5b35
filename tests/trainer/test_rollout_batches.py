"""Admission of rollouts by the age of the weights: a simulation of training loops that stop and resume."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import TEXT, tiny_vocabulary
from trainer.config import RunConfig
from trainer.distributed import Ranks
from trainer.records import Sample
from trainer.rollouts.base import Prompt, SampledTokens
from trainer.rollouts.batches import OnPolicyBatches, WaitingRollouts, waiting_rollouts
from trainer.rollouts.config import RolloutConfig
from trainer.rollouts.prompts import PromptBuilder
from trainer.sources.sample_order import weighted_order
from trainer.tokenization import SampleTokenizer

VOCABULARY = tiny_vocabulary("byte_level")
LINES = [line for line in TEXT.splitlines() if len(line) > 40]
SAMPLES = [Sample(i, f"line {i}", text=line) for i, line in enumerate(LINES)]
CORPUS: Any = SimpleNamespace(train=SAMPLES, order=weighted_order([len(SAMPLES)], [1.0], seed=0))


class CountingEngine:
    """Samples one token for each prompt, and counts the prompts."""

    def __init__(self) -> None:
        self.num_prompts = 0

    def sample(
        self,
        student: Any,
        prompts: Sequence[Prompt],
        seed: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> list[SampledTokens]:
        self.num_prompts += len(prompts)
        (token,) = VOCABULARY.encode("!").ids.tolist()
        return [SampledTokens((token,), (-1.0,), (1.0,), "length")] * len(prompts)


def config_of(staleness: int, share: float, num_steps: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "student": {"model": "tiny"},
            "data": {"sources": [{"files": ["text.jsonl"]}], "window_tokens": 200},
            "teachers": [{"name": "t", "urls": ["http://127.0.0.1:9"]}],
            "rollout": {"prompt_tokens": 5, "max_staleness_steps": staleness, "share": share},
            "train": {"batch_samples": 3, "steps": num_steps, "epochs": 99},
            "output": {"dir": str(Path("out"))},
        }
    )


def batches_of(
    config: RunConfig, ranks: Ranks, steps: range, num_steps: int, waiting: WaitingRollouts
) -> tuple[OnPolicyBatches, CountingEngine]:
    engine, tokenizer = CountingEngine(), SampleTokenizer(VOCABULARY, VOCABULARY.prefix)
    student: Any = None
    batches = OnPolicyBatches(
        config, CORPUS, student, tokenizer, ranks, steps, num_steps=num_steps, waiting=waiting, engine=engine
    )
    return batches, engine


@given(
    st.integers(0, 4),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(1, 9),
    st.lists(st.integers(1, 9), max_size=3, unique=True).map(sorted),
)
def test_every_batch_comes_once_with_weights_of_the_permitted_age(
    staleness: int, share: float, num_steps: int, stops: list[int]
) -> None:
    config = config_of(staleness, share, num_steps)
    done, num_prompts, used = 0, 0, list[tuple[int, Sample]]()
    waiting: WaitingRollouts = {}
    for end in [*(stop for stop in stops if stop < num_steps), num_steps]:
        batches, engine = batches_of(config, Ranks(), range(done, end), num_steps, waiting)
        items = iter(batches)
        batches.advance(done, lambda: False)
        while done < end:
            for sample in next(items):  # waits forever if the batch was not sampled
                used.append((done, sample))
            done += 1
            state = json.loads(json.dumps(batches.state(done)))  # as in a checkpoint
            batches.advance(done, lambda: False)
        assert next(items, None) is None
        waiting = waiting_rollouts([batches.state(done)])
        assert state.keys() <= batches.state(done).keys()
        num_prompts += engine.num_prompts
    ages = [step - sample.written_by for step, sample in used if sample.written_by is not None]
    assert len(used) == 3 * num_steps
    assert all(0 <= age <= staleness for age in ages)
    assert num_prompts == len(ages), "everything that was sampled is used once"
    if share == 1.0:
        assert len(ages) == len(used)
        assert [step - staleness for step, _ in used if step >= staleness] == [
            sample.written_by for step, sample in used if step >= staleness
        ]


def waiting_after_start(config: RunConfig) -> WaitingRollouts:
    """Return the rollouts that wait before the first step."""
    batches, _ = batches_of(config, Ranks(), range(4), 4, {})
    batches.advance(0, lambda: False)
    return waiting_rollouts([batches.state(0)])


def test_what_was_sampled_is_used_after_a_change_of_the_share() -> None:
    waiting = waiting_after_start(config_of(1, 1.0, 4))
    assert {step: set(batch) for step, batch in waiting.items()} == {0: {0, 1, 2}, 1: {0, 1, 2}}
    resumed, engine = batches_of(config_of(1, 0.0, 4), Ranks(), range(4), 4, waiting)
    resumed.advance(0, lambda: False)
    items = iter(resumed)
    assert all(sample.rollout is not None for _ in range(2) for sample in next(items))
    assert engine.num_prompts == 0


def test_rollouts_of_other_prompts_are_sampled_again() -> None:
    raw = config_of(1, 1.0, 4).model_dump()
    raw["rollout"]["prompt_tokens"] = 7
    waiting = waiting_after_start(config_of(1, 1.0, 4))
    resumed, engine = batches_of(RunConfig.model_validate(raw), Ranks(), range(4), 4, waiting)
    resumed.advance(0, lambda: False)
    assert engine.num_prompts == 6


def test_a_request_to_stop_queues_no_batch() -> None:
    batches, _ = batches_of(config_of(2, 1.0, 4), Ranks(), range(4), 4, {})
    batches.advance(0, lambda: True)
    batches.close()
    assert list(batches) == []
    assert batches.state(0) == {}


def test_a_prompt_that_fills_the_window_is_refused_and_not_trained_on_as_given_text() -> None:
    raw = config_of(0, 1.0, 4).model_dump()
    raw["data"]["window_tokens"], raw["rollout"]["prompt_tokens"] = 6, 5
    prompted = [Sample(i, f"line {i}", text=line, prompt_bytes=len(line) - 1) for i, line in enumerate(LINES)]
    batches, engine = batches_of(RunConfig.model_validate(raw), Ranks(), range(1), 1, {})
    batches._corpus = SimpleNamespace(train=prompted, order=CORPUS.order)  # type: ignore[assignment]
    batches.advance(0, lambda: False)
    assert [str(sample.refusal).partition(": ")[2][:15] for sample in next(iter(batches))] == ["its prompt has "] * 3
    assert engine.num_prompts == 0


def test_a_prompt_has_at_least_one_whole_character() -> None:
    builder = PromptBuilder(SampleTokenizer(VOCABULARY, VOCABULARY.prefix), RolloutConfig(prompt_tokens=1), 200)
    prompted = builder.with_prompt(Sample(0, "s", text="世界 is two characters"))
    assert (prompted.text, prompted.prompt_bytes) == ("世", 3)
