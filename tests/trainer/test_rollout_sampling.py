"""Sampling with a tiny student: prompts in one batch, ends, banned tokens, and the samples that are replaced."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from trainer.rollouts.base import Prompt, SampledTokens, Sampling
from trainer.rollouts.batches import replaced_positions
from trainer.rollouts.config import RolloutConfig
from trainer.rollouts.transformers_engine import TransformersEngine, _batches
from trainer.student.config import StudentConfig
from trainer.student.loading import load_student
from trainer.student.model import Student

GREEDY = Sampling(temperature=1.0, top_p=1e-6, end_ids=frozenset(), banned_ids=())
TEXTS = ("The harbour office opened at six.", "A gull", "Fifty-one sacks, said the older clerk", "Tar")


@pytest.fixture(scope="module", params=["tiny_byte_level", "tiny_sentencepiece"])
def student(request: pytest.FixtureRequest) -> Student:
    folder: Path = request.getfixturevalue(request.param)
    return load_student(StudentConfig(model=str(folder), precision="fp32"))


def prompts_of(student: Student, sampling: Sampling = GREEDY, max_new_tokens: int = 12) -> list[Prompt]:
    vocabulary = student.vocabulary
    ids = [(*vocabulary.prefix, *vocabulary.encode(text).ids.tolist()) for text in TEXTS]
    return [Prompt(each, max_new_tokens, sampling) for each in ids]


def sample(student: Student, prompts: Sequence[Prompt], size: int = 8) -> list[SampledTokens]:
    return TransformersEngine(size).sample(student, prompts, (1, 2), lambda: False)


def next_logprobs(student: Student, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(student.model(torch.tensor([ids])).logits[0, -1], 0)


def test_prompts_of_one_batch_do_not_change_each_other(student: Student) -> None:
    sampled = sample(student, prompts_of(student))
    for prompt, tokens in zip(prompts_of(student), sampled, strict=True):
        context = list(prompt.ids)
        for token, logprob, entropy in zip(tokens.ids, tokens.logprobs, tokens.entropies, strict=True):
            expected = next_logprobs(student, context)
            assert token == int(expected.argmax())
            assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
            assert entropy == pytest.approx(-float((expected.exp() * expected).sum()), abs=1e-4)
            context.append(token)
        assert (len(tokens.ids), tokens.finish) == (12, "length")


def test_the_model_is_in_training_mode_and_the_random_state_unchanged_afterwards(student: Student) -> None:
    state = torch.get_rng_state()
    first, second = (sample(student, prompts_of(student, replace(GREEDY, top_p=1.0))) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert student.module.training


def test_settings_of_the_model_do_not_change_the_samples(student: Student) -> None:
    free = replace(GREEDY, top_p=1.0)
    expected = sample(student, prompts_of(student, free))
    own = student.model.generation_config
    student.model.generation_config = GenerationConfig(top_k=1, repetition_penalty=9.0, min_p=0.9, max_length=20)
    try:
        assert sample(student, prompts_of(student, free)) == expected
    finally:
        student.model.generation_config = own


def test_banned_tokens_are_never_sampled_and_log_probabilities_stay_those_of_the_model(student: Student) -> None:
    (prompt, *_) = prompts_of(student, max_new_tokens=1)
    expected = next_logprobs(student, prompt.ids)
    best, second = expected.topk(2).indices.tolist()
    (tokens,) = sample(student, [replace(prompt, sampling=replace(GREEDY, banned_ids=(best,)))])
    assert tokens.ids == (second,)
    assert tokens.logprobs == pytest.approx([float(expected[second])], abs=1e-4)


def test_end_tokens_and_stop_strings_end_a_rollout_and_are_kept(student: Student) -> None:
    free = [tokens.ids for tokens in sample(student, prompts_of(student))]
    end = free[0][3]
    ended = sample(student, prompts_of(student, replace(GREEDY, end_ids=frozenset({end}))))
    for ids, tokens in zip(free, ended, strict=True):
        length = ids.index(end) + 1 if end in ids else len(ids)
        assert (tokens.ids, tokens.finish) == (ids[:length], "eos" if end in ids else "length")
    pieces = [student.vocabulary.token_bytes[i] or b"" for i in free[0]]
    stop = (b"".join(pieces[:6]))[-2:]  # may begin in one token and end in another
    (tokens, *_) = sample(student, prompts_of(student, replace(GREEDY, stop=(stop,))))
    first = next(n for n in range(1, 13) if stop in b"".join(pieces[:n]))
    assert (tokens.ids, tokens.finish) == (free[0][:first], "stop")


def test_small_batches_have_the_same_greedy_samples(student: Student) -> None:
    one, three = ([each.ids for each in sample(student, prompts_of(student), size)] for size in (1, 3))
    assert one == three


def test_ids_that_the_tokenizer_lacks_are_never_sampled(student: Student) -> None:
    largest = max(i for tokens in sample(student, prompts_of(student)) for i in tokens.ids)
    vocabulary = replace(student.vocabulary, token_bytes=student.vocabulary.token_bytes[:largest])
    shorter = replace(student, vocabulary=vocabulary)
    assert all(i < largest for tokens in sample(shorter, prompts_of(student)) for i in tokens.ids)


def test_a_batch_does_not_exceed_the_positions_of_the_model() -> None:
    prompts = [Prompt((0,) * length, new, GREEDY) for length, new in ((45, 15), (2, 58), (3, 57), (44, 16), (30, 30))]
    batches = list(_batches(prompts, size=3, limit=64))
    assert sorted(i for batch in batches for i in batch) == list(range(5))
    for batch in batches:
        assert len(batch) <= 3
        assert max(len(prompts[i].ids) for i in batch) + max(prompts[i].max_new_tokens for i in batch) <= 64
    assert [0, 3] in [sorted(batch) for batch in batches]


def test_sampling_ends_soon_after_a_request_to_stop(student: Student) -> None:
    calls: list[int] = []

    def should_stop() -> bool:
        calls.append(1)
        return len(calls) > 3

    sampled = TransformersEngine(2).sample(student, prompts_of(student, GREEDY, 50), (0,), should_stop)
    assert all(len(tokens.ids) <= 4 for tokens in sampled)
    assert len(sampled) == 2


SHARES = st.just(0.0) | st.floats(1e-6, 1)


@given(SHARES, SHARES, st.integers(1, 40), st.integers(0, 99), st.integers(1, 100))
def test_the_share_of_replaced_samples_follows_the_schedule(
    share: float, final_share: float, size: int, step: int, num_steps: int
) -> None:
    config = RolloutConfig(share=share, final_share=final_share, schedule="linear")
    positions = replaced_positions(config, size, 0, step, num_steps)
    assert positions == replaced_positions(config, size, 0, step, num_steps)
    assert positions <= set(range(size))
    progress = min(step / max(num_steps - 1, 1), 1.0)
    expected = ((1 - progress) * share + progress * final_share) * size
    assert math.floor(expected - 1e-9) <= len(positions) <= math.ceil(expected + 1e-9)
