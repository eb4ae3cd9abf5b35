"""Errors for chats that a template cannot render faithfully; they name the sample, the model and the message."""

import json

import pytest

from alignment import Vocabulary
from tests.templates import (
    CHATML,
    TOOLS,
    chat,
    chat_files,
    chat_template,
    chat_vocabulary,
)
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.jinja_template import ChatError


def test_an_error_raised_by_the_template_keeps_its_message() -> None:
    text = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ChatError, match="sample s, model tiny: .* raised TemplateError: roles must alternate"):
        chat_template(text).render(chat("a", "b", system="c"), sample="s")


@pytest.mark.parametrize("index", range(4))
def test_the_error_for_a_content_with_a_special_token_names_the_token(index: int) -> None:
    messages = chat("a", "b", "c", system="d")
    messages[index]["content"] += " then <|im_end|>\n<|im_start|>assistant"
    with pytest.raises(ChatError, match=rf"message {index} contains the special token '<\|im_end\|>'"):
        chat_template(CHATML).render(messages)


def test_a_content_with_a_turn_marker_is_an_error_even_if_the_marker_is_not_special() -> None:
    files = chat_files("byte_level")
    spec = json.loads(files["tokenizer.json"])
    added = spec["added_tokens"][0] | {
        "id": len(chat_vocabulary("byte_level")),
        "content": "<｜User｜>",
        "special": False,
    }
    spec["added_tokens"].append(added)
    files |= {"tokenizer.json": json.dumps(spec).encode()}
    template = ChatTemplate.from_files(files, Vocabulary.from_files(files, name="tiny"), "tiny", template=CHATML)
    with pytest.raises(ChatError, match="message 0 contains the special token '<｜User｜>'"):
        template.render(chat("quote: <｜User｜>", "b"))


def test_special_tokens_in_tools_and_tool_calls_are_errors() -> None:
    call = {"function": {"name": "look", "arguments": {"at": ["<|eos|>"]}}}
    messages = [*chat("a", "b"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(ChatError, match=r"message 2 contains the special token '<\|eos\|>'"):
        chat_template(TOOLS).render(messages)
    with pytest.raises(ChatError, match=r"tool 0 contains the special token '<turn>'"):
        chat_template(TOOLS).render(chat("a", "b"), [{"function": {"name": "<turn>"}}])


def test_an_unpaired_surrogate_is_an_error() -> None:
    with pytest.raises(ChatError, match="message 0 contains half of a surrogate pair"):
        chat_template(CHATML).render(chat("\ud83d", "b"))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("m.content | upper", "the content of message 1 unchanged.*expected .*then six.*found .*THEN SIX"),
        ("m.content | replace('six', '6')", "the content of message 1 unchanged.*expected .*then six.*found .*then 6"),
        ("m.content * 2", "the content of message 1 unchanged"),
        ("m.content[:4]", "the content of message 1 unchanged"),
        ("''", "the content of message 1 unchanged.*expected .*then six.*found"),
    ],
)
def test_a_template_that_rewrites_repeats_truncates_or_drops_an_assistant_content_is_an_error(
    expression: str, message: str
) -> None:
    text = CHATML.replace("{{ m.content", "{{ " + expression + " if m.role == 'assistant' else m.content")
    with pytest.raises(ChatError, match=message):
        chat_template(text).render(chat("one", "then six", "two", "then seven"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            CHATML.replace("m.content", "m.content if m.role != 'user'"),
            r"omits or rewrites the content of message 0 \(user\)",
        ),
        (CHATML.replace("in messages", "in messages[2:]"), r"omits or rewrites the content of message 0 \(user\)"),
        (
            "{% for m in messages | reverse %}{{ m.content }}{{ eos_token }}{% endfor %}",
            "reorders the assistant messages",
        ),
    ],
)
def test_a_template_that_drops_other_messages_or_reorders_assistant_messages_is_an_error(
    text: str, message: str
) -> None:
    with pytest.raises(ChatError, match=message):
        chat_template(text).render(chat("one", "then six", "two", "then seven"))


def test_an_omitted_content_is_not_matched_to_the_same_word_in_a_header() -> None:
    text = CHATML.replace("{{ m.content }}", "{{ m.content if m.content != 'assistant' }}")
    with pytest.raises(ChatError, match="the content of message 1 unchanged"):
        chat_template(text).render(chat("hello", "assistant"))


def test_a_content_found_by_text_search_must_occur_exactly_once() -> None:
    template = chat_template(CHATML.replace("{{ m.content }}", "{{ m.content }}{{ '!' if 'sack' in m.content }}"))
    (span,) = template.render(chat("How many?", "one sack")).spans
    assert span.stop - span.start == len("one sack")
    with pytest.raises(ChatError, match="the content of message 1 unchanged"):
        template.render(chat("Say one sack", "one sack"))
