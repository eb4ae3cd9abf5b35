"""Tokenization of samples: supervised tokens, BOS rendered by a template, and samples above a model's limit."""

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from tests.templates import CHATML, GEMMA, chat, chat_template, chat_vocabulary
from tests.tiny import TEXT, Kind, tiny_vocabulary
from trainer.chats.jinja_template import ChatError, JinjaTemplate
from trainer.chats.json_values import Message
from trainer.errors import DataError, UserError
from trainer.records import Sample
from trainer.shortening import Excess, fit_sample
from trainer.sources.config import DataConfig, SourceConfig
from trainer.tokenization import SampleTokenizer, tokenize_samples

VOCABULARY = chat_vocabulary("byte_level")
TOKENIZER = SampleTokenizer(VOCABULARY, VOCABULARY.prefix, chat_template(CHATML))
NUMBERS = [f"{n}{n}" for n in range(8)]
TURNS = ("How many?", "Fifty-one.", "Sure?", "Yes.")


def sample_of(*contents: str) -> Sample:
    return Sample(0, "c.jsonl:1", messages=tuple(chat(*contents)))


def data(
    too_long: Literal["refuse", "shorten"],
    invalid_chats: Literal["refuse", "skip"] = "refuse",
    window_tokens: int = 512,
) -> DataConfig:
    sources = [SourceConfig(files=["c.jsonl"], messages_column="messages")]
    return DataConfig(sources=sources, too_long=too_long, invalid_chats=invalid_chats, window_tokens=window_tokens)


def test_every_token_of_a_text_is_supervised_and_counts_its_bytes() -> None:
    tokenized = TOKENIZER.tokenize(Sample(0, "s", TEXT, closes=True))
    assert tokenized.supervised_T.all()
    assert tokenized.num_bytes_T.sum() == len(TEXT.encode())
    assert (tokenized.num_bytes_T[-1], tokenized.rendered, tokenized.hidden_bos) == (0, None, 0)


def test_the_supervised_tokens_of_a_chat_count_the_bytes_of_the_assistant_messages() -> None:
    tokenized = TOKENIZER.tokenize(sample_of(*TURNS))
    assert tokenized.num_bytes_T.sum() == len("Fifty-one.Yes.")
    assert not tokenized.num_bytes_T[~tokenized.supervised_T].any()
    assert tokenized.supervised_T.sum() > (tokenized.num_bytes_T > 0).sum()  # the ends of turn have no bytes


def test_a_bos_rendered_by_the_template_is_omitted_if_the_model_adds_it() -> None:
    vocabulary = chat_vocabulary("sentencepiece")
    rendering_bos, plain = (
        SampleTokenizer(vocabulary, vocabulary.prefix, chat_template(text, "sentencepiece")).tokenize(sample_of(*TURNS))
        for text in (GEMMA, CHATML)
    )
    assert vocabulary.prefix
    assert (rendering_bos.hidden_bos, plain.hidden_bos) == (1, 0)
    for tokenized in (rendering_bos, plain):
        assert tokenized.tokens.ids[0] != vocabulary.prefix[0]
        assert len(tokenized) == len(tokenized.supervised_T) == len(tokenized.num_bytes_T)


def test_a_chat_without_a_loaded_template_is_an_error() -> None:
    with pytest.raises(DataError, match="sample c.jsonl:1: no chat template was loaded for byte_level"):
        SampleTokenizer(VOCABULARY, []).tokenize(sample_of(*TURNS))


def test_chats_above_the_window_lose_their_last_turns_and_invalid_chats_are_skipped() -> None:
    samples = [sample_of(*TURNS), sample_of("only a user message"), sample_of(*TURNS[:2])]
    short = TOKENIZER.tokenize(samples[2])
    config = data("shorten", "skip", window_tokens=len(short))
    first, second = tokenize_samples(samples, TOKENIZER, config)
    assert first.tokens.text == second.tokens.text == short.tokens.text
    with pytest.raises(ChatError, match="no assistant message to train on"):
        list(tokenize_samples(samples, TOKENIZER, data("shorten", window_tokens=len(short))))


@pytest.mark.parametrize("too_long", ["refuse", "shorten"])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_advice_for_a_sample_above_the_limit_is_never_a_setting_that_is_in_effect(
    kind: str, too_long: Literal["refuse", "shorten"]
) -> None:
    """The sample cannot be shortened: a text with a limit of 0 tokens, or a chat of one turn."""
    sample = Sample(0, "c.jsonl:1", TEXT) if kind == "text" else sample_of(*TURNS[:2])
    tokenized = TOKENIZER.tokenize(sample)
    with pytest.raises(UserError) as caught:
        fit_sample(sample, lambda s: (s, Excess(TOKENIZER.tokenize(s), 0, "teacher t0")), data(too_long))
    message = str(caught.value)
    assert message.startswith(f"sample c.jsonl:1: teacher t0 takes 0 tokens, the sample has {len(tokenized)}")
    assert ('data.too_long = "shorten"' in message) == (too_long == "refuse")
    assert ("data.window_tokens" in message) == (kind == "text")
    assert ("the first assistant message alone is too long" in message) == (kind == "chat" and too_long == "shorten")


def test_a_chat_is_shortened_to_the_last_supervised_message_with_which_it_fits() -> None:
    messages = [dict(m) for m in sample_of(*NUMBERS).messages]
    messages[3]["train"] = False
    sample = Sample(0, "s", messages=tuple(messages))
    lengths = {n: len(TOKENIZER.tokenize(replace(sample, messages=sample.messages[:n]))) for n in (2, 6, 8)}

    def fit(limit: int) -> list[str]:
        (fitting,) = tokenize_samples([sample], TOKENIZER, data("shorten", window_tokens=limit))
        return [number for number in NUMBERS if number.encode() in fitting.tokens.text]

    for n, length in lengths.items():
        assert fit(length) == NUMBERS[:n]
        assert fit(length + 1) == NUMBERS[:n]
    assert fit(lengths[8] - 1) == NUMBERS[:6]
    with pytest.raises(ChatError, match="the first assistant message alone is too long"):
        fit(lengths[2] - 1)


def test_a_chat_of_many_answers_is_shortened_in_a_few_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    render = JinjaTemplate.render

    def counted(self: JinjaTemplate, messages: Sequence[Message], *rest: Any) -> str:
        calls.append(len(messages))
        return render(self, messages, *rest)

    monkeypatch.setattr(JinjaTemplate, "render", counted)
    sample = sample_of(*["How heavy is it?", "14.5 kilograms"] * 200)
    (fitting,) = tokenize_samples([sample], TOKENIZER, data("shorten", window_tokens=400))
    assert 300 < len(fitting) <= 400
    assert len(calls) <= 4 * 10  # three renderings for each of nine prefixes


# Texts with a masked prompt


def test_shortening_a_chat_takes_memory_for_few_copies_of_it() -> None:
    sample = sample_of(*["x"] * 20_000)
    tokenized = TOKENIZER.tokenize(sample_of("x", "y"))

    def attempt(shorter: Sample) -> tuple[int, Excess | None]:
        is_long = len(shorter.messages) > 3000
        return len(shorter.messages), Excess(tokenized, 1, "teacher t0") if is_long else None

    tracemalloc.start()
    assert fit_sample(sample, attempt, data("shorten")) == 3000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20


def prompted(prompt: str, completion: str, closes: bool = False) -> Sample:
    return Sample(0, "p.jsonl:1", prompt + completion, prompt_bytes=len(prompt.encode()), closes=closes)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_the_tokens_that_begin_within_the_prompt_are_not_supervised(kind: Kind) -> None:
    vocabulary = tiny_vocabulary(kind)
    tokenizer = SampleTokenizer(vocabulary, vocabulary.prefix)
    for prompt, completion in (("Wie schwer? é", "14.5 日本語 kg"), ("harb", "our office"), ("", "all of it")):
        tokenized = tokenizer.tokenize(prompted(prompt, completion, closes=True))
        plain = tokenizer.tokenize(Sample(0, "s", prompt + completion, closes=True))
        assert tokenized.tokens.ids.tolist() == plain.tokens.ids.tolist()
        begins = np.cumsum(plain.num_bytes_T) - plain.num_bytes_T
        assert tokenized.supervised_T.tolist() == (begins >= len(prompt.encode())).tolist()
        assert tokenized.supervised_T[-1]
        assert 0 < tokenized.num_bytes_T.sum() <= len(completion.encode())
        assert not tokenized.num_bytes_T[~tokenized.supervised_T].any()


def test_a_long_completion_is_shortened_and_a_long_prompt_is_skipped_or_an_error() -> None:
    tokenizer = SampleTokenizer(VOCABULARY, [])
    sample = prompted("How heavy is it? ", "Very heavy indeed. " * 40)
    limit = len(tokenizer.tokenize(prompted("How heavy is it? ", ""))) + 9
    with pytest.raises(
        ChatError, match=r': raise data.window_tokens or set data.too_long = "shorten" to shorten long completions; '
    ):
        list(tokenize_samples([sample], tokenizer, data("refuse", window_tokens=limit)))
    (short,) = tokenize_samples([sample], tokenizer, data("shorten", window_tokens=limit))
    assert limit - 2 <= len(short) <= limit
    assert 0 < short.supervised_T.sum() < len(short)
    long = prompted("How heavy is it? " * 40, "Very.")
    reason = r'its prompt alone is too long: raise data.window_tokens; data.invalid_chats = "skip" skips and counts'
    for too_long in ("refuse", "shorten"):
        with pytest.raises(ChatError, match=reason):
            list(tokenize_samples([long], tokenizer, data(too_long, window_tokens=limit)))
    (kept,) = tokenize_samples([long, sample], tokenizer, data("shorten", "skip", window_tokens=limit))
    assert kept.tokens.text == short.tokens.text
