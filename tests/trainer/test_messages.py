"""Messages and tools of any convention have one form."""

import json
from typing import Any

import pytest

from trainer.chats.json_values import InvalidChat
from trainer.chats.messages import ROLES, ChatOptions, normalize_chat

USER = {"role": "user", "content": "How heavy?"}
CALL = {"type": "function", "function": {"name": "weigh", "arguments": {"sack": 3, "unit": None}}}


def message(value: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return the form of one message."""
    ((one,), _) = normalize_chat([value], options=ChatOptions(**options))
    return one


@pytest.mark.parametrize("name", ROLES)
def test_every_known_role_becomes_one_of_four(name: str) -> None:
    if name == "function_call":
        assert message({"from": name, "value": json.dumps(CALL["function"])})["role"] == "assistant"
    else:
        assert message({"role": name, "content": "x"})["role"] in {"system", "user", "assistant", "tool"}
        assert message({"from": name, "value": "x"}) == message({"role": name, "content": "x"})


def test_an_unknown_role_is_rejected_with_the_known_ones_unless_the_source_names_it() -> None:
    with pytest.raises(InvalidChat, match=r"message 0: the role 'narrator'; the roles are system, .*; message_roles"):
        message({"role": "narrator", "content": "x"})
    with pytest.raises(InvalidChat, match="message 0: no role; the roles are"):
        message({"content": "x"})
    assert message({"role": "narrator", "content": "x"}, roles={"narrator": "assistant"})["role"] == "assistant"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ""),
        ("x", "x"),
        ([], ""),
        ([{"type": "text", "text": "a"}, "b", {"type": "output_text", "text": "c", "extra": None}], "abc"),
    ],
)
def test_a_content_is_a_string(content: object, expected: str) -> None:
    assert message({"role": "assistant", "content": content}) == {"role": "assistant", "content": expected}


def test_parts_that_are_not_text_are_rejected_by_name_or_dropped() -> None:
    parts = {"role": "user", "content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "What?"}]}
    with pytest.raises(InvalidChat, match=r"message 0: a part of type 'image_url'; .*other_parts = \"drop\""):
        message(parts)
    assert message(parts, drops_other_parts=True)["content"] == "What?"


@pytest.mark.parametrize("content", [3, {"a": 1}, [3], [{"text": "x"}]])
def test_another_content_is_rejected_except_as_the_result_of_a_tool(content: object) -> None:
    with pytest.raises(InvalidChat, match="message 0: content is .*, expected a string or a list of parts"):
        message({"role": "user", "content": content})
    assert json.loads(message({"role": "tool", "content": content})["content"]) == content


@pytest.mark.parametrize(
    "value",
    [
        {"content": "x", "reasoning_content": "why"},
        {"content": "x", "reasoning": "why"},
        {"content": "x", "thinking": "why", "reasoning": "why", "reasoning_content": None},
        {"content": [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "x"}]},
        {"content": [{"type": "reasoning", "text": "why"}, "x"]},
        {"content": "x", "thinking": "why", "reasoning": " \n"},
        {"content": "<think>\nwhy\n</think>\n\nx", "reasoning_content": "why"},
        {"content": " <think> </think><think>why</think>x", "reasoning": "why"},
    ],
)
def test_reasoning_has_one_key(value: dict[str, Any]) -> None:
    assert message({"role": "assistant"} | value) == {"role": "assistant", "content": "x", "reasoning_content": "why"}


@pytest.mark.parametrize("reasoning", [None, "", " \n"])
def test_reasoning_in_the_content_stays_there_and_blank_reasoning_is_removed(reasoning: str | None) -> None:
    answer = {"role": "assistant", "content": "<think>why</think>x"}
    assert message(answer | {"reasoning_content": reasoning}) == answer
    user = {"role": "user", "content": "<think>why</think>x", "reasoning_content": "other"}
    assert message(user) == user


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"reasoning": "a", "thinking": "b"}, "reasoning and thinking differ"),
        (
            {"content": "<think>a</think>x", "reasoning": "b"},
            "reasoning_content and the text between",
        ),
        ({"from": "human"}, "role and from differ"),
        ({"train": True, "weight": 0}, "train and weight contradict each other"),
    ],
)
def test_contradictions_are_rejected(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidChat, match=f"message 0: {reason}"):
        message({"role": "assistant", "content": "x"} | value)


@pytest.mark.parametrize(
    "value",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [CALL["function"]]},
        {"tool_calls": [{"function": {"name": "weigh", "arguments": '{"sack": 3, "unit": null}'}, "id": None}]},
        {"function_call": {"name": "weigh", "arguments": '{"sack": 3, "unit": null}'}},
        {"role": "function_call", "content": json.dumps(CALL["function"])},
    ],
)
def test_tool_calls_have_one_form_and_keep_explicit_nulls(value: dict[str, Any]) -> None:
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert message({"role": "assistant", "content": None} | value) == expected


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([{"function": {"name": "f", "arguments": "{no"}}], "the arguments of a tool call is text that is not JSON"),
        ([{"function": {"name": "f", "arguments": "[1]"}}], "the arguments of a tool call is list, expected an object"),
        ([{"function": {"arguments": {}}}], "a tool call without the name of a function"),
        ([3], "a tool call is int, expected an object"),
    ],
)
def test_tool_calls_of_another_form_are_rejected(calls: object, reason: str) -> None:
    with pytest.raises(InvalidChat, match=f"message 0: {reason}"):
        message({"role": "assistant", "tool_calls": calls})


def test_a_chat_that_is_nested_deeply_is_rejected_also_within_json_text() -> None:
    value: object = 1
    for _ in range(900):  # below the limit of json.loads, above that of functions that walk through the value
        value = [value]
    with pytest.raises(InvalidChat, match="the chat is nested more than 64 deep"):
        message({"role": "user", "content": "x", "extra": value})
    with pytest.raises(InvalidChat, match="the chat is nested more than 64 deep"):
        normalize_chat([USER], [{"name": "f", "parameters": {"a": value}}])
    call = {"name": "f", "arguments": json.dumps({"a": value})}
    with pytest.raises(InvalidChat, match="message 0: the arguments of a tool call is nested more than 64 deep"):
        message({"role": "assistant", "tool_calls": [call]})


def test_calls_without_arguments_and_with_an_id() -> None:
    (call,) = message({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]})["tool_calls"]
    assert call == {"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize("form", ["list", "text", "flat", "texts", "parameters"])
def test_tools_have_one_form(form: str) -> None:
    parameters = {"type": "object", "properties": {"unit": {"default": None}}}
    function = {"name": "weigh", "parameters": parameters}
    tool = {"type": "function", "function": function}
    given: Any = {
        "list": [tool],
        "text": json.dumps([tool]),
        "flat": [function | {"description": None}],
        "texts": [json.dumps(tool)],
        "parameters": [{"type": "function", "function": function | {"parameters": json.dumps(parameters)}}],
    }[form]
    assert normalize_chat([USER], given)[1] == [tool]
    assert normalize_chat([USER], None)[1] == normalize_chat([USER], "[]")[1] == []


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        (3, "entry 1 of the list of tools is int, expected an object"),
        ({"function": "weigh"}, "tool 1: its function is text that is not JSON: 'weigh'"),
        ({"type": "web_search"}, "tool 1: its function has no name"),
        ({"name": "f", "parameters": "{no"}, "tool 1: its parameters is text that is not JSON"),
    ],
)
def test_tools_of_another_form_are_rejected_with_their_number(tool: object, reason: str) -> None:
    with pytest.raises(InvalidChat, match=reason):
        normalize_chat([USER], [{"name": "f"}, tool])


def test_nulls_of_a_message_count_as_absent_and_other_keys_stay() -> None:
    value = {"role": "tool", "content": "3", "tool_call_id": "1", "name": None, "tool_calls": None, "weight": None}
    assert message(value) == {"role": "tool", "content": "3", "tool_call_id": "1"}


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_mask"])
def test_a_message_can_be_excluded_from_training(key: str) -> None:
    answer = {"role": "assistant", "content": "x"}
    for off, on in ((0, 1), (False, True), (0.0, 1.0)):
        assert message(answer | {key: off}) == answer | {"train": False}
        assert message(answer | {key: on}) == answer
    with pytest.raises(InvalidChat, match=f"message 0: {key} is 0.5, expected 0 or 1"):
        message(answer | {key: 0.5})
    assert message(USER | {key: 0}) == USER
    result = {"role": "tool", "content": "3"}
    assert message(result | {key: 0}) == result | {"train": False}


def test_a_loss_mask_has_one_entry_per_message() -> None:
    answer = {"role": "assistant", "content": "x"}
    chat = [USER, answer, USER, answer]
    for mask in ([0, 0, 0, 1], "[0, 0, 0, 1]", [None, False, None, True]):
        assert normalize_chat(chat, None, mask)[0] == [USER, answer | {"train": False}, USER, answer]
    with pytest.raises(InvalidChat, match="loss_mask has 2 entries, expected one for each of the 4 messages"):
        normalize_chat(chat, None, [0, 1])
    with pytest.raises(InvalidChat, match="message 0: the loss_mask column is 1 in a message of role 'user'"):
        normalize_chat(chat, None, [1, 1, 1, 1])


@pytest.mark.parametrize("messages", [None, 3, {"role": "user"}, "no", ["x"], [3], "{}"])
def test_what_is_not_a_list_of_messages_is_rejected(messages: object) -> None:
    with pytest.raises(InvalidChat, match=r"the list of messages is (missing|int|dict|str|text that is not JSON)"):
        normalize_chat(messages)


def test_input_is_not_modified_and_the_normal_form_is_not_changed_by_a_second_normalization() -> None:
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    answer = {"from": "gpt", "value": None, "tool_calls": calls, "reasoning": "why", "weight": 0, "name": "x"}
    messages = [{"role": "human", "content": ["a", {"type": "text", "text": "b"}]}, answer]
    tools = [{"name": "f", "parameters": json.dumps(json.dumps({"type": "object"}))}]
    before = json.dumps([messages, tools])
    normalized = normalize_chat(tuple(messages), tools)
    assert json.dumps([messages, tools]) == before
    assert normalized[1][0]["function"]["parameters"] == {"type": "object"}
    assert normalize_chat(*normalized) == normalized
