"""Chats rendered by chat templates: positions of contents, supervised spans, and errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from alignment import Vocabulary
from tests.templates import (
    CHATML,
    GEMMA,
    LLAMA3,
    MISTRAL,
    SPECIALS,
    TEMPLATES,
    THINKING,
    chat,
    chat_template,
    chat_vocabulary,
    id_of,
)
from tests.tiny import TEXT, Kind
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.content_search import Chat
from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import RenderedChat, chat_tokens, supervised_mask

KINDS: tuple[Kind, ...] = ("byte_level", "sentencepiece")
ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot|>",
    "gemma": "<end_of_turn>",
    "mistral": "<|eos|>",
    "spaced": "<|im_end|>",
}
WORDS = ["user", "assistant", "model", "system", "\n", "\n\n", " ", "", "<", "|im_end|", "é", "😀", "日本", "Mark0Here"]
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.lists(st.sampled_from([*WORDS, *TEXT.split()[:40]]), max_size=8).map("".join),
)
SPECIAL_TEXTS = [*SPECIALS, "<|bos|>", "<|eos|>", "<bos>", "<eos>", "<pad>", "<unk>"]
CONTENT = ANY_TEXT.filter(lambda text: not any(special in text for special in (*SPECIAL_TEXTS, "▁")))


def span_texts(rendered: RenderedChat) -> list[str]:
    return [rendered.tokens.text[span.start : span.stop].decode() for span in rendered.spans]


def content_texts(rendered: RenderedChat) -> list[str]:
    parts = [part for span in rendered.spans for part in span.parts if part.kind == "content"]
    return [rendered.tokens.text[part.start : part.stop].decode() for part in parts]


def around(rendered: RenderedChat) -> list[tuple[str, str]]:
    """Return the ten bytes before each content and the twelve bytes after it."""
    text = rendered.tokens.text
    parts = [part for span in rendered.spans for part in span.parts if part.kind == "content"]
    return [(text[: p.start][-10:].decode(), text[p.stop :][:12].decode()) for p in parts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=st.lists(st.tuples(CONTENT, CONTENT.filter(bool)), min_size=1, max_size=3), system=st.none() | CONTENT)
def test_spans_are_the_contents_with_or_without_outer_white_space_and_tokens_cover_them(
    name: str, kind: Kind, turns: list[tuple[str, str]], system: str | None
) -> None:
    template = chat_template(TEMPLATES[name], kind)
    given_contents = [content for turn in turns for content in turn]
    rendered = template.render(chat(*given_contents, system=system))
    trims = name in ("llama3", "gemma")
    assert content_texts(rendered) == [content.strip() if trims else content for _, content in turns]
    assert span_texts(rendered) == [text + ("\n" if name == "spaced" else "") for text in content_texts(rendered)]
    tokens = rendered.tokens
    for span in rendered.spans:
        part = chat_tokens(rendered, span)
        begins = int(tokens.ends[part.begin - 1])
        ids = part.tokens.ids[: len(part.tokens) - part.closes]
        np.testing.assert_array_equal(ids, tokens.ids[part.begin : part.begin + len(ids)])
        covered = b"".join(template.vocabulary.token_bytes[i] or b"" for i in ids)
        assert tokens.text[begins:].startswith(covered)
        assert part.straddles == (begins != span.start)
        assert part.closes == (span.end_of_turn is not None)
        if part.closes:
            assert begins + len(covered) == span.stop
            assert part.tokens.ends[-1] == len(part.tokens.text) + 1
            assert tokens.ids[part.stop - 1] == span.end_of_turn


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_turn_is_the_special_token_with_which_the_template_ends_a_turn(name: str) -> None:
    rendered = chat_template(TEMPLATES[name]).render(chat("a", "b", "c", "d"))
    assert [span.end_of_turn for span in rendered.spans] == [id_of(ENDS[name])] * 2


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("chatml", "assistant\n", "<|im_end|>"),
        ("llama3", "<|end|>\n\n", "<|eot|>"),
        ("gemma", ">model\n", "<end_of_turn"),
        ("mistral", "[/INST] ", "<|eos|>"),
        ("spaced", "assistant\n", "\n<|im_end|>"),
    ],
)
@pytest.mark.parametrize("content", ["user", "assistant", "model", "\n", "INST", "m", "end", "assistant\nassistant"])
def test_contents_that_are_words_of_the_template_are_found_at_their_own_position(
    name: str, before: str, after: str, content: str
) -> None:
    rendered = chat_template(TEMPLATES[name]).render(chat(content, content, content, content))
    assert len(rendered.spans) == 2
    for front, back in around(rendered):
        assert front.endswith(before)
        assert back.startswith(after)


def test_a_blank_content_that_the_template_trims_is_a_span_of_no_bytes_with_its_end_of_turn() -> None:
    rendered = chat_template(LLAMA3).render(chat("hello", " "))
    (span,) = rendered.spans
    part = chat_tokens(rendered, span)
    assert span.start == span.stop
    assert part.tokens.ids.tolist() == [id_of("<|eot|>")]
    assert part.tokens.ends.tolist() == [1]
    assert np.flatnonzero(supervised_mask(rendered)).tolist() == [part.begin]


def test_the_mask_contains_only_contents_and_ends_of_turn() -> None:
    rendered = chat_template(CHATML).render(chat("the tide", "had turned", "the bell", "rang"))
    mask = supervised_mask(rendered)
    ids, vocabulary = rendered.tokens.ids[mask], chat_vocabulary("byte_level")
    end = id_of("<|im_end|>")
    assert [i for i in ids.tolist() if vocabulary.token_bytes[i] is None] == [end, end]
    assert b"".join(vocabulary.token_bytes[i] or b"|" for i in ids) == b"had turned|rang|"


def test_a_token_with_text_of_template_and_content_is_not_supervised() -> None:
    rendered = chat_template(MISTRAL).render(chat("x", "the harbour"))
    part = chat_tokens(rendered, rendered.spans[0])
    vocabulary = chat_vocabulary("byte_level")
    assert vocabulary.token_bytes[part.tokens.ids[0]] == b" the"
    assert part.straddles
    assert part.tokens.ends[0] == 3
    mask = supervised_mask(rendered)
    assert not mask[part.begin]
    assert mask[part.begin + 1 : part.stop].all()


def test_a_last_token_that_ends_after_the_content_is_left_out() -> None:
    text = "{% for m in messages %}[INST]{{ m.content }}he harbour{% endfor %}"
    rendered = chat_template(text).render(chat("x", "a t"))
    part = chat_tokens(rendered, rendered.spans[0])
    assert part.tokens.text == b"a t"
    assert part.tokens.ends.tolist() == [1]  # " the" reaches into the template
    assert not part.closes


def test_a_message_with_train_false_has_no_span() -> None:
    messages = chat("a", "b", "c", "d")
    messages[1]["train"] = False
    messages[3]["train"] = True
    rendered = chat_template("{% if messages[1].train is defined %}{{ 1 / 0 }}{% endif %}" + CHATML).render(messages)
    assert [span.message for span in rendered.spans] == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "no"}, "message 1: train is 'no', expected 0 or 1"),
        ({"role": "user", "train": True}, "message 1: train is 1 in a message of role 'user'"),
        ({"content": 3}, "message 1: content: received int, expected a string"),
        (
            {"content": [{"type": "text"}]},
            "message 1: the text of a part of type 'text': received null, expected a string",
        ),
        ({"role": None}, "message 1: no role; the roles are"),
        ({"tool_calls": ["x"]}, "message 1: a tool call: text that is not JSON: 'x'"),
        ({"train": False}, "the chat has no assistant message to train on"),
    ],
)
def test_malformed_messages_are_errors_with_their_index(change: dict[str, Any], message: str) -> None:
    messages = chat("a", "b")
    messages[1] |= change
    with pytest.raises(ChatError, match=f"sample s7, model tiny: {message}"):
        chat_template(CHATML).render(messages, sample="s7")


def test_messages_of_other_conventions_are_rendered_as_their_normal_form() -> None:
    text = "The tide had turned."
    variants: list[list[dict[str, Any]]] = [
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": text}],
        [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "model", "content": ["The tide", text[8:]]},
        ],
        [{"role": "user", "content": "a", "weight": 0}, {"role": "bot", "content": text, "weight": 1, "name": None}],
    ]
    expected = chat_template(CHATML).render(chat("a", text))
    for messages in variants:
        rendered = chat_template(CHATML).render(messages)
        assert (rendered.text, rendered.spans) == (expected.text, expected.spans)


@pytest.mark.parametrize("key", ["weight", "loss", "training", "loss_mask"])
def test_a_message_that_another_convention_excludes_from_training_has_no_span(key: str) -> None:
    messages = chat("a", "b", "c", "d")
    messages[1][key] = 0
    assert [span.message for span in chat_template(CHATML).render(messages).spans] == [3]


# System messages


def test_a_rejected_system_message_is_merged_into_the_first_user_message() -> None:
    rendered = chat_template(GEMMA).render(chat("hello", "hi", system="Be brief."))
    assert rendered.folded_system
    assert rendered.text.startswith("<|bos|><turn>user\nBe brief.\n\nhello<end_of_turn>")
    assert [span.message for span in rendered.spans] == [2]


def test_a_silently_dropped_system_message_is_merged_too() -> None:
    rendered = chat_template(MISTRAL).render(chat("hello", "hi", system="Be brief."))
    assert rendered.folded_system
    assert rendered.text == "<|bos|>[INST] Be brief.\n\nhello[/INST] hi<|eos|>"


def test_a_system_message_that_the_template_moves_is_not_merged() -> None:
    moving = (
        "{% for m in messages[1:] %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{{ messages[0].content }}"
    )
    rendered = chat_template(moving).render(chat("hello", "hi", system="Be brief."))
    assert not rendered.folded_system
    assert rendered.text.endswith("Be brief.")


def test_a_system_message_without_a_following_user_message_cannot_be_merged() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "hi"}]
    with pytest.raises(ChatError, match="TemplateError: no system role"):
        chat_template(GEMMA).render(messages)
    with pytest.raises(ChatError, match="the template omits the system message"):
        chat_template(MISTRAL).render(messages)


@pytest.mark.parametrize("text", [MISTRAL, GEMMA])
def test_an_empty_system_message_changes_no_text(text: str) -> None:
    with_system, without = (chat_template(text).render(chat("hello", "hi", system=s)) for s in (" ", None))
    assert with_system.text == without.text
    assert with_system.folded_system == (text == GEMMA)
    assert [span.message for span in with_system.spans] == [2]


def test_a_dropped_system_message_that_is_a_word_of_the_template_counts_as_dropped() -> None:
    assert chat_template(MISTRAL).render(chat("hello", "hi", system="INST")).folded_system


@pytest.mark.parametrize(
    ("trim", "left"),
    [
        (".strip()", "six"),
        (".lstrip()", "six \n"),
        (".rstrip()", "\n six"),
        (".strip('\n')", " six "),
        (".lstrip('\n')", " six \n"),
    ],
)
def test_white_space_that_a_template_strips_is_not_part_of_the_span(trim: str, left: str) -> None:
    rendered = chat_template(CHATML.replace("m.content", f"m.content{trim}")).render(
        chat("hello", "\n six \n", "a", "b")
    )
    assert span_texts(rendered) == [left, "b"]


def test_thoughts_that_the_template_drops_from_earlier_turns_are_counted_and_kept_ones_are_found() -> None:
    template, thought = chat_template(THINKING), "<think>\nIt is wet.\n</think>\n\nOne sack."
    rendered = template.render(chat("How many?", thought, "Sure?", "Yes."))
    assert span_texts(rendered) == ["One sack.", "Yes."]
    assert [(o.message, o.kind, o.text, o.problem) for o in rendered.omissions] == [
        (1, "reasoning", "\nIt is wet.\n", "")
    ]
    rendered = template.render(chat("How many?", "One.", "Sure?", thought))
    assert span_texts(rendered) == ["One.", thought]
    assert [part.kind for part in rendered.spans[1].parts] == ["reasoning", "content"]
    assert rendered.text[: -len(thought) - len("<|im_end|>\n")].endswith("assistant\n")
    assert all(span.end_of_turn == id_of("<|im_end|>") for span in rendered.spans)


# A real model


def files_of(folder: Path) -> dict[str, bytes]:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


@pytest.fixture(scope="module")
def smollm2_template(smollm2: Path, smollm2_vocabulary: Vocabulary) -> ChatTemplate:
    return ChatTemplate.from_files(files_of(smollm2), smollm2_vocabulary, "smollm2")


def test_the_template_of_smollm2_ends_turns_with_im_end(smollm2_template: ChatTemplate) -> None:
    rendered = smollm2_template.render(chat("Where is the tar?", "In the shed.\n", "And paper?", "assistant"))
    assert span_texts(rendered) == ["In the shed.\n", "assistant"]
    assert [span.end_of_turn for span in rendered.spans] == [2, 2]
    assert rendered.prefix == ()
    assert rendered.text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert not smollm2_template.render(chat("a", "b", system="Be brief.")).folded_system


def test_the_rendering_of_smollm2_is_tokenized_as_by_transformers(
    smollm2: Path, smollm2_template: ChatTemplate
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = chat("Où est le goudron ? 😀", "In the shed.\n\n\tThere.", "x = [1]", "1")
    rendered = smollm2_template.render(messages)
    assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.tokens.ids.tolist() == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]


def test_the_tokenizer_of_gemma_merges_newlines_of_template_and_content(
    gemma: Path, gemma_vocabulary: Vocabulary
) -> None:
    text = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    )
    template = ChatTemplate.from_files(files_of(gemma), gemma_vocabulary, "gemma", template=text)
    rendered = template.render(chat("a", "\nb"))
    part = chat_tokens(rendered, rendered.spans[0])
    assert gemma_vocabulary.tokens[part.tokens.ids[0]] == "\n\n"
    assert part.straddles
    assert part.closes
    assert rendered.sequence[0] == gemma_vocabulary.roles["bos"]


@given(turns=st.lists(ANY_TEXT.filter(lambda t: t and "<" not in t), min_size=2, max_size=4))
def test_any_chat_is_found_in_the_rendering_of_smollm2(smollm2_template: ChatTemplate, turns: Sequence[str]) -> None:
    assume(len(turns) % 2 == 0)
    rendered = smollm2_template.render(chat(*turns))
    assert span_texts(rendered) == list(turns[1::2])
    assert all(chat_tokens(rendered, span).closes for span in rendered.spans)


@pytest.mark.parametrize("name", [*TEMPLATES, "thinking"])
@given(
    turns=st.lists(st.tuples(CONTENT, CONTENT.filter(bool) | st.just("<think>so</think>yes")), min_size=2, max_size=5)
)
def test_parts_found_together_are_those_found_one_by_one(name: str, turns: list[tuple[str, str]]) -> None:
    template = chat_template(TEMPLATES.get(name, THINKING), "byte_level")
    messages = chat(*(content for turn in turns for content in turn))

    def spans() -> object:
        try:
            return template.render(messages).spans
        except ChatError as error:
            return str(error)

    together = spans()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chat, "_find_together", lambda *_: None)
        assert spans() == together
