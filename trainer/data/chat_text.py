"""One chat as one template writes it, and where in that text each assistant message stands.

Nothing is guessed from words. The chat is written a second time with a mark in place of one content; what the
template writes before and after the mark, joined with the content, must be the first writing to the letter. What does
not come out so (a content rewritten, cut, dropped or doubled) is a ChatError.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.data.template import ChatError, Message, Refused, Template

_SHOWN = 40  # characters of a text that an error shows


@dataclass(frozen=True)
class Written:
    """The text, and the bytes [start, stop) of each supervised content, by its message's index in the given chat.

    folded_system  the template takes no system message: it was put in front of the first user message
    """

    text: str
    places: Mapping[int, tuple[int, int]]
    folded_system: bool


@dataclass(frozen=True, eq=False)
class Chat:
    """One chat in front of one template. Messages are counted as they were given: `num_folded` of them are gone."""

    template: Template
    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    names: str  # of sample and model, for errors
    num_folded: int = 0

    def written(self, specials: re.Pattern[str]) -> Written:
        """Write the chat and find its assistant contents, except where "train" is false.

        specials  matches what the model's tokenizer reads as a special token
        Raises ChatError naming sample and model.
        """
        trained = self._trained()
        self._refuse_special_spellings(specials)
        chat, text = self._settled()
        mark = _mark(text)
        chat._refuse_dropped(mark, trained)
        places = {i: chat._find(i, text, mark) for i in trained}
        if list(places.values()) != sorted(places.values()):
            raise self.error(f"the template puts the assistant messages {trained} into another order")
        return Written(text, places, folded_system=bool(chat.num_folded))

    def _numbered(self) -> Iterator[tuple[int, Message]]:
        return enumerate(self.messages, self.num_folded)

    def error(self, what: str, kind: type[ChatError] = ChatError) -> ChatError:
        return kind(f"{self.names}: {what}")

    def text(self, replaced: Mapping[int, Message] | None = None) -> str:
        """The chat as the template writes it, with other messages in the place of some. Raises Refused."""
        messages = [(replaced or {}).get(i, message) for i, message in self._numbered()]
        bare = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        try:
            return self.template.write(bare, self.tools)
        except Refused as error:
            raise self.error(str(error), Refused) from error

    def _trained(self) -> list[int]:
        """The messages to find. Raises ChatError for messages that are none, and if there is nothing to find."""
        for n, tool in enumerate(self.tools):
            if not isinstance(tool.get("function", tool), dict):
                raise self.error(f"tool {n}: expected the schema of a function")
        found = []
        for i, message in self._numbered():
            content, calls = message.get("content"), message.get("tool_calls")
            train = message.get("train", message.get("role") == "assistant")
            if not isinstance(message.get("role"), str) or not _are_calls(calls):
                raise self.error(f"message {i}: expected a role, and tool calls of name and arguments")
            if not isinstance(content, str) and not (content is None and calls):
                raise self.error(f"message {i}: expected a text as its content, received {type(content).__name__}")
            if not isinstance(train, bool) or (train and message.get("role") != "assistant"):
                raise self.error(f"message {i}: train is {train!r}, expected a bool, true for assistants only")
            if train and (content or not calls):
                found.append(i)
        if not found:
            raise self.error("it has no assistant message to learn from")
        return found

    def _refuse_special_spellings(self, specials: re.Pattern[str]) -> None:
        """A text that spells a special token would end a turn or begin one, in a place that no template chose."""
        parts = [(f"message {i}", message) for i, message in self._numbered()]
        for where, part in [*parts, *((f"tool {i}", tool) for i, tool in enumerate(self.tools))]:
            for text in _strings(part):
                if found := specials.search(text):
                    near = text[max(0, found.start() - _SHOWN) : found.end() + _SHOWN]
                    raise self.error(f"{where} spells the special token {found[0]!r} in {near!r}")
                if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                    raise self.error(f"{where} holds half of a surrogate pair")

    def _settled(self) -> tuple["Chat", str]:
        """The chat as the template takes it, and its text: a system message that it refuses or drops is folded."""
        first = self.messages[0]
        if first["role"] != "system":
            return self, self.text()
        try:
            text, refusal = self.text(), self.error("the template leaves out the system message")
            mark = _mark(text)
            if not _says_something(first) or mark in self.text({0: first | {"content": mark}}):
                return self, text
        except Refused as error:
            refusal = error
        second = self.messages[1]  # there is one: an assistant message was found
        if second["role"] != "user":
            raise refusal
        folded = replace(self, messages=(_fold(first, second), *self.messages[2:]), num_folded=1)
        try:
            return folded, folded.text()
        except Refused:
            raise refusal from None

    def _refuse_dropped(self, mark: str, trained: Sequence[int]) -> None:
        """Whatever `find` is not asked for must come through as well, wherever the template puts it."""
        marks: dict[str, str] = {}
        replaced: dict[int, Message] = {}
        for i, message in self._numbered():
            replaced[i] = dict(message)
            if i not in trained and _says_something(message):
                replaced[i]["content"] = f"{mark}{i}x"
                marks[f"{mark}{i}x"] = f"the content of message {i} ({message['role']})"
            if calls := message.get("tool_calls"):
                names = [f"{mark}{i}n{n}x" for n in range(len(calls))]
                values = [f"{mark}{i}v{n}x" for n in range(len(calls))]
                replaced[i]["tool_calls"] = [_marked_call(*c) for c in zip(calls, names, values, strict=True)]
                marks |= dict.fromkeys([*names, *values], f"a tool call of message {i}")
        tools = tuple(_renamed(tool, f"{mark}t{n}x") for n, tool in enumerate(self.tools))
        marks |= {f"{mark}t{n}x": f"tool {n}" for n in range(len(tools))}
        written = replace(self, tools=tools).text(replaced)
        for each, what in marks.items():
            if each not in written:
                raise self.error(f"the template leaves out or rewrites {what}")

    def _find(self, i: int, text: str, mark: str) -> tuple[int, int]:
        """Where message i stands in the text, in bytes: whole, or as far as the template left its white space."""
        message = self.messages[i - self.num_folded]
        content: str = message["content"]
        frame = self.text({i: message | {"content": mark}})
        before, found, after = frame.partition(mark)
        forms = [content, content.strip(), content.rstrip(), content.lstrip()]
        forms += [content.strip("\n"), content.lstrip("\n")]
        for form in forms if found else ():
            if text == before + form + after:
                return _bytes(text, len(before), len(form))
        for form in forms[:2]:  # the template's own words depend on this content, which then must stand in one place
            if form and form not in frame and 0 <= text.find(form) == text.rfind(form):
                return _bytes(text, text.find(form), len(form))
        expected = before + content + after if found else frame
        at = _first_difference(expected, text)
        near = slice(max(0, at - _SHOWN), at + _SHOWN)
        raise self.error(
            f"message {i} does not come out of the template as it is: expected "
            f"{(expected[near] if found else content[:_SHOWN])!r}, seen {text[near]!r}"
        )


def _are_calls(calls: object) -> bool:
    return calls is None or (isinstance(calls, list | tuple) and all(map(_is_call, calls)))


def _mark(text: str) -> str:
    """A word that the text does not hold."""
    return next(mark for n in range(len(text) + 1) if (mark := f"Mark{n}Here") not in text)


def _bytes(text: str, start: int, length: int) -> tuple[int, int]:
    begin = len(text[:start].encode())
    return begin, begin + len(text[start : start + length].encode())


def _says_something(message: Message) -> bool:
    return bool((message.get("content") or "").strip())


def _fold(system: Message, user: Message) -> Message:
    if not _says_something(system):
        return user
    return user | {"content": f"{system['content']}\n\n{user['content']}"}


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _renamed(tool: Message, name: str) -> Message:
    """A tool, or a call of one, by another name."""
    return tool | ({"function": tool["function"] | {"name": name}} if "function" in tool else {"name": name})


def _marked_call(call: Message, name: str, value: str) -> Message:
    """A tool call with other words in it, of the same types."""
    call = _renamed(call, name)
    function = call.get("function", call)
    arguments = {value: value}
    marked = function | {
        "arguments": json.dumps(arguments) if isinstance(function.get("arguments"), str) else arguments
    }
    return call | {"function": marked} if "function" in call else marked


def _strings(part: Any) -> Iterator[str]:
    """Every text in a message or a tool, keys included."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping):
        for key, value in part.items():
            yield from (*_strings(key), *_strings(value))
    elif isinstance(part, Sequence):
        for value in part:
            yield from _strings(value)


def _first_difference(a: str, b: str) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))
