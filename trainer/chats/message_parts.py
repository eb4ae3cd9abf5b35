"""The parts of a message that are searched in a rendered chat, and copies of the message with markers in them.

A part is the reasoning, the content or the tool calls of an assistant message, or the content of a tool's message.
Reasoning is `reasoning_content`, or `<think>…</think>` at the beginning of the content. All messages and tools are in
the normal form of trainer/chats/messages.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from trainer.chats.config import SupervisionConfig
from trainer.chats.inline_reasoning import InlineReasoning, inline_reasoning
from trainer.chats.json_values import Message
from trainer.chats.message_content import REASONING
from trainer.chats.messages import SUPERVISED_ROLES

PartKind = Literal["reasoning", "content", "tool_calls", "tool_result"]
PART_KINDS: tuple[PartKind, ...] = get_args(PartKind)


class Slot(NamedTuple):
    """One part of one message, to be found in the rendered text."""

    message: int
    kind: PartKind


def supervised_slots(messages: Sequence[Message], supervision: SupervisionConfig) -> list[Slot]:
    """Return the supervised parts of a chat, in order."""
    roles = SUPERVISED_ROLES if supervision.tool_results else ("assistant",)
    first = 0
    if supervision.turns == "last":
        first = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1) + 1
    return [
        Slot(i, kind)
        for i, message in enumerate(messages)
        if i >= first and message["role"] in roles and message.get("train", True)
        for kind in _kinds(message, supervision)
    ]


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
    inline = _inline(message)
    if kind == "reasoning":
        if inline is None:
            return str(message.get(REASONING, ""))
        return inline.reasoning if inline.reasoning.strip() else ""
    return inline.content if inline else str(message["content"])


def with_marks(message: Message, marks: Mapping[PartKind, str]) -> Message:
    """Return the message with a marker in place of each part named in `marks`.

    The marker of the tool calls is put in front of the name of the first call, which keeps its name.
    """
    changed, inline = dict(message), _inline(message)
    content = marks.get("content", marks.get("tool_result", part_text(message, "content")))
    if inline is not None:
        reasoning = marks.get("reasoning", inline.reasoning)
        changed["content"] = f"{inline.opening}{reasoning}{inline.closing}{content}"
    else:
        changed["content"] = content
        if "reasoning" in marks:
            changed[REASONING] = marks["reasoning"]
    if mark := marks.get("tool_calls"):
        first, *others = message["tool_calls"]
        changed["tool_calls"] = [renamed(first, mark + first["function"]["name"]), *others]
    return changed


def has_text(message: Message) -> bool:
    """Return whether the content of a message is not blank."""
    return bool(message["content"].strip())


def is_inline(message: Message) -> bool:
    """Return whether the reasoning of a message is in its content; then it has no `reasoning_content`."""
    return _inline(message) is not None


def map_texts(value: Any, change: Any) -> Any:
    """Return a message, a tool or a part of one with `change` applied to every string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key) if isinstance(key, str) else key: map_texts(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [map_texts(item, change) for item in value]
    return value


def map_message_texts(message: Mapping[str, Any], change: Any) -> Message:
    """Return a message with `change` applied to its texts. `<think>` and `</think>` around reasoning are kept."""
    inline = _inline(message)
    if inline is None:
        return dict(map_texts(message, change))
    opening, reasoning, closing, content = inline
    changed = map_texts({key: value for key, value in message.items() if key != "content"}, change)
    return dict(changed) | {"content": f"{opening}{change(reasoning)}{closing}{change(content)}"}


def renamed(tool: Message, name: str) -> Message:
    """Return a tool, or a tool call, with another function name."""
    return tool | {"function": tool["function"] | {"name": name}}


def _inline(message: Mapping[str, Any]) -> InlineReasoning | None:
    return inline_reasoning(message["role"], message["content"])
