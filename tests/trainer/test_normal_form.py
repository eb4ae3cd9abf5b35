"""A normalized chat is a fixed point of the normalization, up to the limit of nesting."""

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trainer.chats.json_values import MAX_DEPTH, InvalidChat
from trainer.chats.messages import ROLES, ChatOptions, normalize_chat

TEXTS = st.sampled_from(["", " ", "x", "null", "[]", '{"a": 1}', "<think>why</think>x", "<think> </think>\n  x", "why"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "type", "text"]), inner),
    max_leaves=4,
)
PARTS = st.lists(
    TEXTS
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "output_text", "thinking", "image"]), "text": TEXTS}, optional={"n": VALUES}
    ),
    max_size=3,
)


@st.composite
def arguments_of_calls(draw: st.DrawFn) -> object:
    """Arguments that are nested up to the limit, as an object or as JSON text."""
    arguments = {"a": draw(VALUES)}
    for _ in range(draw(st.sampled_from([0, 1, *range(MAX_DEPTH - 8, MAX_DEPTH)]))):
        arguments = {"a": arguments}
    return draw(st.sampled_from([arguments, json.dumps(arguments), json.dumps(json.dumps(arguments))]))


CALLS = st.lists(
    st.fixed_dictionaries({"name": st.just("f"), "arguments": arguments_of_calls()})
    | st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": st.just("f"), "arguments": VALUES})}),
    max_size=2,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLES]), "content": TEXTS | PARTS | VALUES},
    optional={
        "reasoning": TEXTS,
        "thinking": TEXTS,
        "tool_calls": CALLS | CALLS.map(json.dumps),
        "weight": st.sampled_from([0, 1]),
        "train": st.sampled_from([None, False]),
        "name": VALUES,
    },
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.just("f")}, optional={"type": TEXTS, "parameters": arguments_of_calls() | VALUES}
    ),
    max_size=2,
)


@given(messages=st.lists(MESSAGES, min_size=1, max_size=3), tools=TOOLS | TOOLS.map(json.dumps), drops=st.booleans())
def test_a_normalized_chat_is_not_changed_by_another_normalization(
    messages: list[dict[str, Any]], tools: object, drops: bool
) -> None:
    try:
        normalized = normalize_chat(messages, tools, None, ChatOptions(drops_other_parts=drops))
    except InvalidChat:
        assume(False)
    assert normalize_chat(*normalized) == normalized


@pytest.mark.parametrize("depth", range(MAX_DEPTH - 8, MAX_DEPTH + 1))
def test_json_text_counts_with_its_depth_in_the_chat(depth: int) -> None:
    arguments: dict[str, Any] = {}
    for _ in range(depth):
        arguments = {"a": arguments}
    chats = [
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": form}}]}]
        for form in (arguments, json.dumps(arguments))
    ]
    if depth > MAX_DEPTH - 6:  # chat, messages, message, tool_calls, call and function contain the arguments
        for chat in chats:
            with pytest.raises(InvalidChat, match="nested more than 64 deep"):
                normalize_chat(chat)
    else:
        first, second = map(normalize_chat, chats)
        assert first == second == normalize_chat(*first)
