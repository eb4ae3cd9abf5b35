"""Rendering of one chat by one template, and search for the assistant contents in the rendered text.

The search does not rely on the words of the template. The chat is rendered a second time with a marker in place of
one content. The text before the marker, the content, and the text after the marker must then be the first rendering,
character by character. A content that the template rewrites, truncates, drops or repeats is a ChatError.

One rendering with a marker in place of every content usually locates all of them. If the text around the markers
differs from the first rendering, for example because the template treats reasoning separately, smaller groups of
contents are searched, and finally single contents.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.chats.jinja_template import ChatError, JinjaTemplate, Message, TemplateError

_EXCERPT_CHARS = 40  # characters of a text that an error message shows


@dataclass(frozen=True)
class RenderedText:
    """A rendered chat as text.

    content_ranges  bytes [start, stop) of each supervised content in the text, by index of its message
    folded_system   the template accepts no system message: it was merged into the first user message
    """

    text: str
    content_ranges: Mapping[int, tuple[int, int]]
    folded_system: bool


@dataclass(frozen=True, eq=False)
class Chat:
    """A chat and the template that renders it.

    label       sample and model, for error messages
    num_folded  number of messages merged into their successors; message indices refer to the original chat
    """

    template: JinjaTemplate
    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    label: str
    num_folded: int = 0

    def render(self, special_tokens: re.Pattern[str]) -> RenderedText:
        """Render the chat and find the contents of assistant messages, except messages with "train": false.

        special_tokens  matches text that the model's tokenizer reads as a special token
        Raises ChatError with sample and model.
        """
        supervised = self._supervised_messages()
        self._check_special_tokens(special_tokens)
        chat, text = self._fold_system_message()
        marker = _unused_marker(text)
        chat._check_nothing_dropped(marker, supervised)
        ranges = dict(chat._find_contents(supervised, text, marker))
        if list(ranges.values()) != sorted(ranges.values()):
            raise self.error(f"the template reorders the assistant messages {supervised}")
        return RenderedText(text, ranges, folded_system=bool(chat.num_folded))

    def error(self, problem: str, kind: type[ChatError] = ChatError) -> ChatError:
        """Build an error that names sample and model."""
        return kind(f"{self.label}: {problem}")

    def _numbered_messages(self) -> Iterator[tuple[int, Message]]:
        return enumerate(self.messages, self.num_folded)

    def _render_text(self, replacements: Mapping[int, Message] | None = None) -> str:
        """Render the chat with some messages replaced, by index. Raises TemplateError."""
        messages = [(replacements or {}).get(i, message) for i, message in self._numbered_messages()]
        # Templates must not see the key "train", which only this project defines.
        plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        try:
            return self.template.render(plain, self.tools)
        except TemplateError as error:
            raise self.error(str(error), TemplateError) from error

    def _supervised_messages(self) -> list[int]:
        """Return the indices of the messages with a supervised content.

        Raises ChatError if a message or tool is malformed, or if there is no such message.
        """
        for n, tool in enumerate(self.tools):
            if not isinstance(tool.get("function", tool), dict):
                raise self.error(f"tool {n}: expected a function schema")
        supervised = [i for i, message in self._numbered_messages() if self._is_supervised(i, message)]
        if not supervised:
            raise self.error("the chat has no assistant message to train on")
        return supervised

    def _is_supervised(self, i: int, message: Message) -> bool:
        """Return whether the content of message i is supervised. Raises ChatError if the message is malformed."""
        content, calls = message.get("content"), message.get("tool_calls")
        train = message.get("train", message.get("role") == "assistant")
        if not isinstance(message.get("role"), str) or not _are_tool_calls(calls):
            raise self.error(f"message {i}: expected a role, and tool calls with a function name")
        if not isinstance(content, str) and not (content is None and calls):
            raise self.error(f"message {i}: expected a string as content, received {type(content).__name__}")
        if not isinstance(train, bool) or (train and message.get("role") != "assistant"):
            raise self.error(f"message {i}: train is {train!r}, expected a bool, and true for assistant messages only")
        return train and bool(content or not calls)

    def _check_special_tokens(self, special_tokens: re.Pattern[str]) -> None:
        """Raise ChatError if a text contains a special token, which would begin or end a turn within a content."""
        messages = [(f"message {i}", message) for i, message in self._numbered_messages()]
        for where, value in [*messages, *((f"tool {i}", tool) for i, tool in enumerate(self.tools))]:
            for text in _strings(value):
                if match := special_tokens.search(text):
                    excerpt = text[max(0, match.start() - _EXCERPT_CHARS) : match.end() + _EXCERPT_CHARS]
                    raise self.error(f"{where} contains the special token {match[0]!r} in {excerpt!r}")
                if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                    raise self.error(f"{where} contains half of a surrogate pair")

    def _fold_system_message(self) -> tuple["Chat", str]:
        """Return the chat that the template renders, and its text.

        A system message that the template rejects or drops is merged into the user message that follows it. Raises
        ChatError if no user message follows or the template rejects that chat too.
        """
        first = self.messages[0]
        if first["role"] != "system":
            return self, self._render_text()
        try:
            text, problem = self._render_text(), self.error("the template omits the system message")
            marker = _unused_marker(text)
            if not _has_text(first) or marker in self._render_text({0: first | {"content": marker}}):
                return self, text
        except TemplateError as error:
            problem = error
        second = self.messages[1]  # exists: the chat has an assistant message
        if second["role"] != "user":
            raise problem
        folded = replace(self, messages=(_merge(first, second), *self.messages[2:]), num_folded=1)
        try:
            return folded, folded._render_text()
        except TemplateError:
            raise problem from None

    def _check_nothing_dropped(self, marker: str, supervised: Sequence[int]) -> None:
        """Check that the template renders everything that `_find_content` does not search for.

        These are the contents of all other messages, names and arguments of tool calls, and tools. Each is replaced
        by a separate marker, which must occur anywhere in the rendered text.
        """
        searched, descriptions = set(supervised), dict[str, str]()  # descriptions by marker
        replacements: dict[int, Message] = {}
        for i, message in self._numbered_messages():
            replacements[i] = dict(message)
            if i not in searched and _has_text(message):
                replacements[i]["content"] = f"{marker}{i}x"
                descriptions[f"{marker}{i}x"] = f"the content of message {i} ({message['role']})"
            if calls := message.get("tool_calls"):
                names = [f"{marker}{i}n{n}x" for n in range(len(calls))]
                arguments = [f"{marker}{i}v{n}x" for n in range(len(calls))]
                replacements[i]["tool_calls"] = [_marked_call(*c) for c in zip(calls, names, arguments, strict=True)]
                descriptions |= dict.fromkeys([*names, *arguments], f"a tool call of message {i}")
        tools = tuple(_renamed(tool, f"{marker}t{n}x") for n, tool in enumerate(self.tools))
        descriptions |= {f"{marker}t{n}x": f"tool {n}" for n in range(len(tools))}
        text = replace(self, tools=tools)._render_text(replacements)
        found = set(re.findall(rf"{marker}t?[0-9]+(?:[nv][0-9]+)?x", text))
        for each, description in descriptions.items():
            if each not in found:
                raise self.error(f"the template omits or rewrites {description}")

    def _find_contents(self, indices: Sequence[int], text: str, marker: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield message index and byte range [start, stop) of each content, with the result of `_find_content`."""
        if len(indices) == 1:
            yield indices[0], self._find_content(indices[0], text, marker)
        elif (ranges := self._find_together(indices, text, marker)) is not None:
            yield from zip(indices, ranges, strict=True)
        else:
            middle = len(indices) // 2
            yield from self._find_contents(indices[:middle], text, marker)
            yield from self._find_contents(indices[middle:], text, marker)

    def _find_together(self, indices: Sequence[int], text: str, marker: str) -> list[tuple[int, int]] | None:
        """Find several contents with one rendering. Return None if the rendering does not determine all positions."""
        contents = [self.messages[i - self.num_folded] for i in indices]
        replacements = {i: m | {"content": f"{marker}{i}x"} for i, m in zip(indices, contents, strict=True)}
        try:
            parts = re.split(rf"{marker}([0-9]+)x", self._render_text(replacements))
        except TemplateError:  # the template may accept one marker and reject several
            return None
        if parts[1::2] != [str(i) for i in indices] or not text.startswith(parts[0]):
            return None
        ranges: list[tuple[int, int]] = []
        char, byte = len(parts[0]), len(parts[0].encode())
        for message, after in zip(contents, parts[2::2], strict=True):
            # Of several forms that are possible here, a later part of the text would have to decide.
            possible = {f for f in _forms(message["content"]) if text.startswith(f + after, char)}
            if len(possible) != 1:
                return None
            (form,) = possible
            ranges.append((byte, byte + len(form.encode())))
            char, byte = char + len(form) + len(after), ranges[-1][1] + len(after.encode())
        return ranges if char == len(text) else None

    def _find_content(self, i: int, text: str, marker: str) -> tuple[int, int]:
        """Return the bytes [start, stop) of the content of message i, without white space that the template strips.

        Raises ChatError if the template does not render the content unchanged.
        """
        message = self.messages[i - self.num_folded]
        content: str = message["content"]
        marked = self._render_text({i: message | {"content": marker}})
        before, found, after = marked.partition(marker)
        forms = _forms(content)
        for form in forms if found else ():
            if text == before + form + after:
                return _byte_range(text, len(before), len(form))
        # The text around the content depends on the content (a template that treats thoughts separately). The content
        # is then accepted if it occurs exactly once, and not in the text of the template itself.
        for form in forms[:2]:
            if form and form not in marked and 0 <= text.find(form) == text.rfind(form):
                return _byte_range(text, text.find(form), len(form))
        expected = before + content + after if found else marked
        difference = _first_difference(expected, text)
        excerpt = slice(max(0, difference - _EXCERPT_CHARS), difference + _EXCERPT_CHARS)
        raise self.error(
            f"the template does not render the content of message {i} unchanged: expected "
            f"{(expected[excerpt] if found else content[:_EXCERPT_CHARS])!r}, found {text[excerpt]!r}"
        )


def _are_tool_calls(calls: object) -> bool:
    return calls is None or (isinstance(calls, list | tuple) and all(map(_is_tool_call, calls)))


def _is_tool_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _unused_marker(text: str) -> str:
    """Return a word that does not occur in the text."""
    return next(marker for n in range(len(text) + 1) if (marker := f"Mark{n}Here") not in text)


def _forms(content: str) -> list[str]:
    """Return a content and its variants after the white-space stripping that templates apply."""
    forms = [content, content.strip(), content.rstrip(), content.lstrip()]
    return [*forms, content.strip("\n"), content.lstrip("\n")]


def _byte_range(text: str, start: int, length: int) -> tuple[int, int]:
    begin = len(text[:start].encode())
    return begin, begin + len(text[start : start + length].encode())


def _has_text(message: Message) -> bool:
    return bool((message.get("content") or "").strip())


def _merge(system: Message, user: Message) -> Message:
    """Put the content of the system message in front of the content of the user message."""
    if not _has_text(system):
        return user
    return user | {"content": f"{system['content']}\n\n{user['content']}"}


def _renamed(tool: Message, name: str) -> Message:
    """Return a tool, or a tool call, with another function name."""
    return tool | ({"function": tool["function"] | {"name": name}} if "function" in tool else {"name": name})


def _marked_call(call: Message, name: str, argument: str) -> Message:
    """Return a tool call with another name and one other argument. Arguments keep their type, JSON text or object."""
    call = _renamed(call, name)
    function = call.get("function", call)
    arguments = {argument: argument}
    marked = function | {
        "arguments": json.dumps(arguments) if isinstance(function.get("arguments"), str) else arguments
    }
    return call | {"function": marked} if "function" in call else marked


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in a message or a tool, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (*_strings(key), *_strings(item))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _first_difference(a: str, b: str) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))
