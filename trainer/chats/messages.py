"""Normalization and validation of chats: messages and tools of all common conventions become one normal form.

This is the only place where messages and tools are validated. Sources normalize the chats of their records, and
`ChatTemplate.render` normalizes every chat that it receives. A normalized chat is not changed by it.

A message in normal form has the keys

role               system, user, assistant or tool
content            string; "" without content
reasoning_content  optional string that is not blank; the content does not repeat it
tool_calls         optional list of {"type": "function", "id"?, "function": {"name", "arguments": object}}
train              optional false: a message of the assistant or of a tool that is not supervised

and keeps its other keys (tool_call_id, name, …). A tool is {"type": "function", "function": {"name", ...}}.

In a message, a tool call and a tool, a key with null counts as absent, because tables give every object of a column the
same keys. Inside of arguments and parameters, which may contain any JSON, null is a value and is kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.chats.inline_reasoning import inline_reasoning
from trainer.chats.json_values import (
    InvalidChat,
    Message,
    as_list,
    as_object,
    check_depth,
    objects,
    parsed_json,
    type_name,
)
from trainer.plain_text import excerpt

Fields = Mapping[str, Any]

CALL = "function_call"  # role of a message whose content is a tool call
ROLES = {
    "system": "system",
    "developer": "system",  # most chat templates know no developer
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    CALL: CALL,
}
"""Role of a message by its name in the data."""

SUPERVISED_ROLES = ("assistant", "tool")  # messages of tools only with data.supervision.tool_results
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TRAIN_KEYS = ("train", "training", "loss", "loss_mask", "weight")
_REPLACED = {"role", "from", "content", "value", "tool_calls", "function_call", *REASONING_KEYS, *TRAIN_KEYS}


@dataclass(frozen=True)
class ChatOptions:
    """Settings of a source for the normalization of its chats.

    roles              further roles by their names in the data
    drops_other_parts  leave out parts of a message that are not text, instead of raising an error
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    drops_other_parts: bool = False


def normalize_chat(
    messages: object, tools: object = None, loss_mask: object = None, options: ChatOptions = ChatOptions()
) -> tuple[list[Message], list[Message]]:
    """Return the messages and tools of a chat in the normal form of this module. The input is not modified.

    messages   list of messages, or its JSON text
    tools      list of tools, or its JSON text
    loss_mask  list of 0 or 1 (false or true) for every message, whether it is supervised; or its JSON text
    Raises InvalidChat. Messages and tools are counted from 0.
    """
    check_depth([messages, tools], "the chat")
    given = objects(messages, "the list of messages")
    flags = _flags(loss_mask, len(given))
    normalized = [_message(i, *pair, options) for i, pair in enumerate(zip(given, flags, strict=True))]
    return normalized, [_tool(i, tool) for i, tool in enumerate(objects(tools or [], "the list of tools"))]


def _message(index: int, message: Fields, flag: bool | None, options: ChatOptions) -> Message:
    try:
        return _normalize_message(_without_nulls(message), flag, options)
    except InvalidChat as error:
        raise InvalidChat(f"message {index}: {error}") from error


def _tool(index: int, tool: Fields) -> Message:
    try:
        return _normalize_tool(tool)
    except InvalidChat as error:
        raise InvalidChat(f"tool {index}: {error}") from error


def _normalize_message(message: Fields, flag: bool | None, options: ChatOptions) -> Message:
    role = _role(_either(message, "role", "from"), options)
    content, thoughts = _content(_either(message, "content", "value"), role, options)
    calls = [_tool_call(call) for call in _calls(message)]
    if role == CALL:
        calls += [_tool_call(call) for call in as_list(parsed_json(content, "the content of a tool call"))]
        role, content = "assistant", ""
    reasoning = "\n".join([*_reasoning(message), *thoughts])
    content = _without_reasoning(role, content, reasoning)
    train = _train(message, role, flag)
    return {
        "role": role,
        "content": content,
        **({"reasoning_content": reasoning} if reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
        **({} if train else {"train": False}),
        **{key: value for key, value in message.items() if key not in _REPLACED},
    }


def _role(name: object, options: ChatOptions) -> str:
    role = options.roles.get(name, ROLES.get(name)) if isinstance(name, str) else None
    if role is None:
        received = "no role" if name is None else f"the role {excerpt(name)}"
        known = ", ".join({**ROLES, **options.roles})
        raise InvalidChat(f"{received}; the roles are {known}; message_roles of the source adds others")
    return role


def _content(content: object, role: str, options: ChatOptions) -> tuple[str, list[str]]:
    """Return the text of a content, and the reasoning among its parts."""
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    is_parts = isinstance(content, list) and all(isinstance(part, str) or _is_part(part) for part in content)
    if role == "tool" and not is_parts:  # the result of a tool as a JSON value
        return json.dumps(content, ensure_ascii=False), []
    if not is_parts:
        raise InvalidChat(f"content is {type_name(content)}, expected a string or a list of parts with a type")
    assert isinstance(content, list)
    parts = [_part(part, options) for part in content]
    return "".join(text for text, _ in parts), [reasoning for _, reasoning in parts if reasoning.strip()]


def _is_part(part: object) -> bool:
    return isinstance(part, dict) and isinstance(part.get("type"), str)


def _part(part: str | Fields, options: ChatOptions) -> tuple[str, str]:
    """Return text and reasoning of one part; one of the two is empty."""
    if isinstance(part, str):
        return part, ""
    kind = part["type"]
    text = part.get(kind) if kind in REASONING_PARTS and part.get(kind) is not None else part.get("text")
    if kind in (*TEXT_PARTS, *REASONING_PARTS):
        if not isinstance(text, str):
            raise InvalidChat(f"the text of a part of type {kind!r} is {type_name(text)}, expected a string")
        return ("", text) if kind in REASONING_PARTS else (text, "")
    if options.drops_other_parts:
        return "", ""
    raise InvalidChat(
        f'a part of type {excerpt(kind)}; text is used only: remove the chat, or set other_parts = "drop" in its '
        "source to use the text alone"
    )


def _reasoning(message: Fields) -> list[str]:
    """Return the reasoning of a message, unless it is blank. Several keys with the same text count once."""
    given = {key: message[key] for key in REASONING_KEYS if key in message}
    for key, text in given.items():
        if not isinstance(text, str):
            raise InvalidChat(f"{key} is {type_name(text)}, expected a string")
    texts = {key: text for key, text in given.items() if text.strip()}
    if len(distinct := dict.fromkeys(texts.values())) > 1:
        raise InvalidChat(f"{' and '.join(texts)} differ; remove one")
    return list(distinct)


def _without_reasoning(role: str, content: str, reasoning: str) -> str:
    """Remove reasoning from the beginning of a content if the message has it under its own key too, or if it is blank.

    A template that receives the same reasoning in two places would render it twice. Raises InvalidChat if the two
    differ.
    """
    while reasoning and (inline := inline_reasoning(role, content)):
        if inline.reasoning.strip() not in ("", reasoning.strip()):
            raise InvalidChat("reasoning_content and the text between <think> and </think> differ; remove one of them")
        content = inline.content.lstrip()
    return content


def _calls(message: Fields) -> list[Any]:
    calls = as_list(parsed_json(message.get("tool_calls"), "tool_calls"))
    return [*calls, *as_list(parsed_json(message.get("function_call"), "function_call"))]


def _tool_call(call: object) -> Message:
    """Return a tool call with its arguments as an object. The function may be nested or not."""
    fields = _without_nulls(as_object(parsed_json(call, "a tool call"), "a tool call"))
    function = _without_nulls(as_object(parsed_json(fields.get("function", fields), "a tool call"), "a tool call"))
    if not isinstance(function.get("name"), str):
        raise InvalidChat("a tool call without the name of a function")
    arguments = parsed_json(_either(function, "arguments", "parameters") or {}, "the arguments of a tool call")
    identity = {"id": fields["id"]} if fields.get("id") else {}
    named = {"name": function["name"], "arguments": as_object(arguments, "the arguments of a tool call")}
    return {"type": "function", **identity, "function": named}


def _normalize_tool(tool: Fields) -> Message:
    """Return a tool as {"type", "function"}. `parameters` may be JSON text."""
    fields = _without_nulls(tool)
    if "function" not in fields:
        fields = {"type": "function", "function": {key: value for key, value in fields.items() if key != "type"}}
    function = _without_nulls(as_object(parsed_json(fields["function"], "its function"), "its function"))
    if not isinstance(function.get("name"), str):
        raise InvalidChat("its function has no name")
    if "parameters" in function:
        function["parameters"] = parsed_json(function["parameters"], "its parameters")
    return {"type": "function", **fields, "function": function}


def _train(message: Fields, role: str, flag: bool | None) -> bool:
    """Return whether a message may be supervised. `flag` is its entry in the loss_mask column, if there is one."""
    given = {key: _flag(message[key], key) for key in TRAIN_KEYS if key in message}
    if flag is not None:
        given["the loss_mask column"] = flag
    if len(set(given.values())) > 1:
        raise InvalidChat(f"{' and '.join(given)} contradict each other")
    # A weight of 1 is the default of the weight; every other key with 1 asks for supervision.
    asks = [key for key, value in given.items() if value and key != "weight"]
    if asks and role != "assistant":
        raise InvalidChat(
            f"{asks[0]} is 1 in a message of role {role!r}, expected it in assistant messages only (for messages of "
            "tools, set data.supervision.tool_results = true instead)"
        )
    return all(given.values()) or role not in SUPERVISED_ROLES


def _flags(loss_mask: object, count: int) -> Sequence[bool | None]:
    if loss_mask is None:
        return [None] * count
    values = parsed_json(loss_mask, "loss_mask")
    if not isinstance(values, list) or len(values) != count:
        size = f"{len(values)} entries" if isinstance(values, list) else type_name(values)
        raise InvalidChat(f"loss_mask has {size}, expected one for each of the {count} messages")
    return [None if value is None else _flag(value, "loss_mask") for value in values]


def _flag(value: object, key: str) -> bool:
    if value in (0, 1):  # also 0.0, 1.0, False and True
        return bool(value)
    raise InvalidChat(f"{key} is {excerpt(value)}, expected 0 or 1")


def _either(message: Fields, key: str, other: str) -> object:
    """Return the value of one of two keys. Raises InvalidChat if both are present and differ."""
    if key in message and other in message and message[key] != message[other]:
        raise InvalidChat(f"{key} and {other} differ; remove one of them")
    return message.get(key, message.get(other))


def _without_nulls(fields: Fields) -> Message:
    return {key: value for key, value in fields.items() if value is not None}
