"""Chats as one model tokenizes them: the rendered text, its tokens, and the supervised spans.

A span is what the assistant generates in one turn: reasoning, content and tool calls, the text of the template between
them, and the token that ends the turn.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from alignment import Tokens
from trainer.chats.message_parts import PartKind
from trainer.chats.omissions import Omission


@dataclass(frozen=True)
class MessagePart:
    """The reasoning, the content or the tool calls of a message: bytes [start, stop) of the rendered text."""

    kind: PartKind
    start: int
    stop: int


@dataclass(frozen=True)
class Span:
    """The supervised text of one message in a rendered chat.

    message      index of the message in the original chat
    start, stop  bytes [start, stop) of the rendered text
    end_of_turn  id of the token that follows directly and ends the turn; None without one
    parts        parts of the message within the span, in order
    """

    message: int
    start: int
    stop: int
    end_of_turn: int | None
    parts: tuple[MessagePart, ...] = ()


@dataclass(frozen=True, eq=False)
class RenderedChat:
    """A chat as one model tokenizes it.

    name           model
    sample         name of the sample
    tokens         tokens of the whole rendered text, without `prefix`
    prefix         BOS, if the model expects it and the template does not render it; otherwise empty
    spans          supervised spans, in order
    special_T      [T] bool: special tokens, which have no bytes of text
    folded_system  whether the system message was merged into the first user message, as the template renders none
    omissions      parts of the chat that the template does not render unchanged
    """

    name: str
    sample: str
    tokens: Tokens
    prefix: tuple[int, ...]
    spans: tuple[Span, ...]
    special_T: NDArray[np.bool_]
    folded_system: bool
    omissions: tuple[Omission, ...] = ()

    @property
    def text(self) -> str:
        return self.tokens.text.decode()

    @property
    def sequence(self) -> list[int]:
        """Return the token ids of the model's input: prefix and tokens."""
        return [*self.prefix, *self.tokens.ids.tolist()]

    @cached_property
    def ends_turn(self) -> NDArray[np.bool_]:
        """[T] Whether a token is one that ends the turn of a span."""
        return np.isin(self.tokens.ids, [span.end_of_turn for span in self.spans if span.end_of_turn is not None])


@dataclass(frozen=True, eq=False)
class SpanTokens:
    """The tokens of one span.

    tokens     tokens of the text; `ends` counts from the first byte of the span. With `closes`, the last token is the
               end of turn, which ends one byte after the text. Without `closes`, the tokens may end before the text
               does
    begin      index of the first of these tokens in the rendered chat
    straddles  whether the first token cannot be supervised, because it begins before the span, or because it is the
               first token of the sequence, which nothing predicts
    closes     whether a token ends exactly at the end of the text and the end of turn follows it
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


def chat_tokens(rendered: RenderedChat, span: Span) -> SpanTokens:
    """Return the tokens of a span's text and of its end of turn."""
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
    """[T] Return the supervised tokens of a chat: those of its spans and their ends of turn."""
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
    known, ends = tokens.known_ends
    before = int(np.searchsorted(ends, start, side="right"))  # number of known ends at or before `start`
    begin = int(known[before - 1]) + 1 if before else 0
    if start == stop:
        return begin, begin, bool(start == (tokens.ends[begin - 1] if begin else 0))
    last = int(np.searchsorted(ends, stop, side="left"))  # first known end at or after `stop`
    is_whole = last < len(ends) and bool(ends[last] == stop)
    end = int(known[last]) + 1 if is_whole else int(known[last - 1]) + 1 if last else 0
    return begin, max(begin, end), is_whole
