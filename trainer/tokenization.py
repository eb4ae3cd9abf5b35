"""Tokenize texts and chats with the tokenizer of one model, and shorten samples that exceed the limit of a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from alignment import Tokens, Vocabulary
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.config import SupervisionConfig
from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import RenderedChat, supervised_mask
from trainer.chats.sampled_chat import sampled_chat
from trainer.chats.special_tokens import SpecialTokenError
from trainer.errors import ConfigError, DataError
from trainer.records import Rollout, Sample, TokenizedSample
from trainer.sources.config import DataConfig

T = TypeVar("T")
STUDENT_WINDOW = "the student's window"


def raise_unless_skipped(error: ChatError, data: DataConfig) -> None:
    """Raise the error of a sample, with the key that skips such samples, unless the run skips and counts them."""
    skips_spelled = data.supervision.special_tokens_in_content == "skip"
    if data.invalid_chats == "skip" or (skips_spelled and isinstance(error, SpecialTokenError)):
        return
    raise ChatError(f'{error}; data.invalid_chats = "skip" skips and counts such samples') from error


@dataclass(frozen=True, eq=False)
class SampleTokenizer:
    """The tokenizer of one model.

    prefix    token ids in front of every sequence: BOS, or nothing
    template  chat template of the model; None if the run has no chats
    """

    vocabulary: Vocabulary
    prefix: Sequence[int]
    template: ChatTemplate | None = None

    def tokenize(self, sample: Sample) -> TokenizedSample:
        """Tokenize a text or a chat. Raises ChatError for a chat that the model's template cannot render.

        The text of a rollout keeps its sampled tokens for every model with the student's tokenizer.
        """
        rollout = sample.rollout
        if sample.is_chat:
            template = self._template(sample)
            if rollout is not None:
                return self._sampled_chat(sample, template.turn_end)
            return self._tokenized_chat(template.render(sample.messages, sample.tools, sample=sample.name))
        if rollout is not None and rollout.fingerprint == self.vocabulary.fingerprint:
            return self._tokenized_text(self._with_eos(sample, _sampled_tokens(sample, rollout)), sample.prompt_bytes)
        return self._tokenized_text(self.vocabulary.encode(sample.text, close=sample.closes), sample.prompt_bytes)

    def tokenize_rollout(self, sample: Sample, *, canonical: bool = False) -> TokenizedSample:
        """Tokenize a rollout for the student, with its sampled tokens; or with those that its tokenizer writes.

        Raises ChatError for an answer without a token.
        """
        assert sample.rollout is not None
        if not sample.is_chat:
            return self.tokenize(replace(sample, rollout=None) if canonical else sample)
        tokens = None if canonical else _sampled_tokens(sample, sample.rollout)
        return self._sampled_chat(sample, sample.rollout.ids[-1] if sample.closes else None, tokens)

    def _sampled_chat(self, sample: Sample, end: int | None, tokens: Tokens | None = None) -> TokenizedSample:
        """Tokenize a chat whose last answer was sampled.

        end     token that ends the turn, if the student has ended it
        tokens  tokens of the chat without `end`; by default those of this model's tokenizer and template
        """
        template, (*messages, answer) = self._template(sample), sample.messages
        if tokens is None:
            tokens, start = template.continue_chat(messages, sample.tools, answer["content"], sample=sample.name)
        else:
            start = tokens.num_bytes - len(answer["content"].encode())
        rendered = sampled_chat(
            template,
            tokens,
            start,
            end=end if sample.closes else None,
            message=len(messages),
            sample=sample.name,
        )
        return self._tokenized_chat(rendered)

    def _tokenized_text(self, tokens: Tokens, prompt_bytes: int) -> TokenizedSample:
        num_bytes_T = tokens.bytes_per_token
        # A token that begins within the prompt is not supervised, even if it ends after it.
        supervised_T = np.cumsum(num_bytes_T) - num_bytes_T >= prompt_bytes
        return TokenizedSample(tokens, supervised_T, np.where(supervised_T, num_bytes_T, 0))

    def _with_eos(self, sample: Sample, tokens: Tokens) -> Tokens:
        return tokens.with_end_token(self.vocabulary.roles["eos"]) if sample.closes else tokens

    def _template(self, sample: Sample) -> ChatTemplate:
        if self.template is None:
            raise DataError(f"sample {sample.name}: no chat template was loaded for {self.vocabulary.name}")
        return self.template

    def _tokenized_chat(self, rendered: RenderedChat) -> TokenizedSample:
        tokens, supervised_T = rendered.tokens, supervised_mask(rendered)
        hidden_bos = int(bool(self.prefix) and tokens.ids[:1].tolist() == list(self.prefix))
        # The first token of a sequence is not predicted: BOS if the model has a prefix, else the chat's first token.
        first_predicted = hidden_bos + (not self.prefix)
        if not supervised_T[first_predicted:].any():
            raise ChatError(
                f"sample {rendered.sample}, model {self.vocabulary.name}: no predicted token lies within an assistant "
                "message"
            )
        has_bytes_T = supervised_T & ~rendered.ends_turn & ~rendered.special_T
        num_bytes_T = np.where(has_bytes_T, tokens.bytes_per_token, 0)
        without_bos = tokens.excerpt(slice(hidden_bos, None), 0, tokens.num_bytes)
        return TokenizedSample(without_bos, supervised_T[hidden_bos:], num_bytes_T[hidden_bos:], rendered, hidden_bos)


def _sampled_tokens(sample: Sample, rollout: Rollout) -> Tokens:
    """Return the tokens of a prompt and of the text that was sampled after it, without an end token."""
    assert sample.prompt is not None
    text = sample.messages[-1]["content"] if sample.is_chat else sample.text.encode()[sample.prompt_bytes :].decode()
    length = len(rollout.ids) - sample.closes
    return sample.prompt.continued(text.encode(), rollout.ids[:length], rollout.num_bytes[:length])


def tokenize_samples(
    samples: Iterable[Sample],
    tokenizer: SampleTokenizer,
    data: DataConfig,
    on_skip: Callable[[ChatError], object] = lambda error: None,
) -> Iterator[TokenizedSample]:
    """Tokenize samples with the student's tokenizer.

    Long samples are handled according to data.too_long, chats that cannot be rendered according to data.invalid_chats
    and data.supervision. `on_skip` is called for each chat that is skipped.
    """
    for sample in samples:
        try:
            yield _tokenize_within_window(sample, tokenizer, data)
        except ChatError as error:
            raise_unless_skipped(error, data)
            on_skip(error)


def _tokenize_within_window(sample: Sample, tokenizer: SampleTokenizer, data: DataConfig) -> TokenizedSample:
    def attempt(sample: Sample) -> tuple[TokenizedSample, Excess | None]:
        tokenized = tokenizer.tokenize(sample)
        limit = data.window_tokens + sample.closes
        return tokenized, Excess(tokenized, limit, STUDENT_WINDOW) if len(tokenized) > limit else None

    return fit_sample(sample, attempt, data)


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
    supervised assistant message. Bisection finds the last message with which the chat fits. A rollout is always
    shortened, because its length in the tokens of a teacher is not known before it is sampled.

    attempt  tokenizes a sample for all models, and returns the excess if it is too long
    Raises DataError for a text, and ChatError for a chat and for a text with a prompt, if data.too_long is "refuse" or
    if no prefix fits.
    """
    result, excess = attempt(sample)
    if excess is None:
        return result
    ends = _turn_ends(sample) if data.too_long == "shorten" else []
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


def load_chat_template(
    files: Mapping[str, bytes],
    vocabulary: Vocabulary,
    roles: Mapping[str, str],
    path: str | None,
    supervision: SupervisionConfig = SupervisionConfig(),
) -> ChatTemplate:
    """Load the chat template of a model from its tokenizer files.

    roles        special tokens by role; only "end_of_turn" matters
    path         file of a template that replaces the model's own
    supervision  parts of a chat that are supervised
    Raises ChatError if the model has no template, ConfigError if the file cannot be read.
    """
    end_of_turn = {role: token for role, token in roles.items() if role == "end_of_turn"}
    template = _read_template(path) if path else None
    return ChatTemplate.from_files(
        files, vocabulary, vocabulary.name, template=template, roles=end_of_turn, supervision=supervision
    )


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: cannot read {path}: {error}") from error


def _has_long_prompt(sample: Sample, excess: Excess) -> bool:
    """Return whether the masked prompt of a text leaves no room for a completion."""
    num_prompt = int(np.count_nonzero(~excess.tokenized.supervised_T))
    return bool(sample.prompt_bytes) and num_prompt >= excess.limit
