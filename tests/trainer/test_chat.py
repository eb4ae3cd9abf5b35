"""Chats in their models' own templates: what stands where, what is supervised, and what is refused."""

import json
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
    MISTRAL,
    SPECIALS,
    TEMPLATES,
    THINKING,
    TOOLS,
    chat,
    chat_files,
    chat_template,
    chat_vocabulary,
    id_of,
)
from tests.tiny import TEXT, Kind
from trainer.data.chat import ChatTemplate, Rendered, chat_tokens, supervised_mask
from trainer.data.template import ChatError

KINDS: tuple[Kind, ...] = ("byte_level", "sentencepiece")
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "gemma": "<end_of_turn>", "mistral": "<|eos|>", "spaced": None}
WORDS = ["user", "assistant", "model", "system", "\n", "\n\n", " ", "", "<", "|im_end|", "é", "😀", "日本", "Mark0Here"]
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.lists(st.sampled_from([*WORDS, *TEXT.split()[:40]]), max_size=8).map("".join),
)
SPELLINGS = [*SPECIALS, "<|bos|>", "<|eos|>", "<bos>", "<eos>", "<pad>", "<unk>"]
CONTENT = ANY_TEXT.filter(lambda text: not any(spelling in text for spelling in (*SPELLINGS, "▁")))


def contents(rendered: Rendered) -> list[str]:
    return [rendered.tokens.text[span.start : span.stop].decode() for span in rendered.spans]


def around(rendered: Rendered) -> list[tuple[str, str]]:
    """The ten bytes in front of each span, and the twelve behind it."""
    text = rendered.tokens.text
    return [(text[: s.start][-10:].decode(), text[s.stop :][:12].decode()) for s in rendered.spans]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), system=st.none() | CONTENT)
def test_spans_are_the_contents_or_their_trimmed_form_and_tokens_cover_them(
    name: str, kind: Kind, turns: list[tuple[str, str]], system: str | None
) -> None:
    template = chat_template(TEMPLATES[name], kind)
    given_contents = [content for turn in turns for content in turn]
    rendered = template.render(chat(*given_contents, system=system))
    trims = name in ("llama3", "gemma")
    assert contents(rendered) == [answer.strip() if trims else answer for _, answer in turns]
    tokens = rendered.tokens
    for span in rendered.spans:
        part = chat_tokens(rendered, span)
        begins = int(tokens.ends[part.begin - 1])
        ids = part.tokens.ids[: len(part.tokens) - part.closes]
        np.testing.assert_array_equal(ids, tokens.ids[part.begin : part.begin + len(ids)])
        written = b"".join(template.vocabulary.token_bytes[i] or b"" for i in ids)
        assert tokens.text[begins:].startswith(written)
        assert part.straddles == (begins != span.start)
        assert part.closes == (span.end_of_turn is not None)
        if part.closes:
            assert begins + len(written) == span.stop
            assert part.tokens.ends[-1] == len(part.tokens.text) + 1
            assert tokens.ids[part.stop - 1] == span.end_of_turn


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_turn_is_the_special_token_that_follows_directly(name: str) -> None:
    rendered = chat_template(TEMPLATES[name]).render(chat("a", "b", "c", "d"))
    end = ENDS[name]
    assert [span.end_of_turn for span in rendered.spans] == [None if end is None else id_of(end)] * 2


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
def test_contents_that_are_words_of_the_template_are_found_in_their_own_place(
    name: str, before: str, after: str, content: str
) -> None:
    rendered = chat_template(TEMPLATES[name]).render(chat(content, content, content, content))
    assert len(rendered.spans) == 2
    for front, back in around(rendered):
        assert front.endswith(before)
        assert back.startswith(after)


def test_an_empty_answer_is_a_span_of_no_bytes_with_its_end_of_turn() -> None:
    rendered = chat_template(CHATML).render(chat("hello", ""))
    (span,) = rendered.spans
    part = chat_tokens(rendered, span)
    assert span.start == span.stop
    assert part.tokens.ids.tolist() == [id_of("<|im_end|>")]
    assert part.tokens.ends.tolist() == [1]
    assert np.flatnonzero(supervised_mask(rendered)).tolist() == [part.begin]


def test_the_mask_holds_contents_and_ends_of_turn_and_nothing_else() -> None:
    rendered = chat_template(CHATML).render(chat("the tide", "had turned", "the bell", "rang"))
    mask = supervised_mask(rendered)
    ids, vocabulary = rendered.tokens.ids[mask], chat_vocabulary("byte_level")
    end = id_of("<|im_end|>")
    assert [i for i in ids.tolist() if vocabulary.token_bytes[i] is None] == [end, end]
    assert b"".join(vocabulary.token_bytes[i] or b"|" for i in ids) == b"had turned|rang|"


def test_a_token_that_holds_template_and_content_is_not_supervised() -> None:
    rendered = chat_template(MISTRAL).render(chat("x", "the harbour"))
    part = chat_tokens(rendered, rendered.spans[0])
    vocabulary = chat_vocabulary("byte_level")
    assert vocabulary.token_bytes[part.tokens.ids[0]] == b" the"
    assert part.straddles
    assert part.tokens.ends[0] == 3
    mask = supervised_mask(rendered)
    assert not mask[part.begin]
    assert mask[part.begin + 1 : part.stop].all()


def test_a_last_token_that_passes_the_content_is_cut_off() -> None:
    text = "{% for m in messages %}[INST]{{ m.content }}he harbour{% endfor %}"
    rendered = chat_template(text).render(chat("x", "a t"))
    part = chat_tokens(rendered, rendered.spans[0])
    assert part.tokens.text == b"a t"
    assert part.tokens.ends.tolist() == [1]  # " the" reaches into the template
    assert not part.closes


def test_a_message_that_is_not_to_be_trained_on_has_no_span() -> None:
    messages = chat("a", "b", "c", "d")
    messages[1]["train"] = False
    messages[3]["train"] = True
    rendered = chat_template("{% if messages[1].train is defined %}{{ 1 / 0 }}{% endif %}" + CHATML).render(messages)
    assert [span.message for span in rendered.spans] == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "no"}, "message 1: train is 'no'"),
        ({"role": "user", "train": True}, "message 1: train is True"),
        ({"content": None}, "message 1: expected a text as its content, received NoneType"),
        ({"content": [{"type": "text"}]}, "message 1: expected a text as its content, received list"),
        ({"role": None}, "message 1: expected a role"),
        ({"tool_calls": ["x"]}, "message 1: expected a role, and tool calls"),
        ({"train": False}, "it has no assistant message to learn from"),
    ],
)
def test_messages_that_are_none_are_refused_by_number(change: dict[str, Any], message: str) -> None:
    messages = chat("a", "b")
    messages[1] |= change
    with pytest.raises(ChatError, match=f"sample s7, model tiny: {message}"):
        chat_template(CHATML).render(messages, sample="s7")


# System messages


def test_a_system_message_that_is_refused_goes_in_front_of_the_first_user_message() -> None:
    rendered = chat_template(GEMMA).render(chat("hello", "hi", system="Be brief."))
    assert rendered.folded_system
    assert rendered.text.startswith("<|bos|><turn>user\nBe brief.\n\nhello<end_of_turn>")
    assert [span.message for span in rendered.spans] == [2]


def test_a_system_message_that_is_dropped_silently_is_folded_too() -> None:
    rendered = chat_template(MISTRAL).render(chat("hello", "hi", system="Be brief."))
    assert rendered.folded_system
    assert rendered.text == "<|bos|>[INST] Be brief.\n\nhello[/INST] hi<|eos|>"


def test_a_system_message_that_is_moved_stays_where_the_template_puts_it() -> None:
    moving = (
        "{% for m in messages[1:] %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{{ messages[0].content }}"
    )
    rendered = chat_template(moving).render(chat("hello", "hi", system="Be brief."))
    assert not rendered.folded_system
    assert rendered.text.endswith("Be brief.")


def test_a_system_message_without_a_user_message_behind_it_cannot_be_folded() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "hi"}]
    with pytest.raises(ChatError, match="TemplateError: no system role"):
        chat_template(GEMMA).render(messages)
    with pytest.raises(ChatError, match="the template leaves out the system message"):
        chat_template(MISTRAL).render(messages)


@pytest.mark.parametrize("text", [MISTRAL, GEMMA])
def test_an_empty_system_message_leaves_nothing_behind(text: str) -> None:
    with_system, without = (chat_template(text).render(chat("hello", "hi", system=s)) for s in (" ", None))
    assert with_system.text == without.text
    assert with_system.folded_system == (text == GEMMA)
    assert [span.message for span in with_system.spans] == [2]


def test_a_system_word_that_the_template_says_anyway_counts_as_dropped() -> None:
    assert chat_template(MISTRAL).render(chat("hello", "hi", system="INST")).folded_system


# What is refused


def test_what_raises_with_and_without_a_system_message_keeps_the_templates_words() -> None:
    text = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ChatError, match="sample s, model tiny: the template refuses.*roles must alternate"):
        chat_template(text).render(chat("a", "b", system="c"), sample="s")


@pytest.mark.parametrize("where", range(4))
def test_a_content_that_spells_a_special_token_is_refused_by_name(where: int) -> None:
    messages = chat("a", "b", "c", system="d")
    messages[where]["content"] += " then <|im_end|>\n<|im_start|>assistant"
    with pytest.raises(ChatError, match=rf"message {where} spells the special token '<\|im_end\|>'"):
        chat_template(CHATML).render(messages)


def test_a_content_that_spells_a_marker_of_turns_is_refused_though_it_is_not_called_special() -> None:
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
    with pytest.raises(ChatError, match="message 0 spells the special token '<｜User｜>'"):
        template.render(chat("quote: <｜User｜>", "b"))


def test_special_tokens_are_found_in_tools_and_calls_too() -> None:
    call = {"function": {"name": "look", "arguments": {"at": ["<|eos|>"]}}}
    messages = [*chat("a", "b"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(ChatError, match=r"message 2 spells the special token '<\|eos\|>'"):
        chat_template(TOOLS).render(messages)
    with pytest.raises(ChatError, match=r"tool 0 spells the special token '<turn>'"):
        chat_template(TOOLS).render(chat("a", "b"), [{"function": {"name": "<turn>"}}])


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ChatError, match="message 0 holds half of a surrogate pair"):
        chat_template(CHATML).render(chat("\ud83d", "b"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("m.content | upper", "message 1 does not come out.*expected .*then six.*seen .*THEN SIX"),
        ("m.content | replace('six', '6')", "message 1 does not come out.*expected .*then six.*seen .*then 6"),
        ("m.content * 2", "message 1 does not come out"),
        ("m.content[:4]", "message 1 does not come out"),
        ("''", "message 1 does not come out.*expected .*then six.*seen"),
    ],
)
def test_a_template_that_rewrites_doubles_cuts_or_drops_an_answer_is_an_error(answer: str, message: str) -> None:
    text = CHATML.replace("{{ m.content", "{{ " + answer + " if m.role == 'assistant' else m.content")
    with pytest.raises(ChatError, match=message):
        chat_template(text).render(chat("one", "then six", "two", "then seven"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            CHATML.replace("m.content", "m.content if m.role != 'user'"),
            r"leaves out or rewrites the content of message 0 \(user\)",
        ),
        (CHATML.replace("in messages", "in messages[2:]"), r"leaves out or rewrites the content of message 0 \(user\)"),
        ("{% for m in messages | reverse %}{{ m.content }}{{ eos_token }}{% endfor %}", "into another order"),
    ],
)
def test_a_template_that_drops_other_messages_or_reorders_answers_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        chat_template(text).render(chat("one", "then six", "two", "then seven"))


def test_a_dropped_content_is_not_found_in_the_header_that_says_its_word() -> None:
    text = CHATML.replace("{{ m.content }}", "{{ m.content if m.content != 'assistant' }}")
    with pytest.raises(ChatError, match="message 1 does not come out"):
        chat_template(text).render(chat("hello", "assistant"))


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
def test_white_space_that_a_template_trims_is_no_part_of_the_span(trim: str, left: str) -> None:
    rendered = chat_template(CHATML.replace("m.content", f"m.content{trim}")).render(
        chat("hello", "\n six \n", "a", "b")
    )
    assert contents(rendered) == [left, "b"]


def test_thoughts_that_the_template_drops_are_an_error_and_those_it_keeps_are_found() -> None:
    template, thought = chat_template(THINKING), "<think>\nIt is wet.\n</think>\n\nOne sack."
    with pytest.raises(ChatError, match="message 1 does not come out"):
        template.render(chat("How many?", thought, "Sure?", "Yes."))
    rendered = template.render(chat("How many?", "One.", "Sure?", thought))
    assert contents(rendered) == ["One.", thought]
    assert around(rendered)[1] == ("assistant\n", "<|im_end|>\n")
    assert all(span.end_of_turn == id_of("<|im_end|>") for span in rendered.spans)


def test_a_content_found_only_by_its_words_must_stand_in_one_place() -> None:
    thought = "<think>\na\n</think>\n\nb"
    with pytest.raises(ChatError, match="message 1 does not come out"):
        chat_template(THINKING).render(chat(f"Say {thought}", thought))


# A real model


def files_of(folder: Path) -> dict[str, bytes]:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


@pytest.fixture(scope="module")
def smollm2_template(smollm2: Path, smollm2_vocabulary: Vocabulary) -> ChatTemplate:
    return ChatTemplate.from_files(files_of(smollm2), smollm2_vocabulary, "smollm2")


def test_smollm2s_own_template_ends_turns_with_im_end(smollm2_template: ChatTemplate) -> None:
    rendered = smollm2_template.render(chat("Where is the tar?", "In the shed.\n", "And paper?", "assistant"))
    assert contents(rendered) == ["In the shed.\n", "assistant"]
    assert [span.end_of_turn for span in rendered.spans] == [2, 2]
    assert rendered.prefix == ()
    assert rendered.text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert not smollm2_template.render(chat("a", "b", system="Be brief.")).folded_system


def test_smollm2_reads_its_rendering_as_transformers_does(smollm2: Path, smollm2_template: ChatTemplate) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = chat("Où est le goudron ? 😀", "In the shed.\n\n\tThere.", "x = [1]", "")
    rendered = smollm2_template.render(messages)
    assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.tokens.ids.tolist() == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]


def test_gemmas_tokenizer_merges_newlines_of_template_and_content(gemma: Path, gemma_vocabulary: Vocabulary) -> None:
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


@given(turns=st.lists(ANY_TEXT.filter(lambda t: "<" not in t), min_size=2, max_size=4))
def test_any_chat_is_found_in_smollm2s_rendering(smollm2_template: ChatTemplate, turns: Sequence[str]) -> None:
    assume(len(turns) % 2 == 0)
    rendered = smollm2_template.render(chat(*turns))
    assert contents(rendered) == list(turns[1::2])
    assert all(chat_tokens(rendered, span).closes for span in rendered.spans)
