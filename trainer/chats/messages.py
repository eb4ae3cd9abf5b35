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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.chats.json_values import (
    InvalidChat,
    Message,
    check_depth,
    objects,
    parsed_json,
    without_nulls,
    wrong_type,
)
from trainer.chats.message_content import (
    CALL,
    REASONING,
    REASONING_KEYS,
    content_and_thoughts,
    reasoning_of,
    without_reasoning,
)
from trainer.chats.tool_calls import either, tool_calls, tool_definitions
from trainer.plain_text import excerpt

Fields = Mapping[str, Any]

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
    messages: object,
    tools: object = None,
    loss_mask: object = None,
    options: ChatOptions = ChatOptions(),
    num_prompt: int = 0,
) -> tuple[list[Message], list[Message]]:
    """Return the messages and tools of a chat in the normal form of this module. The input is not modified.

    messages    list of messages, or its JSON text
    tools       list of tools, or its JSON text
    loss_mask   list of 0 or 1 (false or true) for every message, whether it is supervised; or its JSON text
    num_prompt  number of leading messages that are not supervised
    Raises InvalidChat. Messages and tools are counted from 0.
    """
    check_depth([messages, tools], "the chat")
    given = objects(messages, "the list of messages")
    flags = _flags(loss_mask, len(given))
    normalized = [
        _message(i, message, flag, options, i < num_prompt)
        for i, (message, flag) in enumerate(zip(given, flags, strict=True))
    ]
    definitions = tool_definitions(tools)
    check_depth([normalized, definitions], "the chat")  # JSON text in a chat is nested less deeply than its value
    return normalized, definitions


def _message(index: int, message: Fields, flag: bool | None, options: ChatOptions, is_prompt: bool) -> Message:
    try:
        return _normalize_message(without_nulls(message), flag, options, is_prompt)
    except InvalidChat as error:
        raise InvalidChat(f"message {index}: {error}") from error


def _normalize_message(message: Fields, flag: bool | None, options: ChatOptions, is_prompt: bool) -> Message:
    role = _role(either(message, "role", "from"), options)
    content, thoughts = content_and_thoughts(either(message, "content", "value"), role, options.drops_other_parts)
    calls = [call for key in ("tool_calls", "function_call") for call in tool_calls(message.get(key), key)]
    if role == CALL:
        calls += tool_calls(content, "the content of a tool call")
        role, content = "assistant", ""
    reasoning = reasoning_of(message, thoughts)
    content = without_reasoning(role, content, reasoning)
    train = _train(message, role, flag, is_prompt)
    if role == "assistant" and train and not (content or reasoning or calls):
        raise InvalidChat(
            f"a supervised message without content, reasoning and tool calls; its keys are {', '.join(message)}: "
            'remove the message, or set "train": false'
        )
    return {
        "role": role,
        "content": content,
        **({REASONING: reasoning} if reasoning else {}),
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


def _train(message: Fields, role: str, flag: bool | None, is_prompt: bool) -> bool:
    """Return whether a message may be supervised.

    flag       entry of the message in the loss_mask column, if there is one
    is_prompt  whether the message belongs to a prompt, which is not supervised
    """
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
    if asks and is_prompt:
        raise InvalidChat(
            f"{asks[0]} is 1 in a message of the prompt, which is not supervised: remove it, or set it to 0"
        )
    return role not in SUPERVISED_ROLES or (all(given.values()) and not is_prompt)


def _flags(loss_mask: object, count: int) -> Sequence[bool | None]:
    values = parsed_json(loss_mask, "loss_mask")
    if values is None:
        return [None] * count
    if not isinstance(values, list):
        raise wrong_type(values, "loss_mask", "a list")
    if len(values) != count:
        raise InvalidChat(f"loss_mask has {len(values)} entries, expected one for each of the {count} messages")
    return [None if value is None else _flag(value, "loss_mask") for value in values]


def _flag(value: object, key: str) -> bool:
    if value in (0, 1):  # also 0.0, 1.0, False and True
        return bool(value)
    raise InvalidChat(f"{key} is {excerpt(value)}, expected 0 or 1")
