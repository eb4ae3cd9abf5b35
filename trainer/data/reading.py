"""A sample as one model reads it: its tokens, which of them are learned from, and the bytes that they stand for."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alignment import Tokens, Vocabulary
from trainer.config import DataConfig
from trainer.data.chat import ChatTemplate, Rendered, supervised_mask
from trainer.data.samples import Sample, shortened
from trainer.data.template import ChatError
from trainer.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Reading:
    """tokens        without BOS, where the model expects one in front
    supervised_T  bool: all tokens of a text, of a chat those of what the assistant says
    num_bytes_T   int64 bytes of text that each supervised token ends; 0 for special tokens
    rendered      the chat as the model's template writes it; None for a text
    hidden_bos    tokens at the beginning of `rendered` that are left out of `tokens`: its BOS
    """

    tokens: Tokens
    supervised_T: NDArray[np.bool_]
    num_bytes_T: NDArray[np.int64]
    rendered: Rendered | None = None
    hidden_bos: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """What it takes in memory, nearly; a chat's rendering again as much."""
        arrays = self.tokens.ids.nbytes + self.tokens.ends.nbytes + self.num_bytes_T.nbytes + self.supervised_T.nbytes
        return (arrays + self.tokens.num_bytes) * (1 if self.rendered is None else 2)


@dataclass(frozen=True, eq=False)
class Reader:
    """One model's tokenizer, what stands in front of all it reads (BOS or nothing), and its chats' template."""

    vocabulary: Vocabulary
    prefix: Sequence[int]
    template: ChatTemplate | None = None

    def read(self, sample: Sample) -> Reading:
        """Raises ChatError for a chat that the model's template cannot write."""
        if sample.is_chat:
            return self._read_chat(sample)
        tokens = self.vocabulary.encode(sample.text, close=sample.closes)
        return Reading(tokens, np.ones(len(tokens), dtype=bool), tokens.bytes_per_token)

    def _read_chat(self, sample: Sample) -> Reading:
        if self.template is None:
            raise DataError(f"sample {sample.name}: {self.vocabulary.name} was not asked for the template of its chats")
        rendered = self.template.render(sample.messages, sample.tools, sample=sample.name)
        tokens, supervised_T = rendered.tokens, supervised_mask(rendered)
        hidden = int(bool(self.prefix) and tokens.ids[:1].tolist() == list(self.prefix))
        if not supervised_T[hidden + (not self.prefix) :].any():
            raise ChatError(
                f"sample {sample.name}, model {self.vocabulary.name}: no token of it is the assistant's alone"
            )
        ends = np.isin(tokens.ids, [span.end_of_turn for span in rendered.spans if span.end_of_turn is not None])
        num_bytes_T = np.where(supervised_T & ~ends, tokens.bytes_per_token, 0)
        shown = tokens.part(slice(hidden, None), 0, tokens.num_bytes)
        return Reading(shown, supervised_T[hidden:], num_bytes_T[hidden:], rendered, hidden)


def readable(samples: Iterable[Sample], reader: Reader, data: DataConfig) -> Iterator[Reading]:
    """Every sample as the student reads it, and as a run's file says of long and of broken chats."""
    for sample in samples:
        try:
            yield _within(sample, reader, data)
        except ChatError:
            if data.broken_chats != "skip":
                raise


def _within(sample: Sample, reader: Reader, data: DataConfig) -> Reading:
    reading = reader.read(sample)
    while sample.is_chat and len(reading) > data.window_tokens:
        sample = shorter(sample, reading, data.window_tokens, "the student's window", data)
        reading = reader.read(sample)
    return reading


def shorter(sample: Sample, reading: Reading, limit: int, who: str, data: DataConfig) -> Sample:
    """The sample without its end. Raises ChatError or DataError if it may not or cannot be shortened."""
    found = shortened(sample, reading.tokens, limit) if data.too_long == "shorten" else None
    if found is not None:
        return found
    problem = f"sample {sample.name}: {who} takes {limit} tokens, it is {len(reading)} of them"
    if sample.is_chat:
        advice = (
            "its first answer alone is too long" if data.too_long == "shorten" else 'data.too_long = "shorten" helps'
        )
        raise ChatError(f"{problem}; {advice}")
    raise DataError(f'{problem}: set data.window_tokens lower, or data.too_long = "shorten" to shorten it for all')


def chat_template(
    files: Mapping[str, bytes], vocabulary: Vocabulary, roles: Mapping[str, str], path: str | None
) -> ChatTemplate:
    """From a model's tokenizer files; `path` is a run file's other template.

    Raises ChatError where there is none, ConfigError for one that cannot be read.
    """
    end_of_turn = {role: token for role, token in roles.items() if role == "end_of_turn"}
    given = _template_file(path) if path else None
    return ChatTemplate.from_files(files, vocabulary, vocabulary.name, template=given, roles=end_of_turn)


def _template_file(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: cannot read {name}: {error}") from error
