"""Tokenize texts and chats with the tokenizer of one model, and shorten samples that exceed the limit of a model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from alignment import Tokens, Vocabulary
from trainer.chats.chat_template import ChatTemplate, supervised_mask
from trainer.chats.jinja_template import ChatError
from trainer.errors import ConfigError, DataError
from trainer.records import Sample, TokenizedSample
from trainer.sources.config import DataConfig


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
        """Tokenize a text or a chat. Raises ChatError for a chat that the model's template cannot render."""
        if sample.is_chat:
            return self._tokenize_chat(sample)
        tokens = self.vocabulary.encode(sample.text, close=sample.closes)
        return TokenizedSample(tokens, np.ones(len(tokens), dtype=bool), tokens.bytes_per_token)

    def _tokenize_chat(self, sample: Sample) -> TokenizedSample:
        if self.template is None:
            raise DataError(f"sample {sample.name}: no chat template was loaded for {self.vocabulary.name}")
        rendered = self.template.render(sample.messages, sample.tools, sample=sample.name)
        tokens, supervised_T = rendered.tokens, supervised_mask(rendered)
        hidden_bos = int(bool(self.prefix) and tokens.ids[:1].tolist() == list(self.prefix))
        # The first token of a sequence is not predicted: BOS if the model has a prefix, else the chat's first token.
        first_predicted = hidden_bos + (not self.prefix)
        if not supervised_T[first_predicted:].any():
            raise ChatError(
                f"sample {sample.name}, model {self.vocabulary.name}: no predicted token lies within an assistant "
                "message"
            )
        is_end = np.isin(tokens.ids, [span.end_of_turn for span in rendered.spans if span.end_of_turn is not None])
        num_bytes_T = np.where(supervised_T & ~is_end, tokens.bytes_per_token, 0)
        without_bos = tokens.excerpt(slice(hidden_bos, None), 0, tokens.num_bytes)
        return TokenizedSample(without_bos, supervised_T[hidden_bos:], num_bytes_T[hidden_bos:], rendered, hidden_bos)


def tokenize_samples(
    samples: Iterable[Sample], tokenizer: SampleTokenizer, data: DataConfig
) -> Iterator[TokenizedSample]:
    """Tokenize samples with the student's tokenizer.

    Long samples are handled according to data.too_long, chats that cannot be rendered according to
    data.invalid_chats.
    """
    for sample in samples:
        try:
            yield _tokenize_within_window(sample, tokenizer, data)
        except ChatError:
            if data.invalid_chats != "skip":
                raise


def _tokenize_within_window(sample: Sample, tokenizer: SampleTokenizer, data: DataConfig) -> TokenizedSample:
    tokenized = tokenizer.tokenize(sample)
    while sample.is_chat and len(tokenized) > data.window_tokens:  # a window of text has at most window_tokens
        sample = shorten_or_raise(sample, tokenized, data.window_tokens, "the student's window", data)
        tokenized = tokenizer.tokenize(sample)
    return tokenized


def shorten_or_raise(
    sample: Sample, tokenized: TokenizedSample, limit: int, limited_by: str, data: DataConfig
) -> Sample:
    """Return the sample shortened by `shorten`, or raise an error that names the limit.

    tokenized   the sample as the model with the limit tokenizes it
    limited_by  name of the model or window, for error messages
    Raises ChatError for a chat, DataError for a text, if data.too_long forbids shortening or nothing would be left.
    """
    may_shorten = data.too_long == "shorten"
    shortened = shorten(sample, tokenized.tokens, limit) if may_shorten else None
    if shortened is not None:
        return shortened
    problem = f"sample {sample.name}: {limited_by} takes {limit} tokens, the sample has {len(tokenized)}"
    if sample.is_chat:
        reason = "the first assistant message alone is too long"
        advice = 'set data.too_long = "shorten" to drop the last turns of long chats'
        raise ChatError(f"{problem}; {reason if may_shorten else advice}")
    advice = "" if may_shorten else ', or data.too_long = "shorten" to shorten the sample for all models'
    raise DataError(f"{problem}: set data.window_tokens lower{advice}")


def shorten(sample: Sample, tokens: Tokens, limit: int) -> Sample | None:
    """Return the beginning of a sample. Return None if nothing is left.

    A text keeps about its first `limit` tokens and ends at the end of a character. If it is tokenized again, it can be
    one token longer than the limit, and must then be shortened again. A chat loses everything after its second-to-last
    supervised assistant message, whatever the limit.

    tokens  tokens of the sample, which the limit refers to
    """
    if sample.is_chat:
        supervised = [
            i for i, m in enumerate(sample.messages) if m.get("role") == "assistant" and m.get("train") is not False
        ]
        return replace(sample, messages=sample.messages[: supervised[-2] + 1]) if len(supervised) > 1 else None
    data = tokens.text
    cuts = [
        int(end) for end in tokens.ends[: max(limit, 0)] if 0 < end < len(data) and _is_character_end(data, int(end))
    ]
    return replace(sample, text=data[: cuts[-1]].decode(), closes=False) if cuts else None


def _is_character_end(data: bytes, end: int) -> bool:
    return end == len(data) or data[end] & 0xC0 != 0x80


def load_chat_template(
    files: Mapping[str, bytes], vocabulary: Vocabulary, roles: Mapping[str, str], path: str | None
) -> ChatTemplate:
    """Load the chat template of a model from its tokenizer files.

    roles  special tokens by role; only "end_of_turn" matters
    path   file of a template that replaces the model's own
    Raises ChatError if the model has no template, ConfigError if the file cannot be read.
    """
    end_of_turn = {role: token for role, token in roles.items() if role == "end_of_turn"}
    template = _read_template(path) if path else None
    return ChatTemplate.from_files(files, vocabulary, vocabulary.name, template=template, roles=end_of_turn)


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: cannot read {path}: {error}") from error
