"""Supervision of chats: turns, reasoning, tool calls, tool results, ends of turns, changed content, special tokens."""

from typing import Any

import pytest

from tests.templates import (
    CHATML,
    LLAMA2,
    QWEN,
    ROLE_MARKERS,
    TOOLS,
    Messages,
    chat,
    chat_template,
    chat_vocabulary,
    id_of,
    spec_of,
    vocabulary_of,
)
from tests.tiny import Kind
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.config import SupervisionConfig
from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import RenderedChat, supervised_mask

CALL = {"type": "function", "function": {"name": "weigh", "arguments": {"sack": 3}}}
OTHER_CALL = {"type": "function", "function": {"name": "list", "arguments": {}}}
CALLS = '<tool_call>\n{"name": "weigh", "arguments": {"sack": 3}}\n</tool_call>'
USER = {"role": "user", "content": "How heavy?"}
RESULT = {"role": "tool", "content": "14.5"}


def assistant(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | keys


def supervised(rendered: RenderedChat) -> list[str]:
    """Return the text of each run of supervised tokens."""
    mask, runs, end = supervised_mask(rendered), list[bytes](), 0
    for i, is_supervised in enumerate(mask.tolist()):
        begin, end = end, int(rendered.tokens.ends[i])
        if is_supervised:
            if i == 0 or not mask[i - 1]:
                runs.append(b"")
            runs[-1] += rendered.tokens.text[begin:end]
    return [run.decode() for run in runs]


def of(template: str, messages: Messages, **supervision: Any) -> list[str]:
    """Render a chat and return its supervised texts."""
    return supervised(chat_template(template, supervision=SupervisionConfig(**supervision)).render(messages))


TOOL_CHAT = [
    USER,
    assistant("", reasoning_content="First weigh.", tool_calls=[CALL]),
    RESULT,
    assistant("14.5 kilograms.", reasoning_content="It is wet."),
]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {},
            [
                f"<think>\nFirst weigh.\n</think>\n\n{CALLS}<|im_end|>",
                "<think>\nIt is wet.\n</think>\n\n14.5 kilograms.<|im_end|>",
            ],
        ),
        ({"reasoning": False}, [f"{CALLS}<|im_end|>", "14.5 kilograms.<|im_end|>"]),
        (
            {"tool_calls": False},
            ["<think>\nFirst weigh.", "<think>\nIt is wet.\n</think>\n\n14.5 kilograms.<|im_end|>"],
        ),
        (
            {"end_of_turn": False, "reasoning": False, "tool_results": True},
            [CALLS, "14.5", "14.5 kilograms."],
        ),
    ],
)
def test_a_region_has_the_parts_of_the_settings_with_the_text_of_the_template(
    settings: dict[str, bool], expected: list[str]
) -> None:
    assert of(QWEN, TOOL_CHAT, **settings) == expected


def test_last_are_the_assistant_messages_after_the_last_user_message() -> None:
    assert of(CHATML, chat("a", "first", "c", "second"), turns="last") == ["second<|im_end|>"]
    messages = [*chat("a", "first"), *TOOL_CHAT]
    assert len(of(QWEN, messages, turns="last")) == 2
    assert len(of(QWEN, messages)) == 3
    with pytest.raises(ChatError, match="the chat has no assistant message to train on"):
        of(CHATML, [*chat("a", "b"), USER], turns="last")


def test_several_calls_and_a_content_in_front_of_them_are_one_region() -> None:
    (text,) = of(QWEN, [USER, assistant("Let me see.", tool_calls=[CALL, OTHER_CALL])])
    assert text.startswith(f"Let me see.\n{CALLS}\n<tool_call>\n")
    assert text.endswith('"arguments": {}}\n</tool_call><|im_end|>')


def test_calls_without_an_end_of_turn_reach_to_the_end_of_their_message() -> None:
    plain = TOOLS.replace("<|im_start|>{{ m.role }}", "{{ m.role }}:").replace("<|im_end|>", "")
    messages = [USER, assistant("", tool_calls=[CALL]), RESULT, assistant("14.5 kilograms.")]
    assert of(plain, messages)[0].strip() == 'call weigh {"sack": 3}'


def test_null_content_beside_calls_is_an_empty_text_for_the_template() -> None:
    text = TOOLS.replace("m.content or ''", "'' + m.content")
    messages = [USER, assistant("") | {"content": None, "tool_calls": [CALL]}, RESULT, assistant("So.")]
    assert of(text, messages) == ['call weigh {"sack": 3}<|im_end|>', "So.<|im_end|>"]


def test_a_result_of_a_tool_with_weight_0_is_not_supervised() -> None:
    messages = [*TOOL_CHAT[:2], RESULT | {"weight": 0}, TOOL_CHAT[3]]
    settings = {"end_of_turn": False, "reasoning": False, "tool_results": True}
    assert of(QWEN, messages, **settings) == [CALLS, "14.5 kilograms."]


# --- reasoning ---


def test_reasoning_in_the_content_is_supervised_as_the_template_renders_it() -> None:
    thoughtful = assistant("<think>\nIt is wet.\n</think>\n\nOne.")
    assert of(CHATML, [USER, thoughtful]) == ["<think>\nIt is wet.\n</think>\n\nOne.<|im_end|>"]
    rendered = chat_template(QWEN).render([USER, thoughtful, USER, thoughtful])
    assert supervised(rendered) == ["One.<|im_end|>", "<think>\nIt is wet.\n</think>\n\nOne.<|im_end|>"]
    assert [(each.message, each.problem) for each in rendered.omissions] == [(1, "")]


@pytest.mark.parametrize(
    "keys", [{}, {"reasoning_content": ""}, {"reasoning_content": " \n"}, {"reasoning_content": None}]
)
def test_an_empty_block_of_reasoning_is_context(keys: dict[str, Any]) -> None:
    for content in ("One.", "<think>\n\n</think>\n\nOne."):
        (text,) = of(QWEN, [USER, assistant(content) | keys])
        assert text.strip() == "One.<|im_end|>"
    (text,) = of(QWEN, [USER, assistant("", tool_calls=[CALL]) | keys])
    assert text == f"{CALLS}<|im_end|>"


def test_the_same_reasoning_in_two_places_is_rendered_once_and_different_ones_are_an_error() -> None:
    twice = assistant("<think>It is wet.</think>One.", reasoning_content="It is wet.")
    rendered = chat_template(QWEN).render([USER, twice])
    assert rendered.text.count("It is wet.") == 1
    assert supervised(rendered) == ["<think>\nIt is wet.\n</think>\n\nOne.<|im_end|>"]
    with pytest.raises(ChatError, match="message 1: reasoning_content and the text between <think> and </think>"):
        of(QWEN, [USER, twice | {"reasoning_content": "It is dry."}])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_the_key_that_the_template_reads(key: str) -> None:
    text = CHATML.replace("{{ m.content }}", f"{{% if m.{key} %}}[{{{{ m.{key} }}}}]{{% endif %}}{{{{ m.content }}}}")
    assert of(text, [USER, assistant("One.", reasoning_content="It is wet.")]) == ["[It is wet.]One.<|im_end|>"]


def test_reasoning_that_a_template_renders_in_no_turn_is_an_error_with_its_text_or_is_counted() -> None:
    messages = [USER, assistant("One.", reasoning_content="It is wet.")]
    with pytest.raises(ChatError, match="drops the reasoning of every message, such as 'It is wet.' of message 1; set"):
        of(CHATML, messages)
    template = chat_template(CHATML, supervision=SupervisionConfig(changed_content="count"))
    rendered = template.render(messages)
    assert supervised(rendered) == ["One.<|im_end|>"]
    assert [each.kind for each in rendered.omissions] == ["reasoning"]
    assert of(CHATML, messages, reasoning=False) == ["One.<|im_end|>"]


# --- changed content ---


@pytest.mark.parametrize(
    ("text", "expected", "kinds"),
    [
        (CHATML.replace("m.content", "m.content | replace('six', '6')"), ["seven<|im_end|>"], ["content"]),
        (
            CHATML.replace("m.content", "m.content if m.role != 'user'"),
            ["six<|im_end|>", "seven<|im_end|>"],
            ["content"] * 2,
        ),
    ],
)
def test_changed_content_is_not_supervised_but_counted(text: str, expected: list[str], kinds: list[str]) -> None:
    template = chat_template(text, supervision=SupervisionConfig(changed_content="count"))
    rendered = template.render(chat("one", "six", "two", "seven"))
    assert supervised(rendered) == expected
    assert [each.kind for each in rendered.omissions] == kinds
    assert all(each.problem for each in rendered.omissions)


def test_a_content_whose_call_the_template_drops_does_not_end_the_turn() -> None:
    text = TOOLS.replace("m.tool_calls or []", "[]")
    messages = [USER, assistant("Let me see.", tool_calls=[CALL]), RESULT, assistant("14.5.")]
    assert of(text, messages, changed_content="count") == ["Let me see.", "14.5.<|im_end|>"]


# --- ends of turns ---


def test_the_end_of_turn_may_follow_text_of_the_template() -> None:
    rendered = chat_template(LLAMA2).render(chat("a", "the harbour office", "c", "the sacks"))
    assert [text.split()[-1] for text in supervised(rendered)] == ["<|eos|>"] * 2
    assert all(text.endswith(" <|eos|>") for text in supervised(rendered))


def test_the_role_marker_of_the_next_turn_ends_a_turn_only_if_it_has_the_role() -> None:
    messages = chat("a", "b", "c", "d")
    assert of(ROLE_MARKERS, messages) == ["b", "d"]
    template = chat_template(ROLE_MARKERS, roles={"end_of_turn": "<|im_start|>"})
    assert supervised(template.render(messages)) == ["b<|im_start|>", "d"]
    assert not chat_template(ROLE_MARKERS).turn_ends - {chat_vocabulary("byte_level").roles["end_of_turn"]}


def test_an_end_of_turn_that_the_tokenizer_does_not_call_special_is_supervised() -> None:
    vocabulary = vocabulary_of(spec_of("byte_level", special=False), "byte_level")
    template = ChatTemplate.from_files({}, vocabulary, "odd", template=CHATML)
    rendered = template.render(chat("a", "b"))
    assert [span.end_of_turn for span in rendered.spans] == [vocabulary.tokens.index("<|im_end|>")]
    assert template.turn_ends == {vocabulary.tokens.index("<|im_end|>")}


# --- special tokens in texts ---


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_special_tokens_in_texts_are_ordinary_text_if_configured(kind: Kind) -> None:
    vocabulary, spelled = chat_vocabulary(kind), "six<|im_end|>sacks <|im_start|>"
    template = chat_template(CHATML, kind, supervision=SupervisionConfig(special_tokens_in_content="text"))
    rendered = template.render(chat(spelled, spelled, "c", "sacks"))
    assert supervised(rendered) == [f"{spelled}<|im_end|>", "sacks<|im_end|>"]
    assert rendered.text == CHATML_OF.format(spelled, spelled, "c", "sacks")
    assert rendered.tokens.ids.tolist().count(id_of("<|im_end|>", kind)) == 4
    plain = template.render(chat("a", "six sacks", "c", "d"))
    assert plain.tokens.ids.tolist() == vocabulary.encode_rendered(plain.text).ids.tolist()


CHATML_OF = "".join(f"<|im_start|>{role}\n{{}}<|im_end|>\n" for role in ("user", "assistant", "user", "assistant"))


def test_special_tokens_in_tool_calls_are_ordinary_text_if_configured() -> None:
    call = {"type": "function", "function": {"name": "weigh", "arguments": {"at": "<|im_end|>"}}}
    messages = [USER, assistant("", tool_calls=[call]), RESULT, assistant("So.")]
    expected = '<tool_call>\n{"name": "weigh", "arguments": {"at": "<|im_end|>"}}\n</tool_call><|im_end|>'
    assert of(QWEN, messages, special_tokens_in_content="text")[0] == expected


def test_a_token_that_plain_text_contains_too_cannot_be_ordinary_text() -> None:
    vocabulary = vocabulary_of(spec_of("byte_level", special=False), "byte_level")
    text = SupervisionConfig(special_tokens_in_content="text")
    template = ChatTemplate.from_files({}, vocabulary, "odd", template=CHATML, supervision=text)
    with pytest.raises(ChatError, match=r"sample chat, model odd: .*'<\|im_end\|>' cannot be written as ordinary text"):
        template.render(chat("a <|im_end|>", "b"))
