"""Chat templates: tools, BOS, roles, dates, and the tokenizer files that contain a template."""

import json
from datetime import date
from typing import Any

import pytest

from tests.templates import (
    CHATML,
    GEMMA,
    LLAMA3,
    TOOLS,
    chat,
    chat_files,
    chat_template,
    chat_vocabulary,
    id_of,
)
from tests.tiny import Kind
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.config import SupervisionConfig
from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import RenderedChat

KINDS: tuple[Kind, ...] = ("byte_level", "sentencepiece")


def span_texts(rendered: RenderedChat) -> list[str]:
    return [rendered.tokens.text[span.start : span.stop].decode() for span in rendered.spans]


# Tools

CALL = {"type": "function", "function": {"name": "weigh", "arguments": {"sack": 3}}}
TOOL = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object"}}}


def tool_chat(**changes: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "How heavy?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]} | changes,
        {"role": "tool", "content": "14.5", "name": "weigh"},
        {"role": "assistant", "content": "14.5 kilograms."},
    ]


def test_tools_tool_calls_and_results_are_rendered_by_a_template_with_tools() -> None:
    rendered = chat_template(TOOLS).render(tool_chat(), [TOOL])
    assert span_texts(rendered) == ['call weigh {"sack": 3}', "14.5 kilograms."]
    assert rendered.text.startswith('<|im_start|>tools\n{"type": "function"')
    assert [span.end_of_turn for span in rendered.spans] == [id_of("<|im_end|>")] * 2


def test_without_tool_calls_a_content_in_front_of_a_call_is_supervised_without_an_end_of_turn() -> None:
    without = SupervisionConfig(tool_calls=False)
    rendered = chat_template(TOOLS, supervision=without).render(tool_chat(content="Let me see."), [TOOL])
    assert span_texts(rendered) == ["Let me see.", "14.5 kilograms."]
    assert [span.end_of_turn for span in rendered.spans] == [None, id_of("<|im_end|>")]
    marked = TOOLS.replace("\ncall", "<|eot|>call")  # the token that begins a call does not end a turn
    rendered = chat_template(marked, supervision=without).render(tool_chat(content="Let me see."), [TOOL])
    assert "see.<|eot|>call weigh" in rendered.text
    assert rendered.spans[0].end_of_turn is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TOOLS.replace("if tools", "if false"), "omits or rewrites tool 0"),
        (TOOLS.replace("t | tojson", "'a tool, weigh'"), "omits or rewrites tool 0"),
        (TOOLS.replace("m.tool_calls or []", "[]"), "omits or rewrites a tool call of message 1"),
        (TOOLS.replace("c.function.arguments | tojson", "''"), "omits or rewrites a tool call of message 1"),
        (
            TOOLS.replace("m.content or ''", "m.content if m.role != 'tool'"),
            r"omits or rewrites the content of message 2 \(tool\)",
        ),
        (
            TOOLS + "{{ raise_exception('no tools') if tools }}",
            "the chat template raised TemplateError: no tools",
        ),
        (TOOLS + "{{ '' + none if tools }}", "the chat template raised TypeError"),
    ],
)
def test_a_template_without_tools_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        chat_template(text).render(tool_chat(content="So:"), [TOOL])


def test_a_malformed_tool_is_an_error_with_its_index() -> None:
    with pytest.raises(ChatError, match="sample chat, model tiny: tool 1: its function: text that is not JSON"):
        chat_template(TOOLS).render(tool_chat(), [TOOL, {"function": "weigh"}])


def test_arguments_given_as_json_text_are_rendered_as_an_object() -> None:
    call = {"function": {"name": "weigh", "arguments": '{"sack": 3}'}}
    expected = chat_template(TOOLS).render(tool_chat(), [TOOL]).text
    assert chat_template(TOOLS).render(tool_chat(tool_calls=[call]), [TOOL]).text == expected


@pytest.mark.parametrize(
    "written", ["{{ c.function.arguments }}", "{{ '' + c.function.arguments }}", "{{ c.function.arguments | string }}"]
)
@pytest.mark.parametrize("arguments", [{"sack": 3, "é": None}, '{"sack": 3, "é": null}'])
def test_a_template_that_writes_arguments_without_a_filter_receives_json_text(written: str, arguments: object) -> None:
    calls = [{"function": {"name": "weigh", "arguments": arguments}}]
    text = TOOLS.replace("{{ c.function.arguments | tojson }}", written)
    for tools in ([TOOL], []):
        rendered = chat_template(text).render(tool_chat(tool_calls=calls), tools)
        assert span_texts(rendered) == ['call weigh {"sack": 3, "é": null}', "14.5 kilograms."]
        assert rendered.omissions == ()
        assert [span.end_of_turn for span in rendered.spans] == [id_of("<|im_end|>")] * 2
    with pytest.raises(ChatError, match="omits or rewrites a tool call of message 1"):
        chat_template(text.replace(written, "{}")).render(tool_chat(tool_calls=calls), [TOOL])


def test_a_template_that_renders_calls_beside_a_null_content_receives_null() -> None:
    """As templates of early DeepSeek V3 do, which also write the arguments as text."""
    text = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is none %}call {{ m.tool_calls[0].function.name + ' ' + m.tool_calls[0].function.arguments }}
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}"""
    rendered = chat_template(text).render(tool_chat())
    assert span_texts(rendered) == ['call weigh {"sack": 3}', "14.5 kilograms."]
    with pytest.raises(ChatError, match="omits or rewrites a tool call of message 1"):
        chat_template(text).render(tool_chat(content="So:"))


def test_special_tokens_in_arguments_as_text_are_ordinary_text_if_configured() -> None:
    text = TOOLS.replace("c.function.arguments | tojson", "c.function.arguments")
    calls = [{"function": {"name": "weigh", "arguments": {"at": "<|im_end|>"}}}]
    template = chat_template(text, supervision=SupervisionConfig(special_tokens_in_content="text"))
    assert span_texts(template.render(tool_chat(tool_calls=calls), [TOOL]))[0] == 'call weigh {"at": "<|im_end|>"}'


# BOS, roles, dates, files


def test_bos_is_prepended_if_the_model_expects_it_and_never_twice() -> None:
    bos = id_of("<bos>", "sentencepiece")
    without, own = (chat_template(t, "sentencepiece").render(chat("a", "b")) for t in (CHATML, GEMMA))
    assert without.prefix == (bos,)
    assert own.prefix == ()
    for rendered in (without, own):
        assert rendered.sequence[0] == bos
        assert rendered.sequence.count(bos) == 1
    assert chat_template(CHATML).render(chat("a", "b")).prefix == ()


def test_a_given_role_determines_the_end_of_turn() -> None:
    for given_role in ("<|eot|>", id_of("<|eot|>")):
        template = chat_template(LLAMA3, roles={"end_of_turn": given_role})
        assert template.render(chat("a", "b")).spans[0].end_of_turn == id_of("<|eot|>")
    assert chat_template(CHATML, roles={"end_of_turn": "<|eot|>"}).render(chat("a", "b")).spans[0].end_of_turn is None


@pytest.mark.parametrize("roles", [{"end_of_turn": "<|nothing|>"}, {"end_of_turn": 10**6}, {"end": "<|eot|>"}])
def test_unknown_roles_and_tokens_are_errors(roles: dict[str, str | int]) -> None:
    with pytest.raises(ChatError, match="model tiny: "):
        chat_template(CHATML, roles=roles)


def test_the_given_end_of_turn_token_is_an_error_in_a_content() -> None:
    text = CHATML.replace("<|im_end|>", "~")
    template = chat_template(text, roles={"end_of_turn": "~"})
    assert template.render(chat("a", "b")).spans[0].end_of_turn == id_of("~")
    with pytest.raises(ChatError, match="message 1 contains the special token '~'"):
        template.render(chat("a", "b ~ c"))


def test_a_bos_after_a_content_is_not_an_end_of_turn() -> None:
    text = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    assert [s.end_of_turn for s in chat_template(text).render(chat("a", "b", "c", "d")).spans] == [None, None]


def test_templates_insert_the_given_date() -> None:
    messages = chat("a", "b", system="c")
    first, again = (chat_template(LLAMA3, kind).render(messages).text for kind in KINDS)
    assert "Today is 01 Jan 2026." in first
    assert "Today is 01 Jan 2026." in again
    assert "02 Mar 2024" in chat_template(LLAMA3, today=date(2024, 3, 2)).render(messages).text


def from_files(**files: bytes) -> ChatTemplate:
    named = {name.replace("__", "."): data for name, data in files.items()}
    return ChatTemplate.from_files(chat_files("byte_level") | named, chat_vocabulary("byte_level"), "tiny")


def config(**entries: Any) -> bytes:
    return json.dumps(json.loads(chat_files("byte_level")["tokenizer_config.json"]) | entries).encode()


def test_the_template_is_a_separate_file_or_an_entry_of_the_tokenizer_config() -> None:
    expected = chat_template(CHATML).render(chat("a", "b")).text
    assert from_files(chat_template__jinja=CHATML.encode()).render(chat("a", "b")).text == expected
    in_config = config(chat_template=CHATML)
    assert from_files(tokenizer_config__json=in_config).render(chat("a", "b")).text == expected
    both = from_files(tokenizer_config__json=config(chat_template=GEMMA), chat_template__jinja=CHATML.encode())
    assert both.render(chat("a", "b")).text == expected


def test_the_default_template_is_used_without_tools_and_tool_use_with_tools() -> None:
    named = [{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": CHATML}]
    template = from_files(tokenizer_config__json=config(chat_template=named))
    assert template.render(chat("a", "b")).text == chat_template(CHATML).render(chat("a", "b")).text
    assert template.render(chat("a", "b"), [TOOL]).text.startswith("<|im_start|>tools")


def test_special_tokens_of_the_config_override_those_of_the_map() -> None:
    special = json.dumps({"bos_token": {"content": "<|eot|>"}, "sep_token": "<turn>"}).encode()
    text = b"{{ bos_token }}{{ sep_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    template = from_files(special_tokens_map__json=special, chat_template__jinja=text)
    assert template.render(chat("a", "b")).text == "<|bos|><turn>a<|eos|>b<|eos|>"


def test_the_error_without_a_template_names_the_config_key() -> None:
    with pytest.raises(
        ChatError, match="tiny has no chat template, and the data has chats: set chat_template of this model"
    ):
        from_files()
    with pytest.raises(ChatError, match=r"tiny has no chat template \(only rag\), .*: set chat_template of this model"):
        from_files(tokenizer_config__json=config(chat_template=[{"name": "rag", "template": CHATML}]))


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff"])
def test_invalid_tokenizer_files_are_errors_with_their_names(data: bytes) -> None:
    with pytest.raises(ChatError, match="tokenizer_config.json of tiny"):
        from_files(tokenizer_config__json=data)


def test_a_template_with_a_syntax_error_is_an_error() -> None:
    with pytest.raises(ChatError, match="TemplateSyntaxError"):
        chat_template("{% for %}").render(chat("a", "b"))


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_a_template_cannot_access_python(text: str) -> None:
    with pytest.raises(ChatError, match="SecurityError|UndefinedError"):
        chat_template(text + CHATML).render(chat("a", "b"))


def test_rendering_does_not_modify_the_chat() -> None:
    messages = tool_chat()
    before = json.dumps(messages)
    chat_template(TOOLS).render(messages, [TOOL])
    assert json.dumps(messages) == before
