"""Alignment of chats with reasoning and tool calls: texts that both templates render alike have targets, others not."""

import numpy as np
import pytest
from numpy.typing import NDArray

from alignment import translate
from tests.rows import random_rows
from tests.templates import (
    CHATML,
    QWEN,
    TOOLS,
    chat,
    chat_template,
    chat_vocabulary,
    spec_of,
    vocabulary_of,
    with_tokens,
)
from tests.tiny import Kind
from tests.trainer.test_supervision import CALL, RESULT, TOOL_CHAT, USER, assistant
from trainer.chats.chat_alignment import ChatTarget, align_chat
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.config import SupervisionConfig
from trainer.chats.rendered_chat import RenderedChat

COUNT = SupervisionConfig(changed_content="count")
QWEN_WITH_OTHER_CALLS = QWEN.replace("<tool_call>\n", "<call>").replace("\n</tool_call>", "</call>")


def aligned(teacher: RenderedChat, student: RenderedChat, kinds: tuple[Kind, Kind]) -> ChatTarget:
    vocabularies = chat_vocabulary(kinds[0]), chat_vocabulary(kinds[1])
    rows = random_rows(np.array(teacher.sequence), len(vocabularies[0]), 12, seed=1, start=1)
    return align_chat(rows, teacher, student, translate(*vocabularies))


def text_of(student: RenderedChat, positions_T: NDArray[np.bool_]) -> str:
    """Return the text of the chosen tokens."""
    starts = np.concatenate([[0], student.tokens.ends[:-1]])
    chosen = [(int(starts[i]), int(student.tokens.ends[i])) for i in np.flatnonzero(positions_T)]
    return b"".join(student.tokens.text[start:stop] for start, stop in chosen).decode()


@pytest.mark.parametrize("kinds", [("byte_level", "byte_level"), ("sentencepiece", "byte_level")])
def test_turns_that_both_templates_render_alike_have_targets_everywhere(kinds: tuple[Kind, Kind]) -> None:
    teacher, student = (chat_template(QWEN, kind).render(TOOL_CHAT) for kind in kinds)
    result = aligned(teacher, student, kinds)
    np.testing.assert_array_equal(result.target.valid, result.supervised_T)
    assert [(span.masked, dict(span.unaligned), span.end_of_turn) for span in result.spans] == [(0, {}, True)] * 2


def test_reasoning_that_the_teacher_drops_has_no_target_and_the_content_has_one() -> None:
    messages = [USER, assistant("14.5 kilograms.", reasoning_content="It is wet.")]
    teacher = chat_template(CHATML, supervision=COUNT).render(messages)
    student = chat_template(QWEN).render(messages)
    result = aligned(teacher, student, ("byte_level", "byte_level"))
    assert text_of(student, result.target.valid) == "14.5 kilograms.<|im_end|>"
    unaligned = result.supervised_T & ~result.target.valid
    assert text_of(student, unaligned) == "<think>\nIt is wet.\n</think>\n\n"
    (span,) = result.spans
    assert sum(span.unaligned.values()) == span.masked == unaligned.sum()
    assert span.unaligned["omitted"] == len(chat_vocabulary("byte_level").encode("It is wet."))


def test_tool_calls_in_another_syntax_have_no_target() -> None:
    messages = [USER, assistant("Let me see.", tool_calls=[CALL]), RESULT, assistant("14.5 kilograms.")]
    teacher, student = (chat_template(text).render(messages) for text in (QWEN_WITH_OTHER_CALLS, QWEN))
    result = aligned(teacher, student, ("byte_level", "byte_level"))
    valid = text_of(student, result.target.valid)
    assert valid.startswith("Let me see.")
    assert valid.endswith("14.5 kilograms.<|im_end|>")
    assert "weigh" not in valid
    assert result.spans[0].unaligned["different"] > 0
    assert not result.spans[0].end_of_turn


def test_a_turn_that_the_teacher_does_not_supervise_has_no_target() -> None:
    messages = chat("a", "six sacks", "b", "seven")
    text = CHATML.replace("m.content", "m.content | replace('six', '6')")
    teacher = chat_template(text, supervision=COUNT).render(messages)
    student = chat_template(CHATML).render(messages)
    result = aligned(teacher, student, ("byte_level", "byte_level"))
    assert text_of(student, result.target.valid) == "seven<|im_end|>"
    assert result.spans[0].unaligned["omitted"] == result.spans[0].positions - 1
    assert result.supervised_T.sum() == sum(span.positions for span in result.spans)


def test_special_tokens_within_a_turn_correspond_if_both_models_write_them_as_one_token() -> None:
    """`<think>` is special for the teacher, and a token or several ordinary tokens for the student."""
    special = vocabulary_of(with_tokens(spec_of("byte_level"), ["<think>", "</think>"]), "byte_level")
    ordinary = chat_vocabulary("byte_level")
    messages = [USER, assistant("One.", reasoning_content="It is wet.")]
    teacher = ChatTemplate.from_files({}, special, "special", template=QWEN).render(messages)
    rows = random_rows(np.array(teacher.sequence), len(special), 12, seed=1, start=1)
    for vocabulary, missing in ((special, ""), (ordinary, "<think></think>")):
        student = ChatTemplate.from_files({}, vocabulary, "student", template=QWEN).render(messages)
        result = align_chat(rows, teacher, student, translate(special, vocabulary))
        assert text_of(student, result.supervised_T & ~result.target.valid) == missing
        assert result.spans[0].end_of_turn


def test_a_template_with_calls_as_plain_text_aligns_with_itself() -> None:
    messages = [USER, assistant("", tool_calls=[CALL]), RESULT, assistant("So.")]
    rendered = chat_template(TOOLS).render(messages)
    result = aligned(rendered, rendered, ("byte_level", "byte_level"))
    np.testing.assert_array_equal(result.target.valid, result.supervised_T)
