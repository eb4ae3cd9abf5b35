"""A sample as one model reads it: its tokens, which of them are learned from, and the bytes that they stand for."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alignment import Tokens, Vocabulary
from trainer.chat import ChatTemplate, Rendered, supervised_mask
from trainer.data import Sample
from trainer.errors import ConfigError, DataError
from trainer.template import ChatError


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
        textual = np.array([self.vocabulary.token_bytes[i] is not None for i in tokens.ids.tolist()], dtype=bool)
        num_bytes_T = np.where(supervised_T & textual, tokens.bytes_per_token, 0)
        shown = replace(tokens, ids=tokens.ids[hidden:], ends=tokens.ends[hidden:], placing=None)
        return Reading(shown, supervised_T[hidden:], num_bytes_T[hidden:], rendered, hidden)


def readable(samples: Iterable[Sample], reader: Reader, *, skip: bool) -> Iterator[Reading]:
    """Every sample as it is read; with `skip`, without the chats that cannot be."""
    for sample in samples:
        try:
            yield reader.read(sample)
        except ChatError:
            if not skip:
                raise


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
