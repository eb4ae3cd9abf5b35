"""Parts of a chat that a template does not render.

Supervised parts are searched in the rendered text (content_search.py). For all other parts, this module only checks
that the template renders them: contents of messages that are not supervised, names and arguments of tool calls, and
tools. Each of them is replaced by a separate marker, which must occur somewhere in the rendered text.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.chats.json_values import Message
from trainer.chats.message_parts import has_text, renamed

EXCERPT_CHARS = 40  # characters of a text that an error message shows


@dataclass(frozen=True)
class Omission:
    """A part of a chat that the template does not render unchanged.

    message  index of the message; None for a tool
    kind     reasoning, content, tool_calls, tool_result or tool
    text     beginning of the omitted text
    problem  what the template does; empty for reasoning that it renders in the last turn only, which is expected
    """

    message: int | None
    kind: str
    text: str
    problem: str = ""


@dataclass(frozen=True)
class MarkedChat:
    """A chat with markers in place of the parts that must be rendered.

    messages  messages by index
    marks     omission to report for each marker that a rendering lacks
    marker    beginning of all markers
    """

    messages: Mapping[int, Message]
    tools: tuple[Message, ...]
    marks: Mapping[str, Omission]
    marker: str

    def missing_in(self, text: str) -> Iterator[Omission]:
        """Yield the parts whose markers a rendering does not contain, each once."""
        found = set(re.findall(rf"{self.marker}t?[0-9]+(?:[nv][0-9]+)?x", text))
        yield from dict.fromkeys(omission for mark, omission in self.marks.items() if mark not in found)


def mark_unsearched(
    messages: Mapping[int, Message], tools: Sequence[Message], searched: Collection[int], marker: str
) -> MarkedChat:
    """Put markers in place of the contents of all messages but `searched`, of tool calls and of the names of tools."""
    marked, marks = dict[int, Message](), dict[str, Omission]()
    for i, message in messages.items():
        marked[i] = dict(message)
        if i not in searched and has_text(message):
            marked[i]["content"] = mark = f"{marker}{i}x"
            excerpt = message["content"][:EXCERPT_CHARS]
            marks[mark] = _omission(i, "content", excerpt, f"the content of message {i} ({message['role']})")
        if calls := message.get("tool_calls"):
            pairs = [(f"{marker}{i}n{n}x", f"{marker}{i}v{n}x") for n in range(len(calls))]
            marked[i]["tool_calls"] = [_marked_call(call, *pair) for call, pair in zip(calls, pairs, strict=True)]
            for call, pair in zip(calls, pairs, strict=True):
                omission = _omission(i, "tool_calls", excerpt_of_call(call), f"a tool call of message {i}")
                marks |= dict.fromkeys(pair, omission)
    for n, tool in enumerate(tools):
        name = tool["function"]["name"][:EXCERPT_CHARS]
        marks[f"{marker}t{n}x"] = _omission(None, "tool", name, f"tool {n}")
    return MarkedChat(marked, tuple(renamed(tool, f"{marker}t{n}x") for n, tool in enumerate(tools)), marks, marker)


def excerpt_of_call(call: Message) -> str:
    """Return the beginning of the name and the arguments of a tool call."""
    function = call["function"]
    return f"{function['name']} {json.dumps(function['arguments'], ensure_ascii=False)}"[:EXCERPT_CHARS]


def _omission(message: int | None, kind: str, text: str, description: str) -> Omission:
    return Omission(message, kind, text, f"the template omits or rewrites {description}: {text!r}")


def _marked_call(call: Message, name: str, argument: str) -> Message:
    """Return a tool call with another name and one other argument."""
    return call | {"function": call["function"] | {"name": name, "arguments": {argument: argument}}}
