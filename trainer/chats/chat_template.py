"""Chats as one model tokenizes them: the rendered text, its tokens, and the supervised spans.

A span is the content of one assistant message and, if a special token follows it directly, that token as the end of
the turn.
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
from trainer.chats.content_search import Chat
from trainer.chats.jinja_template import TODAY, ChatError, JinjaTemplate

END_OF_TURN = "end_of_turn"
_TURN_MARKER = re.compile(r"<[|｜].+[|｜]>")  # tokens such as <|user|>, whether or not the tokenizer calls them special


@dataclass(frozen=True)
class Span:
    """The content of one assistant message in a rendered chat.

    message      index of the message in the original chat
    start, stop  bytes [start, stop) of the rendered text
    end_of_turn  id of the special token that follows directly; None without one
    """

    message: int
    start: int
    stop: int
    end_of_turn: int | None


@dataclass(frozen=True, eq=False)
class RenderedChat:
    """A chat as one model tokenizes it.

    name           model
    sample         name of the sample
    tokens         tokens of the whole rendered text, without `prefix`
    prefix         BOS, if the model expects it and the template does not render it; otherwise empty
    spans          supervised contents, in order
    folded_system  the template accepts no system message: it was merged into the first user message
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
        """Return the token ids of the model's input: prefix and tokens."""
        return [*self.prefix, *self.tokens.ids.tolist()]


@dataclass(frozen=True, eq=False)
class SpanTokens:
    """The tokens of one span.

    tokens     tokens of the content; `ends` counts from the first byte of the content. With `closes`, the last token
               is the end of turn, which ends one byte after the content. Without `closes`, the tokens may end before
               the content does
    begin      index of the first of these tokens in the rendered chat
    straddles  the first token cannot be supervised: it begins before the content, or it begins the sequence, where
               nothing predicts it
    closes     the content ends with a token, and the end of turn follows directly
    """

    tokens: Tokens
    begin: int
    straddles: bool
    closes: bool

    @property
    def first(self) -> int:
        """Return the index of the first supervised token in the rendered chat."""
        return self.begin + (self.straddles and len(self.tokens) > 0)

    @property
    def stop(self) -> int:
        """Return the index after the last token in the rendered chat."""
        return self.begin + len(self.tokens)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """The chat template and the vocabulary of one model.

    end_of_turn  id of the only token that may end a turn; None accepts any special token that follows a content
    """

    name: str
    vocabulary: Vocabulary
    template: JinjaTemplate
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
        """Build from tokenizer files by file name.

        template  Jinja code that replaces the template in the files
        roles     {"end_of_turn": token id or token text}, if the token that follows a content is not the end of turn
        today     date that templates insert; it must be the same for all models of a run
        Raises ChatError if a file cannot be read, there is no template, or a role or its token is unknown.
        """
        jinja = JinjaTemplate.from_files(files, name, template, today)
        return cls(name, vocabulary, jinja, _end_of_turn(roles or {}, vocabulary, name))

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, sample: str = "chat"
    ) -> RenderedChat:
        """Render and tokenize a chat, and find the supervised spans: assistant messages without "train": false.

        A message is {"role", "content"} and further keys that the template reads (tool_calls, name, …). An assistant
        content with tool calls is a span without an end of turn. A message of tool calls without content has no span.
        Raises ChatError with sample and model.
        """
        chat = Chat(
            self.template,
            tuple(dict(message) for message in messages),
            tuple(dict(tool) for tool in tools),
            f"sample {sample}, model {self.name}",
        )
        try:
            rendered = chat.render(self._special_tokens)
        except RecursionError as error:
            raise chat.error("a message or a tool is nested too deeply") from error
        try:
            tokens = self.vocabulary.encode_rendered(rendered.text)
        except TokenizerError as error:
            raise chat.error(str(error)) from error
        prefix = self.vocabulary.prefix
        with_calls = {i for i, message in enumerate(messages) if message.get("tool_calls")}
        return RenderedChat(
            name=self.name,
            sample=sample,
            tokens=tokens,
            prefix=() if tokens.ids[:1].tolist() == prefix else tuple(prefix),
            spans=tuple(
                Span(i, *content_range, None if i in with_calls else self._end_after(tokens, content_range))
                for i, content_range in rendered.content_ranges.items()
            ),
            folded_system=rendered.folded_system,
        )

    def _end_after(self, tokens: Tokens, content_range: tuple[int, int]) -> int | None:
        """Return the end-of-turn token that directly follows the content; None without one."""
        _, after, is_whole = token_range(tokens, *content_range)
        if not is_whole or after == len(tokens):
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
    def _special_tokens(self) -> re.Pattern[str]:
        """Match the text of every special token, and of every token that looks like a turn marker.

        The turns of DeepSeek's template are marked by tokens that its tokenizer does not call special.
        """
        texts, token_bytes = self.vocabulary.tokens, self.vocabulary.token_bytes
        special = {
            text
            for text, data in zip(texts, token_bytes, strict=True)
            if text and (data is None or _TURN_MARKER.fullmatch(text))
        }
        if self.end_of_turn is not None:
            special.add(texts[self.end_of_turn])
        # The longest alternative first, so that errors name the whole token. (?!) matches nothing.
        return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")


def chat_tokens(rendered: RenderedChat, span: Span) -> SpanTokens:
    """Return the tokens of a span's content and of its end of turn."""
    tokens = rendered.tokens
    begin, end, is_whole = token_range(tokens, span.start, span.stop)
    content = tokens.excerpt(slice(begin, end), span.start, span.stop)
    closes = is_whole and span.end_of_turn is not None
    if span.end_of_turn is not None and closes:
        content = content.with_end_token(span.end_of_turn)
    previous_end = tokens.ends[begin - 1] if begin else 0
    return SpanTokens(
        tokens=content,
        begin=begin,
        straddles=bool(previous_end != span.start) or (begin == 0 and not rendered.prefix),
        closes=closes,
    )


def supervised_mask(rendered: RenderedChat) -> NDArray[np.bool_]:
    """[T] Return the supervised tokens of a chat: assistant contents and their ends of turn."""
    mask = np.zeros(len(rendered.tokens), dtype=bool)
    for span in rendered.spans:
        tokens = chat_tokens(rendered, span)
        mask[tokens.first : tokens.stop] = True
    return mask


def token_range(tokens: Tokens, start: int, stop: int) -> tuple[int, int, bool]:
    """Return the tokens [begin, end) of the bytes [start, stop), and whether the last token ends exactly at `stop`.

    The first token contains the first byte and may begin before `start`. The last token does not end after `stop`.
    Tokens that end inside a character have no byte offset (`ends` is negative) and are skipped by the search.
    """
    known = np.flatnonzero(tokens.ends >= 0)
    ends = tokens.ends[known]
    before = int(np.searchsorted(ends, start, side="right"))  # number of known ends at or before `start`
    begin = int(known[before - 1]) + 1 if before else 0
    if start == stop:
        return begin, begin, bool(start == (tokens.ends[begin - 1] if begin else 0))
    last = int(np.searchsorted(ends, stop, side="left"))  # first known end at or after `stop`
    is_whole = last < len(ends) and bool(ends[last] == stop)
    end = int(known[last]) + 1 if is_whole else int(known[last - 1]) + 1 if last else 0
    return begin, max(begin, end), is_whole


def _end_of_turn(roles: Mapping[str, str | int], vocabulary: Vocabulary, name: str) -> int | None:
    """Return the id of the token that ends a turn according to the roles; None if they do not name one."""
    if unknown := set(roles) - {END_OF_TURN}:
        raise ChatError(f"model {name}: unknown chat role {min(unknown)!r}, expected {END_OF_TURN!r}")
    token = roles.get(END_OF_TURN)
    if isinstance(token, str):
        token = vocabulary.tokens.index(token) if token in vocabulary.tokens else len(vocabulary)
    if token is not None and not 0 <= token < len(vocabulary):
        raise ChatError(f"model {name}: {END_OF_TURN} is {roles[END_OF_TURN]!r}, which is not a token of its tokenizer")
    return token
