"""Alignment of a teacher's rows for its rendering of a chat to the student's rendering."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from alignment import AlignmentError, Target, Tokens, Translation, align, translate
from alignment.byte_chain import ScoredRows, align_byte_chain
from alignment.kernels import NONE
from alignment.report import block_likelihoods
from teachers.protocol.rows import Rows
from tests.kinds import vocabulary_of
from tests.rows import random_rows
from tests.templates import TEMPLATES, chat, chat_template, chat_vocabulary, id_of
from tests.tiny import Kind
from tests.trainer.chat_cases import KINDS, SENTENCE, TRANSLATIONS, TURNS, case, rows_of
from trainer.chats.chat_alignment import align_chat, with_end_of_turn
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import chat_tokens, supervised_mask


class Call(NamedTuple):
    rows: ScoredRows
    first_row: int
    teacher: Tokens
    student: Tokens
    translation: Translation
    target: Target


def record_calls() -> tuple[list[Call], Callable[..., Target]]:
    """Return alignment.align, wrapped, and the list of its calls with arguments and result."""
    calls: list[Call] = []

    def recorder(
        rows: ScoredRows, first_row: int, teacher: Tokens, student: Tokens, translation: Translation
    ) -> Target:
        target = align(rows, first_row, teacher, student, translation)
        calls.append(Call(rows, first_row, teacher, student, translation, target))
        return target

    return calls, recorder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=TURNS)
def test_equal_tokenizers_and_templates_keep_the_rows_unchanged(name: str, kind: Kind, contents: list[str]) -> None:
    one = case(contents, (name, name), (kind, kind))
    result = one.aligned()
    np.testing.assert_array_equal(result.target.valid, supervised_mask(one.student))
    np.testing.assert_array_equal(result.supervised_T, result.target.valid)
    target_rows = rows_of(result.target)
    for position in np.flatnonzero(result.target.valid).tolist():
        row, actual = position - one.first_row, int(one.teacher.tokens.ids[position])
        given_row = dict(zip(one.rows.ids[row].tolist(), np.exp(one.rows.logprobs[row]).tolist(), strict=True))
        assert target_rows[position] == pytest.approx(
            given_row | {actual: float(np.exp(one.rows.actual[row]))}, rel=1e-5
        )


@pytest.mark.parametrize("kinds", TRANSLATIONS, ids=" to ".join)
@given(contents=TURNS, teacher=st.sampled_from([*TEMPLATES]), student=st.sampled_from([*TEMPLATES]))
def test_each_block_is_at_least_as_likely_as_under_the_teacher(
    kinds: tuple[Kind, Kind], contents: list[str], teacher: str, student: str
) -> None:
    calls, recorder = record_calls()
    case(contents, (teacher, student), kinds).aligned(align=recorder)
    for call in calls:
        cuts = align_byte_chain(call.rows, 0, call.teacher, call.student, call.translation).uncrossed_cuts
        blocks = block_likelihoods(call.rows, 0, (call.teacher, call.student), call.target, cuts)
        assert blocks.num_bytes.sum() == call.teacher.num_bytes
        assert (blocks.student >= blocks.teacher - 1e-4).all()


@pytest.mark.parametrize("kinds", TRANSLATIONS, ids=" to ".join)
@given(contents=TURNS, teacher=st.sampled_from([*TEMPLATES]), student=st.sampled_from([*TEMPLATES]))
def test_only_supervised_positions_are_valid_and_their_mass_and_tail_sum_to_one(
    kinds: tuple[Kind, Kind], contents: list[str], teacher: str, student: str
) -> None:
    one = case(contents, (teacher, student), kinds)
    result = one.aligned()
    target = result.target
    assert len(target) == len(one.student.tokens) == len(result.supervised_T)
    assert not target.valid[~result.supervised_T].any()
    np.testing.assert_allclose((target.mass + target.tail)[target.valid], 1, atol=1e-6)
    assert not (target.mass + target.tail)[~target.valid].any()
    assert sum(span.aligned for span in result.spans) == target.valid.sum() == result.report.valid
    assert all(span.masked >= 0 for span in result.spans)
    assert result.report.positions == sum(span.positions for span in result.spans)


@pytest.mark.parametrize("kinds", TRANSLATIONS, ids=" to ".join)
@given(contents=TURNS, teacher=st.sampled_from([*TEMPLATES]), student=st.sampled_from([*TEMPLATES]))
def test_rows_and_tokens_of_a_stretch_belong_to_its_bytes(
    kinds: tuple[Kind, Kind], contents: list[str], teacher: str, student: str
) -> None:
    """The tokens of every call occur in both renderings, at the same distance from the start of their span."""
    one = case(contents, (teacher, student), kinds)
    calls, recorder = record_calls()
    result = one.aligned(align=recorder)
    valid = np.flatnonzero(result.target.valid).tolist()
    at = 0
    for call in calls:
        where = one.rows.actual.tobytes().find(np.asarray(call.rows.actual).tobytes()) // 4
        tokens = one.teacher.tokens.ids[where + one.first_row :][: len(call.teacher)]
        np.testing.assert_array_equal(tokens, call.teacher.ids)
        np.testing.assert_array_equal(one.rows.ids[where : where + len(call.teacher)], call.rows.ids)
        here = valid[at : at + int(call.target.valid.sum())]
        np.testing.assert_array_equal(one.student.tokens.ids[here], call.student.ids[call.target.valid])
        at += len(here)
        for tokens_, rendered in ((call.teacher, one.teacher), (call.student, one.student)):
            pieces = [chat_vocabulary(kinds[rendered is one.student]).token_bytes[i] or b"" for i in tokens_.ids]
            if "▁" not in one.student.text:  # which sentencepiece reads as a space
                assert b"".join(pieces).endswith(call.teacher.text)
    assert at == len(valid)


@pytest.mark.parametrize("kinds", TRANSLATIONS, ids=" to ".join)
@pytest.mark.parametrize(("teacher", "student"), [*product(["chatml", "llama3", "gemma"], repeat=2)])
def test_every_position_is_aligned_if_contents_are_between_special_tokens_or_line_ends(
    kinds: tuple[Kind, Kind], teacher: str, student: str
) -> None:
    result = case(["How many?", SENTENCE, "Sure?", "Yes."], (teacher, student), kinds).aligned()
    np.testing.assert_array_equal(result.target.valid, result.supervised_T)
    assert [span.masked for span in result.spans] == [0, 0]
    assert all(span.end_of_turn for span in result.spans)


@pytest.mark.parametrize("kinds", TRANSLATIONS, ids=" to ".join)
def test_the_end_of_turn_of_the_teacher_is_translated_to_that_of_the_student(kinds: tuple[Kind, Kind]) -> None:
    one = case(["How many?", SENTENCE], ("llama3", "gemma"), kinds)
    target = one.aligned(align=partial(align, carry_above=np.inf)).target  # no mass carried from earlier rows
    end = chat_tokens(one.student, one.student.spans[0]).stop - 1
    row = chat_tokens(one.teacher, one.teacher.spans[0]).stop - 1 - one.first_row
    assert one.student.tokens.ids[end] == id_of("<end_of_turn>", kinds[1])
    own = float(np.exp(one.rows.actual[row]))
    listed = dict(zip(one.rows.ids[row].tolist(), np.exp(one.rows.logprobs[row]).tolist(), strict=True))
    same = listed.get(id_of("<end_of_turn>", kinds[0]), 0) if kinds[0] == kinds[1] else 0
    assert rows_of(target)[end][id_of("<end_of_turn>", kinds[1])] == pytest.approx(own + same, rel=1e-5)


def test_the_probability_of_an_end_of_turn_within_a_content_is_translated_too() -> None:
    one = case(["How many?", SENTENCE], ("llama3", "gemma"), ("sentencepiece", "byte_level"), top_k=485)
    part = chat_tokens(one.student, one.student.spans[0])
    eot, end = id_of("<|eot|>", "sentencepiece"), id_of("<end_of_turn>")
    first = chat_tokens(one.teacher, one.teacher.spans[0]).begin - one.first_row
    listed = dict(zip(one.rows.ids[first].tolist(), np.exp(one.rows.logprobs[first]).tolist(), strict=True))
    assert rows_of(one.aligned().target)[part.begin][end] == pytest.approx(listed[eot], rel=1e-5)


@pytest.mark.parametrize("kinds", TRANSLATIONS, ids=" to ".join)
def test_a_content_that_both_templates_trim_to_nothing_has_a_target_for_its_end_of_turn_only(
    kinds: tuple[Kind, Kind],
) -> None:
    one = case(["How many?", " \n"], ("llama3", "gemma"), kinds)
    result = one.aligned()
    assert np.flatnonzero(result.target.valid).tolist() == [chat_tokens(one.student, one.student.spans[0]).begin]
    assert result.report.num_bytes == 0


def test_rows_may_begin_at_any_position_before_the_first_span() -> None:
    one = case(["How many?", SENTENCE], ("llama3", "chatml"), ("sentencepiece", "byte_level"))
    late = chat_tokens(one.teacher, one.teacher.spans[0]).begin + len(one.teacher.prefix)
    rows = one.rows
    part = slice(late - rows.start, None)
    cut = Rows(late, rows.ids[part], rows.logprobs[part], rows.actual[part], rows.tail[part])
    expected, target = one.aligned().target, one._replace(rows=cut).aligned().target
    for name in ("offsets", "ids", "probs", "tail", "valid"):
        np.testing.assert_array_equal(getattr(target, name), getattr(expected, name))
    part = slice(late + 1 - rows.start, None)
    cut = Rows(late + 1, rows.ids[part], rows.logprobs[part], rows.actual[part], rows.tail[part])
    with pytest.raises(AlignmentError, match="sample chat, message 1, teacher tiny: expected rows from token"):
        one._replace(rows=cut).aligned()


def test_rows_of_other_tokens_are_an_error() -> None:
    one = case(["How many?", SENTENCE], ("llama3", "chatml"), ("sentencepiece", "byte_level"))
    short = Rows(1, one.rows.ids[:-1], one.rows.logprobs[:-1], one.rows.actual[:-1], one.rows.tail[:-1])
    with pytest.raises(AlignmentError, match="sample chat, teacher tiny: expected rows up to position"):
        one._replace(rows=short).aligned()


def test_renderings_of_two_different_chats_are_an_error() -> None:
    one = case(["How many?", SENTENCE], ("llama3", "chatml"), ("byte_level", "byte_level"))
    other = case(["How many?", "None."], ("llama3", "chatml"), ("byte_level", "byte_level"))
    with pytest.raises(ChatError, match="message 1, tiny and tiny: the contents differ, b'Fifty.*b'None"):
        one._replace(student=other.student).aligned()


def test_a_merged_system_message_does_not_shift_the_pairing_of_spans() -> None:
    messages = chat("How many?", SENTENCE, system="Be brief.")
    teacher, student = (
        chat_template(TEMPLATES["gemma"]).render(messages),
        chat_template(TEMPLATES["chatml"]).render(messages),
    )
    rows = random_rows(np.array(teacher.sequence), len(chat_vocabulary("byte_level")), 8, seed=1, start=1)
    result = align_chat(rows, teacher, student, TRANSLATIONS["byte_level", "byte_level"])
    assert (teacher.folded_system, student.folded_system) == (True, False)
    np.testing.assert_array_equal(result.target.valid, result.supervised_T)


def test_the_first_token_of_a_sequence_has_no_row() -> None:
    text = "{% for m in messages | reverse %}{{ m.content }}{{ eos_token }}{% endfor %}"
    rendered = chat_template(text).render(chat("x", "six sacks"))
    part = chat_tokens(rendered, rendered.spans[0])
    assert part.begin == 0
    assert part.straddles
    rows = random_rows(np.array(rendered.sequence), len(chat_vocabulary("byte_level")), 8, seed=1, start=1)
    result = align_chat(rows, rendered, rendered, TRANSLATIONS["byte_level", "byte_level"])
    assert not result.target.valid[0]
    assert result.target.valid[1 : part.stop].all()


@given(contents=TURNS)
def test_inputs_are_not_modified(contents: list[str]) -> None:
    one = case(contents, ("mistral", "chatml"), ("sentencepiece", "byte_level"))
    arrays: list[NDArray[np.generic]] = [one.rows.ids, one.rows.logprobs, one.rows.actual, one.teacher.tokens.ends]
    arrays += [one.student.tokens.ids, one.student.tokens.ends, one.translation.tokens, one.translation.offsets]
    before = [a.copy() for a in arrays]
    one.aligned()
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(a, b)


# Translation of ends of turn


@pytest.mark.parametrize("kinds", TRANSLATIONS, ids=" to ".join)
def test_only_the_end_of_turn_changes_in_the_translation(kinds: tuple[Kind, Kind]) -> None:
    plain, eot = TRANSLATIONS[kinds], id_of("<|eot|>", kinds[0])
    changed = with_end_of_turn(plain, eot, id_of("<end_of_turn>", kinds[1]))
    for i in range(len(plain.pieces)):
        words = [t.tokens[t.offsets[i] : t.offsets[i + 1]].tolist() for t in (plain, changed)]
        assert words[1] == ([id_of("<end_of_turn>", kinds[1])] if i == eot else words[0])
        assert changed.first[i] == (words[1] or [NONE])[0]
    eos = chat_vocabulary(kinds[0]).roles["eos"]
    assert changed.first[eos] == chat_vocabulary(kinds[1]).roles["eos"]


def test_a_translation_that_maps_the_end_of_turn_already_is_returned_unchanged() -> None:
    same = TRANSLATIONS["byte_level", "byte_level"]
    assert with_end_of_turn(same, id_of("<|eot|>"), id_of("<|eot|>")) is same


def test_an_end_of_turn_with_bytes_is_translated_as_a_special_token() -> None:
    same = TRANSLATIONS["byte_level", "sentencepiece"]
    the = chat_vocabulary("byte_level").token_bytes.index(b" the")
    changed = with_end_of_turn(same, the, 1)
    assert same.pieces[the] == b" the"
    assert changed.pieces[the] is None
    assert changed.tokens[changed.offsets[the] : changed.offsets[the + 1]].tolist() == [1]


def test_a_normalizer_masks_as_many_positions_of_a_chat_as_of_a_text() -> None:
    """A teacher that lower-cases gives no target for the rest of an upper-case word, in a chat as in a text."""
    content = "the HARBOUR office and The Letters"
    teacher, student = vocabulary_of("wordpiece"), vocabulary_of("byte_level")
    translation = translate(teacher, student)
    plain = "{% for m in messages %}{{ m.role }}\n{{ m.content }}{% endfor %}"
    files = {"chat_template.jinja": plain.encode()}
    messages = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": content}]
    teacher_chat, student_chat = (
        ChatTemplate.from_files(files, v, v.name).render(messages) for v in (teacher, student)
    )
    rows = random_rows(np.array(teacher_chat.sequence), len(teacher), 12, seed=3, start=1)
    chat = align_chat(rows, teacher_chat, student_chat, translation)
    text = teacher.encode(content), student.encode(content)
    alone = align(random_rows(text[0].ids, len(teacher), 12, seed=3), 0, *text, translation)
    assert chat.target.valid.sum() <= alone.valid.sum()
    one_hot = chat.target.prob_of(student_chat.tokens.ids)[chat.target.valid] > 0.999
    assert one_hot.mean() < 0.3
