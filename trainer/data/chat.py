"""Chats as each model reads them: its template's text, its tokens, and the spans that are supervised.

A span is one assistant content and, where a special token follows it directly, that token as its end of turn.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment import TokenizerError, Tokens, Vocabulary
from trainer.data.chat_text import Chat
from trainer.data.template import TODAY, ChatError, Template

END_OF_TURN = "end_of_turn"
_CONTROL = re.compile(r"<[|｜].+[|｜]>")


@dataclass(frozen=True)
class Span:
    """One assistant content in a rendered chat.

    message      index in the chat as it was given
    start, stop  bytes of the rendered text
    end_of_turn  id of the special token that follows directly; None where there is none
    """

    message: int
    start: int
    stop: int
    end_of_turn: int | None


@dataclass(frozen=True, eq=False)
class Rendered:
    """One chat as one model reads it.

    tokens         of the whole text, without `prefix`
    prefix         BOS, where the model expects it and the template does not write it; else nothing
    spans          what is supervised, in order
    folded_system  the template takes no system message: it was put in front of the first user message
    """

    name: str
    sample: str
    tokens: Tokens
    prefix: tuple[int, ...]
    spans: tuple[Span, ...]
    folded_system: bool

    @property
    def text(self) -> str:
        return self.tokens.text.decode()

    @property
    def sequence(self) -> list[int]:
        """The ids that the model is given."""
        return [*self.prefix, *self.tokens.ids.tolist()]


@dataclass(frozen=True, eq=False)
class SpanTokens:
    """The tokens of one span.

    tokens     their text is the content; ends count from its first byte. With `closes` the last token is the end of
               turn, which ends one byte after the content; without, they may end before the content does
    begin      index of the first of them in the rendered chat
    straddles  nothing predicts the first token as a part of the content: it begins before it, or begins the sequence
    closes     the content ends with a token, and its end of turn follows directly
    """

    tokens: Tokens
    begin: int
    straddles: bool
    closes: bool

    @property
    def first(self) -> int:
        """Index, in the rendered chat, of the first supervised token."""
        return self.begin + (self.straddles and len(self.tokens) > 0)

    @property
    def stop(self) -> int:
        return self.begin + len(self.tokens)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """How one model writes chats.

    end_of_turn  the only token that may end a turn; None: whichever special token follows a content
    """

    name: str
    vocabulary: Vocabulary
    template: Template
    end_of_turn: int | None

    @classmethod
    def from_files(
        cls,
        files: Mapping[str, bytes],
        vocabulary: Vocabulary,
        name: str,
        *,
        template: str | None = None,
        roles: Mapping[str, str | int] | None = None,
        today: date = TODAY,
    ) -> "ChatTemplate":
        """Build from tokenizer files by name, as a teacher serves them.

        template  takes the place of the model's own, or of the one that it lacks
        roles     {"end_of_turn": id or spelling} where the token that follows a content is not to be trusted
        today     the date that templates may write; the same for every model of a run
        Raises ChatError for files that cannot be read, a model without a template, and unknown roles and tokens.
        """
        read = Template.from_files(files, name, template, today)
        return cls(name, vocabulary, read, _end_of_turn(roles or {}, vocabulary, name))

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, sample: str = "chat"
    ) -> Rendered:
        """Write and tokenize a chat, and find what is supervised: assistant contents, except where "train" is false.

        A message is {"role", "content"} and whatever else the template reads (tool_calls, name, …). An assistant's
        content beside tool calls is a span without an end of turn; without content it is no span at all.
        Raises ChatError naming sample and model.
        """
        chat = Chat(
            self.template,
            tuple(dict(message) for message in messages),
            tuple(dict(tool) for tool in tools),
            f"sample {sample}, model {self.name}",
        )
        written = chat.written(self._specials)
        try:
            tokens = self.vocabulary.encode_rendered(written.text)
        except TokenizerError as error:
            raise chat.error(str(error)) from error
        prefix = self.vocabulary.prefix
        calling = {i for i, message in enumerate(messages) if message.get("tool_calls")}
        return Rendered(
            name=self.name,
            sample=sample,
            tokens=tokens,
            prefix=() if tokens.ids[:1].tolist() == prefix else tuple(prefix),
            spans=tuple(
                Span(i, *place, None if i in calling else self._end_after(tokens, place))
                for i, place in written.places.items()
            ),
            folded_system=written.folded_system,
        )

    def _end_after(self, tokens: Tokens, place: tuple[int, int]) -> int | None:
        _, after, whole = token_range(tokens, *place)
        if not whole or after == len(tokens):
            return None
        token = int(tokens.ids[after])
        return token if self._ends_turn(token) else None

    def _ends_turn(self, token: int) -> bool:
        if self.end_of_turn is not None:
            return token == self.end_of_turn
        roles = self.vocabulary.roles
        if token == roles.get("eos"):
            return True
        return token != roles.get("bos") and self.vocabulary.token_bytes[token] is None

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        """Matches whatever the tokenizer reads as a special token, and what is spelled as one: DeepSeek's turns are
        marked by tokens that its tokenizer does not call special."""
        tokens, written = self.vocabulary.tokens, self.vocabulary.token_bytes
        spellings = {
            token
            for token, data in zip(tokens, written, strict=True)
            if token and (data is None or _CONTROL.fullmatch(token))
        }
        if self.end_of_turn is not None:
            spellings.add(tokens[self.end_of_turn])
        return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or r"(?!)")


def chat_tokens(rendered: Rendered, span: Span) -> SpanTokens:
    """The tokens of a span's content and its end of turn."""
    tokens = rendered.tokens
    begin, end, whole = token_range(tokens, span.start, span.stop)
    part = tokens.part(slice(begin, end), span.start, span.stop)
    closes = whole and span.end_of_turn is not None
    if span.end_of_turn is not None and closes:
        part = part.closed(span.end_of_turn)
    before = tokens.ends[begin - 1] if begin else 0
    return SpanTokens(
        tokens=part,
        begin=begin,
        straddles=bool(before != span.start) or (begin == 0 and not rendered.prefix),
        closes=closes,
    )


def supervised_mask(rendered: Rendered) -> NDArray[np.bool_]:
    """[T] which tokens of a chat are learned: assistant contents and their ends of turn."""
    mask = np.zeros(len(rendered.tokens), dtype=bool)
    for span in rendered.spans:
        part = chat_tokens(rendered, span)
        mask[part.first : part.stop] = True
    return mask


def token_range(tokens: Tokens, start: int, stop: int) -> tuple[int, int, bool]:
    """Tokens [begin, end) of the bytes start … stop, and whether `end` stands where the bytes end.

    The first token may begin before `start` (it is the one that holds the first byte); the last does not pass `stop`.
    """
    known = np.flatnonzero(tokens.ends >= 0)
    ends = tokens.ends[known]
    before = int(np.searchsorted(ends, start, side="right"))
    begin = int(known[before - 1]) + 1 if before else 0
    if start == stop:
        return begin, begin, bool(start == (tokens.ends[begin - 1] if begin else 0))
    at = int(np.searchsorted(ends, stop, side="left"))
    whole = at < len(ends) and bool(ends[at] == stop)
    end = int(known[at]) + 1 if whole else int(known[at - 1]) + 1 if at else 0
    return begin, max(begin, end), whole


def _end_of_turn(roles: Mapping[str, str | int], vocabulary: Vocabulary, name: str) -> int | None:
    """The run file's word on which token ends a turn."""
    if unknown := set(roles) - {END_OF_TURN}:
        raise ChatError(f"model {name}: the chat role {min(unknown)!r} is unknown; the only one is {END_OF_TURN!r}")
    token = roles.get(END_OF_TURN)
    if isinstance(token, str):
        token = vocabulary.tokens.index(token) if token in vocabulary.tokens else len(vocabulary)
    if token is not None and not 0 <= token < len(vocabulary):
        raise ChatError(f"model {name}: its tokenizer has no token {roles[END_OF_TURN]!r} to end a turn with")
    return token
