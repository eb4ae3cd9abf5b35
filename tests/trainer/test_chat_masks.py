"""Positions of a chat without a target: tokens across the ends of a content, stripped white space, ends of turn."""

import numpy as np
import pytest

from alignment import translate
from tests.rows import random_rows
from tests.templates import chat, chat_vocabulary, prefixed
from tests.tiny import Kind
from tests.trainer.chat_cases import SENTENCE, TRANSLATIONS, case
from trainer.chats.chat_alignment import align_chat
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.rendered_chat import chat_tokens


@pytest.mark.parametrize(("teacher", "student"), [("mistral", "chatml"), ("chatml", "mistral"), ("mistral", "mistral")])
@pytest.mark.parametrize("kinds", TRANSLATIONS, ids=" to ".join)
def test_positions_of_a_token_with_text_of_template_and_content_are_masked_on_both_sides(
    kinds: tuple[Kind, Kind], teacher: str, student: str
) -> None:
    one = case(["How many?", "sacks of the harbour"], (teacher, student), kinds)
    result = one.aligned()
    sides = [chat_tokens(r, r.spans[0]) for r in (one.teacher, one.student)]
    assert [part.straddles for part in sides] == [teacher == "mistral", student == "mistral"]
    reached = max(int(part.tokens.ends[0]) for part in sides if part.straddles)
    part = sides[1]
    starts = np.concatenate([[-1 if part.straddles else 0], part.tokens.ends[:-1]])
    np.testing.assert_array_equal(result.target.valid[part.begin : part.stop], starts >= reached)
    assert result.spans[0].masked == (starts < reached).sum() > 0
    assert result.target.valid[part.stop - 1]


@pytest.mark.parametrize("direction", [1, -1], ids=["of the teacher", "of the student"])
def test_a_first_token_with_a_space_that_its_tokenizer_prepends_is_masked(direction: int) -> None:
    text, ours = "{% for m in messages %}[INST]{{ m.content }}<|eot|>{% endfor %}", chat_vocabulary("byte_level")
    odd = prefixed("sentencepiece")
    sides = [ChatTemplate.from_files({}, v, "odd", template=text).render(chat("a", "the sacks")) for v in (odd, ours)]
    (teacher, student), (source, target) = sides[::direction], (odd, ours)[::direction]
    rows = random_rows(np.array(teacher.sequence), len(source), 12, seed=1, start=1)
    valid = align_chat(rows, teacher, student, translate(source, target)).target.valid
    space, part = chat_tokens(sides[0], sides[0].spans[0]), chat_tokens(student, student.spans[0])
    assert odd.token_bytes[space.tokens.ids[0]] == b" the"
    assert not space.straddles
    starts = np.concatenate([[0], part.tokens.ends[:-1]])
    np.testing.assert_array_equal(valid[part.begin : part.stop], starts >= len("the"))


@pytest.mark.parametrize("kinds", TRANSLATIONS, ids=" to ".join)
@pytest.mark.parametrize(("teacher", "student"), [("gemma", "chatml"), ("chatml", "gemma")])
def test_a_stripped_content_is_aligned_and_white_space_and_end_of_turn_are_masked(
    kinds: tuple[Kind, Kind], teacher: str, student: str
) -> None:
    one = case(["How many?", f"\n {SENTENCE} \n"], (teacher, student), kinds)
    result = one.aligned()
    part = chat_tokens(one.student, one.student.spans[0])
    text = np.array([*part.tokens.text])
    valid = result.target.valid[part.begin : part.stop]
    bytes_of = np.repeat(valid[: len(valid) - part.closes], np.diff(np.concatenate([[0], part.tokens.ends[:-1]])))
    covered = bytes(text[bytes_of].tolist()).decode()
    assert covered
    assert covered in SENTENCE
    assert len(covered) > len(SENTENCE) - 12
    assert not valid[-1]
    assert result.supervised_T[part.stop - 1]
    assert not result.spans[0].end_of_turn


@pytest.mark.parametrize(("teacher", "student"), [("spaced", "chatml"), ("chatml", "spaced")])
def test_the_end_of_turn_is_masked_if_it_follows_different_texts(teacher: str, student: str) -> None:
    one = case(["How many?", "sacks"], (teacher, student), ("byte_level", "byte_level"))
    result = one.aligned()
    part = chat_tokens(one.student, one.student.spans[0])
    added = 1 + (student == "spaced")  # the end of turn, and the line end in front of it
    assert part.closes
    assert not result.spans[0].end_of_turn
    assert np.flatnonzero(result.target.valid).tolist() == [*range(part.begin, part.stop - added)]
    assert result.supervised_T[part.stop - 1]
