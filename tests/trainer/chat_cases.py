"""Chats rendered with the templates of a teacher and a student, with random teacher rows, for chat alignment."""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from alignment import Target, Translation, translate
from teachers.protocol.rows import Rows
from tests.rows import random_rows
from tests.templates import TEMPLATES, chat, chat_template, chat_vocabulary
from tests.tiny import TEXT, Kind
from trainer.chats.chat_alignment import ChatTarget, align_chat
from trainer.chats.rendered_chat import RenderedChat

KINDS: tuple[Kind, ...] = ("byte_level", "sentencepiece")
TRANSLATIONS = {(a, b): translate(chat_vocabulary(a), chat_vocabulary(b)) for a, b in product(KINDS, KINDS)}
CONTENT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<["), max_size=20),
    st.lists(
        st.sampled_from([*TEXT.split()[:30], " ", "\n", "  ", "é", "😀", "日本", "", "assistant"]), max_size=6
    ).map("".join),
)
TURNS = st.lists(st.tuples(CONTENT, CONTENT.filter(bool)), min_size=1, max_size=3).map(
    lambda turns: [c for turn in turns for c in turn]
)
SENTENCE = "Fifty-one sacks, and one of them is wet."


class Case(NamedTuple):
    """A chat rendered by teacher and student, the teacher's rows, and the translation between the vocabularies."""

    rows: Rows
    teacher: RenderedChat
    student: RenderedChat
    translation: Translation

    def aligned(self, **options: Any) -> ChatTarget:
        """Align the teacher's rows to the student's rendering."""
        return align_chat(self.rows, self.teacher, self.student, self.translation, **options)

    @property
    def first_row(self) -> int:
        """Position of the first teacher row, relative to the first token after the prefix."""
        return 1 - len(self.teacher.prefix)


def case(contents: list[str], templates: tuple[str, str], kinds: tuple[Kind, Kind], top_k: int = 12) -> Case:
    """Build a case; templates and tokenizer kinds are those of the teacher and of the student."""
    teacher, student = (
        chat_template(TEMPLATES[t], k).render(chat(*contents)) for t, k in zip(templates, kinds, strict=True)
    )
    vocab_size = len(chat_vocabulary(kinds[0]))
    rows = random_rows(np.array(teacher.sequence), vocab_size, top_k, seed=len(teacher.text), start=1)
    return Case(rows, teacher, student, TRANSLATIONS[kinds])


def rows_of(target: Target) -> list[dict[int, float]]:
    """Return each row of a target as probabilities by token id."""
    slices = [slice(a, b) for a, b in zip(target.offsets, target.offsets[1:], strict=False)]
    return [dict(zip(target.ids[s].tolist(), target.probs[s].tolist(), strict=True)) for s in slices]
