"""Messages and tools of any convention have one form."""

import json
from datetime import date
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
        for value in (CALL, CALL["function"], [CALL], json.dumps(CALL["function"])):
            assert message({"from": name, "value": value}) == {"role": "assistant", "content": "", "tool_calls": [CALL]}
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
    assert message({"role": "user", "content": content}) == {"role": "user", "content": expected}


def test_parts_that_are_not_text_are_rejected_by_name_or_dropped() -> None:
    parts = {"role": "user", "content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "What?"}]}
    with pytest.raises(InvalidChat, match=r"message 0: a part of type 'image_url'; .*other_parts = \"drop\""):
        message(parts)
    assert message(parts, drops_other_parts=True)["content"] == "What?"


@pytest.mark.parametrize("kind", ["tool_use", "tool_call", "tool_result"])
def test_tool_calls_and_results_among_the_parts_are_rejected_also_if_other_parts_are_dropped(kind: str) -> None:
    parts = [{"type": "text", "text": "So:"}, {"type": kind, "name": "weigh", "input": {}}]
    for drops in (False, True):
        with pytest.raises(InvalidChat, match=f"message 0: a part of type '{kind}': write tool calls under tool_calls"):
            message({"role": "assistant", "content": parts}, drops_other_parts=drops)


@pytest.mark.parametrize("content", [3, {"a": 1}, [3], [{"text": "x"}]])
def test_another_content_is_rejected(content: object) -> None:
    with pytest.raises(InvalidChat, match=r"message 0: content: received \w+, expected a string or a list of parts"):
        message({"role": "user", "content": content})


RESULTS: list[Any] = [
    3,
    False,
    {"a": 1},
    {"type": "text", "text": "A"},
    [],
    [3],
    [[]],
    ["Paris", "London"],
    ["Paris", {"type": "text", "text": "A"}],
    [{"text": "x"}],
    [{"type": "bug", "id": 7}],
    [{"type": "text", "text": "A", "n": 3}],
    [{"type": "text", "text": "A"}, {"type": "text", "text": {"a": 1}}],
    [{"type": "thinking", "thinking": "A"}],
]


@pytest.mark.parametrize("content", RESULTS)
def test_the_result_of_a_tool_may_be_any_json_value(content: object) -> None:
    assert json.loads(message({"role": "tool", "content": content})["content"]) == content


def test_the_result_of_a_tool_may_be_text_or_its_parts() -> None:
    parts = [{"type": "text", "text": "A", "annotations": None}, {"type": "output_text", "text": "é"}]
    assert message({"role": "tool", "content": parts})["content"] == "Aé"
    assert message({"role": "tool", "content": ' ["Paris"]'})["content"] == ' ["Paris"]'
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(InvalidChat, match="message 0: a part of type 'image_url'"):
        message({"role": "tool", "content": image})
    assert message({"role": "tool", "content": image}, drops_other_parts=True)["content"] == "Aé"


@pytest.mark.parametrize("content", [date(2026, 1, 1), [b"x"], {"at": date(2026, 1, 1)}])
def test_a_result_with_a_value_that_json_has_not_is_rejected(content: object) -> None:
    with pytest.raises(InvalidChat, match="message 0: content: cannot be written as JSON: Object of type"):
        message({"role": "tool", "content": content})


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ({"text": "hello"}, "role, text"),
        ({"content": ""}, "role, content"),
        ({"content": None}, "role"),
        ({"content": [], "reasoning": " ", "tool_calls": []}, "role, content, reasoning, tool_calls"),
        ({"content": "", "train": True}, "role, content, train"),
    ],
)
def test_a_supervised_message_needs_content_reasoning_or_tool_calls(value: dict[str, Any], keys: str) -> None:
    value = {"role": "assistant"} | value
    with pytest.raises(InvalidChat, match=f"message 0: a supervised message without .*; its keys are {keys}: remove"):
        message(value)
    assert message(value | {"train": 0})["content"] == ""
    assert message(value | {"role": "user", "train": None})["content"] == ""
    assert message(value | {"tool_calls": [CALL]})["content"] == ""


@pytest.mark.parametrize(
    "value",
    [
        {"content": "x", "reasoning_content": "why"},
        {"content": "x", "reasoning": "why"},
        {"content": "x", "thinking": "why", "reasoning": "why", "reasoning_content": None},
        {"content": [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "x"}]},
        {"content": [{"type": "reasoning", "text": "why"}, "x"]},
        {"content": "x", "thinking": "why", "reasoning": " \n"},
        {"content": [{"type": "thinking", "thinking": "why\n"}, "x"], "reasoning_content": "why"},
        {"content": "<think>\nwhy\n</think>\n\nx", "reasoning_content": "why"},
        {"content": " <think> </think><think>why</think>x", "reasoning": "why"},
    ],
)
def test_reasoning_has_one_key(value: dict[str, Any]) -> None:
    assert message({"role": "assistant"} | value) == {"role": "assistant", "content": "x", "reasoning_content": "why"}


def test_the_indentation_of_a_content_behind_reasoning_stays() -> None:
    value = {"role": "assistant", "content": "<think>why</think>\r\n \n    x = 1\n    y", "reasoning": "why"}
    assert message(value)["content"] == "    x = 1\n    y"


def test_several_parts_of_reasoning_are_joined() -> None:
    parts = [{"type": "thinking", "thinking": "a"}, "x", {"type": "thinking", "thinking": "b"}]
    assert message({"role": "assistant", "content": parts})["reasoning_content"] == "a\nb"


@pytest.mark.parametrize("keys", [{}, {"reasoning": ""}, {"reasoning": " \n"}])
def test_a_blank_block_of_reasoning_stays_without_reasoning_under_a_key(keys: dict[str, Any]) -> None:
    answer = {"role": "assistant", "content": "<think>\n</think>x"}
    assert message(answer | keys) == answer
    assert message(answer | {"reasoning": "why"})["content"] == "x"


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
        (
            {"content": [{"type": "thinking", "thinking": "a"}, "x"], "reasoning_content": "b"},
            "reasoning_content and the reasoning parts differ",
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
        (
            [{"function": {"name": "f", "arguments": "{no"}}],
            "the arguments of a tool call: text that is not JSON: '{no'",
        ),
        (
            [{"function": {"name": "f", "arguments": "[1]"}}],
            "the arguments of a tool call: received list, expected an o",
        ),
        (
            [{"function": {"name": "f", "arguments": 0}}],
            "the arguments of a tool call: received int, expected an object",
        ),
        ([{"function": {"name": "f", "arguments": []}}], "the arguments of a tool call: received list, expected an ob"),
        ([{"function": {"arguments": {}}}], "a tool call without the name of a function"),
        ([3], "a tool call: received int, expected an object"),
    ],
)
def test_tool_calls_of_another_form_are_rejected(calls: object, reason: str) -> None:
    with pytest.raises(InvalidChat, match=f"message 0: {reason}"):
        message({"role": "assistant", "tool_calls": calls})


def test_a_chat_that_is_nested_deeply_is_rejected_also_within_json_text() -> None:
    value: object = 1
    for _ in range(900):  # below the limit of json.loads, above that of functions that walk through the value
        value = [value]
    with pytest.raises(InvalidChat, match="the chat: nested more than 64 deep"):
        message({"role": "user", "content": "x", "extra": value})
    with pytest.raises(InvalidChat, match="the chat: nested more than 64 deep"):
        normalize_chat([USER], [{"name": "f", "parameters": {"a": value}}])
    call = {"name": "f", "arguments": json.dumps({"a": value})}
    with pytest.raises(InvalidChat, match="message 0: the arguments of a tool call: nested more than 64 deep"):
        message({"role": "assistant", "tool_calls": [call]})


def test_calls_without_arguments_and_with_an_id() -> None:
    for arguments in ({}, {"arguments": None}, {"arguments": ""}, {"arguments": "null"}, {"parameters": " "}):
        calls = [{"id": "1", "function": {"name": "f"} | arguments}]
        (call,) = message({"role": "assistant", "tool_calls": calls})["tool_calls"]
        assert call == {"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize("absent", [None, "", " \n", "null", '"null"'])
def test_blank_text_and_null_count_as_absent(absent: str | None) -> None:
    answer = {"role": "assistant", "content": "x"}
    value = answer | {"tool_calls": absent, "function_call": absent}
    assert normalize_chat([USER, value], absent, absent) == ([USER, answer], [])
    tool = {"type": "function", "function": {"name": "f"}}
    assert normalize_chat([USER], [{"name": "f", "parameters": absent}])[1] == [tool]


@pytest.mark.parametrize("form", ["list", "text", "flat", "type", "texts", "parameters"])
def test_tools_have_one_form(form: str) -> None:
    parameters = {"type": "object", "properties": {"unit": {"default": None}}}
    function = {"name": "weigh", "parameters": parameters}
    tool = {"type": "function", "function": function}
    given: Any = {
        "list": [tool],
        "text": json.dumps([tool]),
        "flat": [function | {"description": None}],
        "type": [{"type": "custom", "function": function}],
        "texts": [json.dumps(tool)],
        "parameters": [{"type": "function", "function": function | {"parameters": json.dumps(parameters)}}],
    }[form]
    assert normalize_chat([USER], given)[1] == [tool]
    assert normalize_chat([USER], None)[1] == normalize_chat([USER], "[]")[1] == []


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        (3, "entry 1 of the list of tools: received int, expected an object"),
        ({"function": "weigh"}, "tool 1: its function: text that is not JSON: 'weigh'"),
        ({"type": "web_search"}, "tool 1: its function has no name"),
        ({"name": "f", "parameters": "{no"}, "tool 1: its parameters: text that is not JSON"),
        ({"name": "f", "parameters": 3}, "tool 1: its parameters: received int, expected an object"),
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
    with pytest.raises(InvalidChat, match=r"the list of messages: (received (null|int|dict)|text that is not JSON)"):
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
