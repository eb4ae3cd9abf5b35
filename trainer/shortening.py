"""Shorten samples that exceed the limit of a model, for all models alike."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from alignment import Tokens
from trainer.chats.jinja_template import ChatError
from trainer.errors import DataError
from trainer.records import Rollout, Sample, TokenizedSample
from trainer.sources.config import DataConfig

T = TypeVar("T")
STUDENT_WINDOW = "the student's window"


class Excess(NamedTuple):
    """A sample that is too long for a model.

    tokenized   tokens of the sample for the model whose limit is exceeded
    limit       maximum number of tokens
    limited_by  name of the model or window, for error messages
    """

    tokenized: TokenizedSample
    limit: int
    limited_by: str


def fit_sample(sample: Sample, attempt: Callable[[Sample], tuple[T, Excess | None]], data: DataConfig) -> T:
    """Tokenize a sample with `attempt`. If it is too long and data.too_long is "shorten", use a prefix that fits.

    A text is cut after about `limit` tokens, at the end of a character and after its prompt. A chat is cut after a
    supervised assistant message. Bisection finds the last message with which the chat fits. The text of a rollout is
    always shortened, because its length in the tokens of a teacher is not known before it is sampled.

    attempt  tokenizes a sample for all models, and returns the excess if it is too long
    Raises DataError for a text, and ChatError for a chat and for a text with a prompt, if data.too_long is "refuse" or
    if no prefix fits.
    """
    result, excess = attempt(sample)
    if excess is None:
        return result
    ends = _turn_ends(sample) if data.too_long == "shorten" and sample.rollout is None else []
    fitting, too_long = -1, len(ends)  # indices of ends; the end of the whole sample follows the last one
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        shorter, shorter_excess = attempt(replace(sample, messages=sample.messages[: ends[middle]]))
        if shorter_excess is None:
            fitting, result = middle, shorter
        else:
            too_long, excess = middle, shorter_excess
    if fitting >= 0:
        return result
    while not sample.is_chat and (data.too_long == "shorten" or sample.rollout is not None):
        shortened = shorten_text(sample, excess.tokenized.tokens, excess.limit)
        if shortened is None:
            break
        sample = shortened
        result, excess = attempt(sample)
        if excess is None:
            return result
    raise _too_long(sample, excess, data)


def _turn_ends(sample: Sample) -> list[int]:
    """Return the numbers of messages after which a chat may be cut: each supervised assistant message but the last.

    For a text, the result is empty.
    """
    ends = [
        i + 1 for i, m in enumerate(sample.messages) if m.get("role") == "assistant" and m.get("train") is not False
    ]
    return ends[:-1]


def _too_long(sample: Sample, excess: Excess, data: DataConfig) -> ChatError | DataError:
    """Return the error for a sample that is too long, with the settings that help."""
    may_shorten, (tokenized, limit, limited_by) = data.too_long == "shorten", excess
    problem = f"sample {sample.name}: {limited_by} takes {limit} tokens, the sample has {len(tokenized)}"
    if sample.rollout is not None:
        return ChatError(problem if sample.is_chat else f"{problem}; its prompt alone is too long")
    if sample.is_chat or sample.prompt_bytes:
        remedies = ["raise data.window_tokens"] if limited_by == STUDENT_WINDOW else []
        if may_shorten or _has_long_prompt(sample, excess):
            part = "the first assistant message" if sample.is_chat else "its prompt"
            problem += f"; {part} alone is too long"
        else:
            effect = "drop the last turns of long chats" if sample.is_chat else "shorten long completions"
            remedies.append(f'set data.too_long = "shorten" to {effect}')
        return ChatError(": ".join([problem, *filter(None, [" or ".join(remedies)])]))
    direction = "higher" if limited_by == STUDENT_WINDOW else "lower"
    advice = "" if may_shorten else ', or data.too_long = "shorten" to shorten the sample for all models'
    return DataError(f"{problem}: set data.window_tokens {direction}{advice}")


def _has_long_prompt(sample: Sample, excess: Excess) -> bool:
    """Return whether the masked prompt of a text leaves no room for a completion."""
    num_prompt = int(np.count_nonzero(~excess.tokenized.supervised_T))
    return bool(sample.prompt_bytes) and num_prompt >= excess.limit


def shorten_text(sample: Sample, tokens: Tokens, limit: int) -> Sample | None:
    """Return the prefix of a text with about `limit` tokens, or None if no text remains.

    Tokenizing the prefix again can give one token more than `limit`; the caller then shortens it again.

    tokens  tokens of the whole sample, in the tokenizer to which the limit applies
    """
    data = tokens.text
    cuts = [
        int(end)
        for end in tokens.ends[: max(limit, 0)]
        if sample.prompt_bytes < end < len(data) and is_character_end(data, int(end))
    ]
    if not cuts:
        return None
    if sample.rollout is not None:
        return _shorten_rollout(sample, sample.rollout, cuts[-1])
    return replace(sample, text=data[: cuts[-1]].decode(), closes=False)


def _shorten_rollout(sample: Sample, rollout: Rollout, limit: int) -> Sample | None:
    """Return a sample with the sampled tokens that end at or before the byte `limit`, or None if there are none."""
    data = sample.text.encode()
    ends = np.cumsum(rollout.num_bytes) + sample.prompt_bytes
    lengths = [i + 1 for i, end in enumerate(ends) if end <= limit and is_character_end(data, int(end))]
    if not lengths:
        return None
    kept, stop = lengths[-1], int(ends[lengths[-1] - 1])
    columns = {name: getattr(rollout, name)[:kept] for name in ("ids", "num_bytes", "logprobs", "entropies")}
    shortened = replace(rollout, finish="length", **columns)
    return replace(sample, text=data[:stop].decode(), closes=False, rollout=shortened)


def is_character_end(data: bytes, end: int) -> bool:
    """Return whether no UTF-8 character of a text contains bytes on both sides of the offset `end`."""
    return end == len(data) or data[end] & 0xC0 != 0x80
