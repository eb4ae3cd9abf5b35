"""Texts of special tokens in the messages of a chat: search for them, and escape them.

If a message contains a text such as `<|im_end|>`, a tokenizer encodes it in the rendered chat as the special token,
which would end the turn within the content. To encode it as ordinary text, each such text is enclosed in a character
that occurs nowhere else in the chat. The template renders the escaped chat. The characters then show which of the texts
are not special tokens, and are removed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from trainer.chats.content_search import first_difference
from trainer.chats.jinja_template import ChatError
from trainer.chats.json_values import InvalidChat, Message
from trainer.chats.message_parts import map_message_texts, map_texts

_EXCERPT_CHARS = 40
_MAX_NESTED = 50  # groups of a pattern within each other; the parser of patterns is recursive
_SURROGATE = re.compile("[\ud800-\udfff]")
_PRIVATE_USE = range(0xE000, 0xF8FF)


class SpecialTokenError(ChatError):
    """A text of a chat contains the text of a special token."""


@dataclass(frozen=True)
class SpelledToken:
    """The text of a special token in a message or tool of a chat.

    place    the message or tool, for example "message 1"
    excerpt  the text around it
    """

    token: str
    place: str
    excerpt: str

    def __str__(self) -> str:
        return f"{self.place} contains the special token {self.token!r} in {self.excerpt!r}"


def token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern that matches each of the tokens; where several match, the longest one.

    Common beginnings are factored out, so that the time at a position does not depend on the number of tokens. Gemma
    has 6,000 special tokens that begin with `<`.
    """
    distinct = sorted(set(tokens) - {""})
    return re.compile(_alternatives(distinct) if distinct else r"(?!)")  # (?!) matches nothing


def _alternatives(tokens: Sequence[str], nested: int = 0) -> str:
    """Return the pattern of sorted, distinct tokens. An empty token matches if none of the others does."""
    if nested > _MAX_NESTED:
        return f"(?:{'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})"
    parts = []
    for _, group in groupby(filter(None, tokens), key=lambda token: token[0]):
        members = list(group)
        common = members[0][: first_difference(members[0], members[-1])]
        rest = [token[len(common) :] for token in members]
        parts.append(re.escape(common) + (_alternatives(rest, nested + 1) if len(rest) > 1 else ""))
    return f"(?:{'|'.join(parts)})" + ("?" if tokens[0] == "" else "")


@dataclass
class _Texts:
    """Collects the strings that `map_texts` visits."""

    texts: list[str] = field(default_factory=list)

    def add(self, text: str) -> str:
        self.texts.append(text)
        return text


def first_spelled_token(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], special_tokens: re.Pattern[str]
) -> SpelledToken | None:
    """Return the first special token in the texts of a chat; None without one."""
    for place, texts in _texts_by_place(messages, tools):
        for text in texts:
            if match := special_tokens.search(text):
                excerpt = text[max(0, match.start() - _EXCERPT_CHARS) : match.end() + _EXCERPT_CHARS]
                return SpelledToken(match[0], place, excerpt)
    return None


def spelled_bytes(text: str, special_tokens: re.Pattern[str]) -> list[tuple[int, int]]:
    """Return the bytes [start, stop) of every special token that a text spells."""
    return [(len(text[: m.start()].encode()), len(text[: m.end()].encode())) for m in special_tokens.finditer(text)]


def place_of_surrogate(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the message or tool that contains half of a surrogate pair; None without one."""
    for place, texts in _texts_by_place(messages, tools):
        for text in texts:
            if not text.isascii() and _SURROGATE.search(text):
                return place
    return None


def _texts_by_place(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, list[str]]]:
    """Yield the strings of each message and tool, keys included."""
    for i, message in enumerate(messages):
        collected = _Texts()
        map_message_texts(message, collected.add)
        yield f"message {i}", collected.texts
    for n, tool in enumerate(tools):
        collected = _Texts()
        map_texts(tool, collected.add)
        yield f"tool {n}", collected.texts


@dataclass(frozen=True)
class Escape:
    """Escapes special tokens in texts by a character in front of each and after each."""

    mark: str
    special_tokens: re.Pattern[str]

    @classmethod
    def unused_in(cls, texts: Iterable[Any], special_tokens: re.Pattern[str]) -> "Escape":
        """Choose a character that does not occur in the messages and tools. Raises InvalidChat if all occur."""
        collected = _Texts()
        for each in texts:
            map_texts(each, collected.add)
        used = set().union(*map(set, collected.texts)) if collected.texts else set()
        mark = next((chr(c) for c in _PRIVATE_USE if chr(c) not in used), None)
        if mark is None:
            raise InvalidChat("the chat uses every private character of Unicode")
        return cls(mark, special_tokens)

    def message(self, message: Message) -> Message:
        """Return a message with escaped texts."""
        return map_message_texts(message, self._text)

    def tool(self, tool: Mapping[str, Any]) -> Message:
        """Return a tool with escaped texts."""
        return dict(map_texts(tool, self._text))

    def _text(self, text: str) -> str:
        return self.special_tokens.sub(lambda match: f"{self.mark}{match[0]}{self.mark}", text)


@dataclass(frozen=True)
class PlainText:
    """A rendered text without escapes.

    literals  bytes [start, stop) of each text that spells a special token
    """

    text: str
    literals: tuple[tuple[int, int], ...]
    _offsets: Mapping[int, int]

    def byte_of(self, char: int) -> int:
        """Return the byte offset of a character of the escaped text; only of the characters given to `plain_text`."""
        return self._offsets[char]


def plain_text(escaped: str, chars: Iterable[int], escape: Escape | None) -> PlainText:
    """Remove the escapes from a rendered text, and convert character offsets in it to byte offsets.

    Raises InvalidChat if the template has changed an escaped text.
    """
    offsets, literals = dict[int, int](), list[tuple[int, int]]()
    mark = escape.mark if escape else ""
    marks = [match.start() for match in re.finditer(re.escape(mark), escaped)] if mark else []
    byte = previous = 0
    for char in sorted({*chars, *marks}):
        byte += len((escaped[previous:char].replace(mark, "") if mark else escaped[previous:char]).encode())
        offsets[char], previous = byte, char
    for start, stop in zip(marks[::2], marks[1::2], strict=False):
        literals.append((offsets[start], offsets[stop]))
        if escape is None or not escape.special_tokens.fullmatch(escaped[start + 1 : stop]):
            raise InvalidChat("the template changes a text that spells a special token")
    if len(marks) % 2:
        raise InvalidChat("the template changes a text that spells a special token")
    return PlainText(escaped.replace(mark, "") if mark else escaped, tuple(literals), offsets)
