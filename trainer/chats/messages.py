"""The form of a chat in Tutelage: the messages and tools of one record, whichever convention the data follow.

A message has the keys

role               system, user, assistant or tool
content            string; "" without content
reasoning_content  optional string
tool_calls         optional list of {"type": "function", "id"?, "function": {"name", "arguments": object}}
train              optional false: an assistant message that is not supervised

and keeps its other keys (tool_call_id, name, …). A tool is {"type": "function", "function": {...}}.

Rule of nulls: in a message, a tool call and a tool, a key with null counts as absent, since tables give every object of
a column the same keys. Inside of arguments and parameters, which are free JSON, null is a value and stays.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.plain_text import excerpt

Message = dict[str, Any]
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

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MAX_DEPTH = 64  # of lists and objects in each other: every function that changes the texts of a chat is recursive
_CONTAINERS = (dict, list)
TRAIN_KEYS = ("train", "training", "loss", "loss_mask", "weight")
_REPLACED = {"role", "from", "content", "value", "tool_calls", "function_call", *REASONING_KEYS, *TRAIN_KEYS}


class InvalidChat(Exception):
    """A chat that is not of a known form. The message names the message and the reason."""


@dataclass(frozen=True)
class ChatOptions:
    """How to read the chats of one source.

    roles             further roles by their names in the data
    drops_other_parts leave out parts of a message that are not text, instead of raising an error
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    drops_other_parts: bool = False


def normalize_chat(
    messages: object, tools: object = None, loss_mask: object = None, options: ChatOptions = ChatOptions()
) -> tuple[list[Message], list[Message]]:
    """Return the messages and tools of one record in the form above. Lists may be given as JSON text.

    loss_mask  0 or 1 (false or true) for every message: whether it is supervised
    Raises InvalidChat.
    """
    _check_depth([messages, tools], "the chat")
    given = _objects(messages, "the list of messages")
    flags = _flags(loss_mask, len(given))
    normalized = [_message(i, *pair, options) for i, pair in enumerate(zip(given, flags, strict=True))]
    return normalized, [_tool(tool) for tool in _objects(tools or [], "the list of tools")]


def _message(index: int, message: Fields, flag: bool | None, options: ChatOptions) -> Message:
    try:
        return _normalized(_without_nulls(message), flag, options)
    except InvalidChat as error:
        raise InvalidChat(f"message {index}: {error}") from error


def _normalized(message: Fields, flag: bool | None, options: ChatOptions) -> Message:
    role = _role(_either(message, "role", "from"), options)
    content, thoughts = _content(_either(message, "content", "value"), role, options)
    calls = [_tool_call(call) for call in _calls(message)]
    if role == CALL:
        calls += [_tool_call(call) for call in _listed(_json(content, "the content of a tool call"))]
        role, content = "assistant", ""
    reasoning = "\n".join([*_reasoning(message), *thoughts])
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
    known = {**ROLES, **options.roles}
    if not isinstance(name, str) or name not in known:
        received = "no role" if name is None else f"the role {excerpt(name)}"
        raise InvalidChat(f"{received}; the roles are {', '.join(known)}; message_roles of the source adds others")
    return known[name]


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
        raise InvalidChat(f"content is {_type_name(content)}, expected a string or a list of parts with a type")
    assert isinstance(content, list)
    parts = [_part(part, options) for part in content]
    return "".join(text for text, _ in parts), [reasoning for _, reasoning in parts if reasoning]


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
            raise InvalidChat(f"the text of a part of type {kind!r} is {_type_name(text)}, expected a string")
        return ("", text) if kind in REASONING_PARTS else (text, "")
    if options.drops_other_parts:
        return "", ""
    raise InvalidChat(
        f'a part of type {excerpt(kind)}; text is used only: remove the chat, or set other_parts = "drop" in its '
        "source to use the text alone"
    )


def _reasoning(message: Fields) -> list[str]:
    """Return the reasoning of a message. Several keys with the same text count once."""
    texts = dict.fromkeys(message[key] for key in REASONING_KEYS if isinstance(message.get(key), str) and message[key])
    for key in REASONING_KEYS:
        if not isinstance(message.get(key), str | None):
            raise InvalidChat(f"{key} is {_type_name(message[key])}, expected a string")
    if len(texts) > 1:
        raise InvalidChat(f"{' and '.join(key for key in REASONING_KEYS if message.get(key))} differ; remove one")
    return list(texts)


def _calls(message: Fields) -> list[Any]:
    calls = _listed(_json(message.get("tool_calls"), "tool_calls"))
    return [*calls, *_listed(_json(message.get("function_call"), "function_call"))]


def _tool_call(call: object) -> Message:
    """Return a tool call with its arguments as an object. The function may be nested or not."""
    fields = _without_nulls(_object(_json(call, "a tool call"), "a tool call"))
    function = _without_nulls(_object(_json(fields.get("function", fields), "a tool call"), "a tool call"))
    if not isinstance(function.get("name"), str):
        raise InvalidChat("a tool call without the name of a function")
    arguments = _json(_either(function, "arguments", "parameters") or {}, "the arguments of a tool call")
    identity = {"id": fields["id"]} if fields.get("id") else {}
    named = {"name": function["name"], "arguments": _object(arguments, "the arguments of a tool call")}
    return {"type": "function", **identity, "function": named}


def _tool(tool: Fields) -> Message:
    """Return a tool as {"type", "function"}. `parameters` may be JSON text."""
    fields = _without_nulls(tool)
    if "function" not in fields:
        fields = {"type": "function", "function": {key: value for key, value in fields.items() if key != "type"}}
    function = _without_nulls(_object(_json(fields["function"], "a tool"), "a tool"))
    if not isinstance(function.get("name"), str):
        raise InvalidChat("a tool without the name of a function")
    if "parameters" in function:
        function["parameters"] = _json(function["parameters"], "the parameters of a tool")
    return {"type": "function", **fields, "function": function}


def _train(message: Fields, role: str, flag: bool | None) -> bool:
    """Return whether a message may be supervised, from its keys and the entry of the loss_mask column."""
    given = {key: _flag(message[key], key) for key in TRAIN_KEYS if key in message}
    if flag is not None:
        given["the loss_mask column"] = flag
    if len(set(given.values())) > 1:
        raise InvalidChat(f"{' and '.join(given)} contradict each other")
    # A weight of 1 is the default of the weight; every other key with 1 asks for supervision.
    asks = [key for key, value in given.items() if value and key != "weight"]
    if asks and role != "assistant":
        raise InvalidChat(f"{asks[0]} is 1 in a message of role {role!r}; only assistant messages can be supervised")
    return all(given.values()) or role != "assistant"


def _flags(loss_mask: object, count: int) -> Sequence[bool | None]:
    if loss_mask is None:
        return [None] * count
    values = _json(loss_mask, "loss_mask")
    if not isinstance(values, list) or len(values) != count:
        size = f"{len(values)} entries" if isinstance(values, list) else _type_name(values)
        raise InvalidChat(f"loss_mask has {size}, expected one for each of the {count} messages")
    return [None if value is None else _flag(value, "loss_mask") for value in values]


def _flag(value: object, key: str) -> bool:
    if value in (0, 1):  # also 0.0, 1.0, False and True
        return bool(value)
    raise InvalidChat(f"{key} is {excerpt(value)}, expected 0 or 1")


def _objects(value: object, what: str) -> list[Fields]:
    items = _json(value, what)
    if not isinstance(items, list):
        raise InvalidChat(f"{what} is {_type_name(items)}, expected a list of objects")
    return [_object(_json(item, f"an entry of {what}"), f"an entry of {what}") for item in items]


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidChat(f"{what} is {_type_name(value)}, expected an object")
    return value


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _json(value: object, what: str) -> Any:
    """Return a value, parsed if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidChat(f"{what} is text that is not JSON: {value[:40]!r}") from error
    _check_depth(parsed, what)
    return parsed


def _check_depth(value: object, what: str) -> None:
    if _is_deeper(value, MAX_DEPTH):
        raise InvalidChat(f"{what} is nested more than {MAX_DEPTH} deep")


def _is_deeper(value: object, num_levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    inner = [item for item in items if isinstance(item, _CONTAINERS)]
    return bool(inner) and (not num_levels or any(_is_deeper(item, num_levels - 1) for item in inner))


def _either(message: Fields, key: str, other: str) -> object:
    """Return the value of one of two keys. Raises InvalidChat if both are present and differ."""
    if key in message and other in message and message[key] != message[other]:
        raise InvalidChat(f"{key} and {other} differ; remove one of them")
    return message.get(key, message.get(other))


def _without_nulls(fields: Fields) -> Message:
    return {key: value for key, value in fields.items() if value is not None}


def _type_name(value: object) -> str:
    return "missing" if value is None else type(value).__name__
