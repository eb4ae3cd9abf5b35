"""The parts of a message that are searched in a rendered chat, and copies of the message with markers in them.

A part is the reasoning, the content or the tool calls of an assistant message, or the content of a tool's message.
Reasoning is `reasoning_content`, or `<think>…</think>` at the beginning of the content.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from trainer.chats.config import SupervisionConfig
from trainer.chats.jinja_template import Message

PartKind = Literal["reasoning", "content", "tool_calls", "tool_result"]
PART_KINDS: tuple[PartKind, ...] = get_args(PartKind)
REASONING = "reasoning_content"
_THOUGHT = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)


class MessageError(ValueError):
    """A malformed message or tool. The text names its index."""


class Slot(NamedTuple):
    """One part of one message, to be found in the rendered text."""

    message: int
    kind: PartKind


class _Thought(NamedTuple):
    """A content that begins with reasoning, in four pieces: `<think>`, the reasoning, `</think>`, the rest."""

    opening: str
    reasoning: str
    closing: str
    content: str


def normalized(message: Message) -> Message:
    """Return a message without null content and without blank or repeated reasoning.

    A template that receives the same reasoning in two places would render it twice. Raises ValueError if the two
    differ.
    """
    message = {key: value for key, value in message.items() if key != REASONING or not _is_blank(value)}
    if message.get("content") is None and message.get("tool_calls"):
        message["content"] = ""
    thought = _thought(message)
    if REASONING not in message or thought is None:
        return message
    if thought.reasoning.strip() not in ("", message[REASONING].strip()):
        raise ValueError("reasoning_content and the text between <think> and </think> differ: keep one of them")
    return message | {"content": thought.content.lstrip()}


def supervised_slots(messages: Sequence[Message], supervision: SupervisionConfig) -> list[Slot]:
    """Return the supervised parts of a chat, in order. Raises MessageError for a malformed message."""
    first = 0
    if supervision.turns == "last":
        first = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=-1) + 1
    slots: list[Slot] = []
    for i, message in enumerate(messages):
        train = _is_trained(i, message, supervision)
        if train and i >= first:
            slots += (Slot(i, kind) for kind in _kinds(message, supervision))
    return slots


def check_tools(tools: Sequence[Message]) -> None:
    """Raise MessageError if a tool is malformed."""
    for n, tool in enumerate(tools):
        if not isinstance(tool.get("function", tool), dict):
            raise MessageError(f"tool {n}: expected a function schema")


def _is_trained(i: int, message: Message, supervision: SupervisionConfig) -> bool:
    """Return whether a message may be supervised. Raises MessageError if it is malformed."""
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    trained = ["assistant", *(["tool"] if supervision.tool_results else [])]
    train = message.get("train", role in trained)
    if not isinstance(role, str) or not _are_tool_calls(calls):
        raise MessageError(f"message {i}: expected a role, and tool calls with a function name")
    if not isinstance(content, str):
        raise MessageError(f"message {i}: expected a string as content, received {type(content).__name__}")
    if not isinstance(message.get(REASONING, ""), str):
        raise MessageError(f"message {i}: expected a string as {REASONING}")
    if not isinstance(train, bool) or (train and role not in trained):
        raise MessageError(
            f"message {i}: train is {train!r}, expected a bool, and true for assistant messages only (for messages of "
            "tools, set data.supervision.tool_results = true)"
        )
    return train


def _kinds(message: Message, supervision: SupervisionConfig) -> Iterator[PartKind]:
    if message["role"] == "tool":
        yield "tool_result"
        return
    calls = message.get("tool_calls")
    if supervision.reasoning and part_text(message, "reasoning"):
        yield "reasoning"
    if part_text(message, "content").strip() or not calls:
        yield "content"
    if supervision.tool_calls and calls:
        yield "tool_calls"


def part_text(message: Message, kind: PartKind) -> str:
    """Return the text of a part; empty for tool calls, whose syntax the template determines."""
    if kind == "tool_calls":
        return ""
    thought = _thought(message)
    if kind == "reasoning":
        reasoning = str(message.get(REASONING) or (thought.reasoning if thought else ""))
        return reasoning if reasoning.strip() else ""
    return thought.content if thought else str(message.get("content") or "")


def with_marks(message: Message, marks: Mapping[PartKind, str]) -> Message:
    """Return the message with a marker in place of each named part, and in front of the name of its first tool call."""
    changed, thought = dict(message), _thought(message)
    content = marks.get("content", marks.get("tool_result", part_text(message, "content")))
    if thought is not None:
        reasoning = marks.get("reasoning", thought.reasoning)
        changed["content"] = f"{thought.opening}{reasoning}{thought.closing}{content}"
    else:
        changed["content"] = content
        if "reasoning" in marks:
            changed[REASONING] = marks["reasoning"]
    if mark := marks.get("tool_calls"):
        first, *others = message["tool_calls"]
        changed["tool_calls"] = [renamed(first, mark + first.get("function", first)["name"]), *others]
    return changed


def has_text(message: Message) -> bool:
    """Return whether the content of a message is not blank."""
    return not _is_blank(message.get("content"))


def is_inline(message: Message) -> bool:
    """Return whether the reasoning of a message is in its content."""
    return REASONING not in message and _thought(message) is not None


def map_texts(value: Any, change: Any) -> Any:
    """Return a message, a tool or a part of one with `change` applied to every string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key) if isinstance(key, str) else key: map_texts(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [map_texts(item, change) for item in value]
    return value


def map_message_texts(message: Message, change: Any) -> Message:
    """Return a message with `change` applied to its texts. `<think>` and `</think>` around reasoning are kept."""
    thought = _thought(message)
    if thought is None:
        return dict(map_texts(message, change))
    opening, reasoning, closing, content = thought
    changed = map_texts({key: value for key, value in message.items() if key != "content"}, change)
    return dict(changed) | {"content": f"{opening}{change(reasoning)}{closing}{change(content)}"}


def renamed(tool: Message, name: str) -> Message:
    """Return a tool, or a tool call, with another function name."""
    return tool | ({"function": tool["function"] | {"name": name}} if "function" in tool else {"name": name})


def _thought(message: Message) -> _Thought | None:
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str) or "<think>" not in content:
        return None
    match = _THOUGHT.fullmatch(content)
    return _Thought(*match.groups()) if match else None


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _are_tool_calls(calls: object) -> bool:
    return calls is None or (isinstance(calls, list | tuple) and all(map(_is_tool_call, calls)))


def _is_tool_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
