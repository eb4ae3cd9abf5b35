"""Normalization of tool calls and of the definitions of tools, and the styles in which templates expect calls."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.chats.json_values import (
    InvalidChat,
    Message,
    as_list,
    as_object,
    json_text,
    objects,
    parsed_json,
    without_nulls,
)

_ARGUMENTS = "the arguments of a tool call"


def tool_calls(value: object, name: str) -> list[Message]:
    """Return tool calls with their arguments as objects. `value` is a list, a single call, or its JSON text."""
    return [_tool_call(call) for call in as_list(parsed_json(value, name))]


def _tool_call(call: object) -> Message:
    """Return a tool call. Its function may be nested or not."""
    fields = without_nulls(as_object(parsed_json(call, "a tool call"), "a tool call"))
    function = without_nulls(as_object(parsed_json(fields.get("function", fields), "a tool call"), "a tool call"))
    if not isinstance(function.get("name"), str):
        raise InvalidChat("a tool call without the name of a function")
    arguments = parsed_json(either(function, "arguments", "parameters"), _ARGUMENTS)
    identity = {"id": fields["id"]} if fields.get("id") else {}
    named = {"name": function["name"], "arguments": {} if arguments is None else as_object(arguments, _ARGUMENTS)}
    return {"type": "function", **identity, "function": named}


@dataclass(frozen=True)
class CallStyle:
    """How a chat template expects the messages with tool calls.

    arguments_as_text  arguments are JSON text instead of an object
    null_content       the content of a message without text is null instead of ""
    """

    arguments_as_text: bool = False
    null_content: bool = False

    def applied_to(self, message: Message) -> Message:
        """Return a message in normal form as the template expects it."""
        if "tool_calls" not in message:
            return message
        changed = dict(message)
        if self.arguments_as_text:
            changed["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
        if self.null_content and not message["content"]:
            changed["content"] = None
        return changed


CALL_STYLES = tuple(CallStyle(as_text, null) for null in (False, True) for as_text in (False, True))
"""All styles, in the order in which a template is tried with them."""


def _with_text_arguments(call: Message) -> Message:
    function = call["function"]
    return call | {"function": function | {"arguments": json_text(function["arguments"], _ARGUMENTS)}}


def tool_definitions(tools: object) -> list[Message]:
    """Return tools as {"type", "function"}. `tools` is a list, its JSON text, or null."""
    given = parsed_json(tools, "the list of tools")
    return [_tool(i, tool) for i, tool in enumerate(objects([] if given is None else given, "the list of tools"))]


def _tool(index: int, tool: Mapping[str, Any]) -> Message:
    try:
        return _normalize_tool(tool)
    except InvalidChat as error:
        raise InvalidChat(f"tool {index}: {error}") from error


def _normalize_tool(tool: Mapping[str, Any]) -> Message:
    fields = {key: value for key, value in without_nulls(tool).items() if key != "type"}
    if "function" not in fields:
        fields = {"function": fields}
    function = without_nulls(as_object(parsed_json(fields["function"], "its function"), "its function"))
    if not isinstance(function.get("name"), str):
        raise InvalidChat("its function has no name")
    parameters = parsed_json(function.pop("parameters", None), "its parameters")
    if parameters is not None:
        function["parameters"] = as_object(parameters, "its parameters")
    return {"type": "function", **fields, "function": function}


def either(message: Mapping[str, Any], key: str, other: str) -> object:
    """Return the value of one of two keys. Raises InvalidChat if both are present and differ."""
    if key in message and other in message and message[key] != message[other]:
        raise InvalidChat(f"{key} and {other} differ; remove one of them")
    return message.get(key, message.get(other))
