"""Tokens of rendered chats: special tokens are parsed, and byte offsets are exact for every kind of tokenizer."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment import TokenizerError, Vocabulary
from tests.templates import CHATML, SPECIALS, chat, chat_vocabulary, id_of, prefixed, spec_of, vocabulary_of
from tests.tiny import Kind, tokenizer_config
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import RenderedChat, chat_tokens, supervised_mask

KINDS: tuple[Kind, ...] = ("byte_level", "sentencepiece")
PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["the harbour", " the", "\n", "  ", "é", "▁", "😀", "日本"]),
)


def render(vocabulary: Vocabulary, template: str, *contents: str) -> RenderedChat:
    return ChatTemplate.from_files({}, vocabulary, "odd", template=template).render(chat(*contents))


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.lists(PIECES).map("".join))
def test_rendered_text_without_special_tokens_is_tokenized_as_plain_text(kind: Kind, text: str) -> None:
    vocabulary = chat_vocabulary(kind)
    if not any(token in text for token in vocabulary.tokens[-len(SPECIALS) :]):
        plain, rendered = vocabulary.encode(text), vocabulary.encode_rendered(text)
        np.testing.assert_array_equal(rendered.ids, plain.ids)
        np.testing.assert_array_equal(rendered.ends, plain.ends)


@pytest.mark.parametrize("make", [chat_vocabulary, prefixed], ids=["plain", "prefixed"])
@pytest.mark.parametrize("kind", KINDS)
@given(pieces=st.lists(PIECES, min_size=1, max_size=5), special=st.sampled_from(SPECIALS))
def test_special_tokens_cover_their_own_bytes_and_other_tokens_cover_the_text_between(
    make: Any, kind: Kind, pieces: list[str], special: str
) -> None:
    vocabulary = make(kind)
    tokens = vocabulary.encode_rendered(special.join(pieces))
    is_special = tokens.ids == vocabulary.tokens.index(special)
    at, expected = 0, []
    for piece in pieces[:-1]:
        at += len((piece + special).encode())
        expected.append(at)
    assert tokens.ends[is_special].tolist() == expected
    for stop, i in zip(expected, np.flatnonzero(is_special).tolist(), strict=True):
        begins = stop - len(special)
        assert begins == (tokens.ends[i - 1] if i else 0)
    assert tokens.num_bytes == (tokens.ends[-1] if len(tokens) else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_that_the_tokenizer_prepends_is_not_a_byte_of_the_span(kind: Kind) -> None:
    vocabulary, text = prefixed(kind), "{% for m in messages %}[INST]{{ m.content }}<|eot|>{% endfor %}"
    rendered = render(vocabulary, text, "x", "the six")
    part = chat_tokens(rendered, rendered.spans[0])
    assert part.tokens.text == b"the six"
    assert not part.straddles
    assert part.closes
    first = vocabulary.token_bytes[part.tokens.ids[0]]
    assert first is not None
    assert first.startswith(b" ")
    assert part.tokens.ends[0] == len(first) - 1


def test_an_end_of_turn_that_absorbs_preceding_white_space_is_not_supervised() -> None:
    vocabulary = vocabulary_of(spec_of("byte_level", lstrip=True), "byte_level")
    rendered = render(vocabulary, CHATML, "a", "six sacks \n", "c", "six sacks")
    first, second = (chat_tokens(rendered, span) for span in rendered.spans)
    assert first.tokens.text == b"six sacks \n"
    assert (first.closes, second.closes) == (False, True)
    assert [span.end_of_turn for span in rendered.spans] == [None, vocabulary.tokens.index("<|im_end|>")]
    assert first.tokens.ends[-1] == len("six sacks")
    assert not supervised_mask(rendered)[first.stop]


def test_a_header_that_absorbs_white_space_of_the_content_is_not_supervised() -> None:
    vocabulary = vocabulary_of(spec_of("byte_level", rstrip=True), "byte_level")
    rendered = render(vocabulary, "{% for m in messages %}[INST]{{ m.content }}<|eot|>{% endfor %}", "a", "\n six")
    part = chat_tokens(rendered, rendered.spans[0])
    assert part.straddles
    assert part.tokens.ids[0] == vocabulary.tokens.index("[INST]")
    assert part.tokens.ends[0] == 2
    assert not supervised_mask(rendered)[part.begin]


def test_a_tokenizer_that_loses_text_is_an_error() -> None:
    spec = spec_of("sentencepiece")
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [strip, spec["normalizer"]]}
    vocabulary = vocabulary_of(spec)
    with pytest.raises(TokenizerError, match="odd: its tokens do not cover a segment"):
        vocabulary.encode_rendered("[INST]six [/INST]")
    with pytest.raises(TokenizerError, match="odd: its tokens do not cover a segment"):
        vocabulary.encode_rendered("[INST] [/INST]")
    with pytest.raises(ChatError, match="sample chat, model odd: odd: its tokens do not cover"):
        render(vocabulary, "{% for m in messages %}[INST]{{ m.content }}<|eot|>{% endfor %}", "x", "six ")


def test_a_normalizer_that_turns_text_into_a_special_token_is_an_error() -> None:
    spec = spec_of("sentencepiece", normalized=True)
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, spec["normalizer"]]}
    vocabulary = vocabulary_of(spec)
    assert vocabulary.encode_rendered("a<turn>").ids[-1] == vocabulary.tokens.index("<turn>")
    with pytest.raises(TokenizerError, match="odd: expected '<turn>' at character 1, received '＜turn＞'"):
        vocabulary.encode_rendered("a＜turn＞")


def test_text_changed_by_a_normalizer_is_located_by_the_tokenizers_offsets() -> None:
    spec = spec_of("sentencepiece")
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, spec["normalizer"]]}
    rendered = render(vocabulary_of(spec), CHATML, "a", "Ａ six ﬁt")
    part = chat_tokens(rendered, rendered.spans[0])
    assert part.closes
    known = part.tokens.ends[part.tokens.ends >= 0]
    assert (np.diff(known) >= 0).all()
    assert part.tokens.ends[0] == len("Ａ".encode())


@pytest.mark.parametrize("text", ["cafe\u0301", "e\u0301", "o\u0302\u0301", "\u1112\u1161\u11ab"])
def test_text_that_ends_with_a_composed_letter_is_covered(text: str) -> None:
    """The letter is decomposed, as in file names of macOS; the normalizer's offsets end after its first part."""
    spec = spec_of("byte_level")
    spec["normalizer"] = {"type": "NFC"}
    rendered = render(vocabulary_of(spec), CHATML, "a", text)
    part = chat_tokens(rendered, rendered.spans[0])
    assert part.closes
    assert part.tokens.ends[-2] == len(text.encode())


def test_an_unknown_token_is_special_only_if_the_text_contains_it() -> None:
    spec = spec_of("sentencepiece")
    config = json.dumps(tokenizer_config("sentencepiece") | {"unk_token": "<unk>"}).encode()
    spec["model"]["vocab"] = {t: i for t, i in spec["model"]["vocab"].items() if t not in ("é", "<0xC3>", "<0xA9>")}
    vocabulary = Vocabulary.parse(json.dumps(spec).encode(), config, name="odd")
    for text, expected in (("six<unk>six", len("six<unk>")), ("sixésix", len("sixé".encode()))):
        tokens = vocabulary.encode_rendered(text)
        assert tokens.ends[tokens.ids.tolist().index(vocabulary.roles["unk"])] == expected


def test_bytes_without_a_token_belong_to_adjacent_tokens(smollm2_vocabulary: Vocabulary) -> None:
    template = ChatTemplate.from_files({}, smollm2_vocabulary, "smollm2", template=CHATML)
    rendered = template.render(chat("a", "six\x04 sacks\x04"))
    part = chat_tokens(rendered, rendered.spans[0])
    assert part.closes
    assert part.tokens.ends[-2] == len("six\x04 sacks\x04")


def test_special_tokens_are_parsed_in_rendered_chats_only() -> None:
    vocabulary = chat_vocabulary("byte_level")
    end = id_of("<|eot|>")
    assert end in vocabulary.encode_rendered("a<|eot|>").ids
    assert end not in vocabulary.encode("a<|eot|>").ids
