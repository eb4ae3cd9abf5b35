"""Signal `byte_chain`: rows become a target by byte-chain alignment (alignment/byte_chain.py), for texts and chats."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from alignment import Vocabulary, align, translate
from alignment.report import report
from teachers.protocol.rows import Rows
from trainer.chats.chat_alignment import align_chat
from trainer.records import TokenizedSample
from trainer.signals.base import Prepared


class ByteChainSignal:
    """Translate the teacher's distributions into the student's tokens. A TeacherSignal."""

    fused: ClassVar[bool] = True
    supports_chats: ClassVar[bool] = True
    supports_masked: ClassVar[bool] = True

    def __init__(self, teacher: Vocabulary, student: Vocabulary, vocab_size: int, cache: Path) -> None:
        self._translation = translate(teacher, student, vocab_size, cache=cache)

    def prepare(self, rows: Rows, first_row: int, teacher: TokenizedSample, student: TokenizedSample) -> Prepared:
        """Align one text or chat."""
        if teacher.rendered is not None and student.rendered is not None:
            return self._prepare_chat(rows, first_row, teacher, student)
        tokens = (teacher.tokens, student.tokens)
        target = align(rows, first_row, *tokens, self._translation)
        figures = report(rows, first_row, tokens, target, self._translation)
        return Prepared(target, figures, _supervised_nats(rows, first_row, teacher))

    def _prepare_chat(self, rows: Rows, first_row: int, teacher: TokenizedSample, student: TokenizedSample) -> Prepared:
        assert teacher.rendered is not None
        assert student.rendered is not None
        # row positions count from the beginning of the rendered chat, with the BOS that its template writes
        start = len(teacher.rendered.prefix) + teacher.hidden_bos + first_row
        chat = align_chat(replace(rows, start=start), teacher.rendered, student.rendered, self._translation)
        unaligned = Counter[str]()
        for span in chat.spans:
            unaligned.update({str(reason): count for reason, count in span.unaligned.items()})
        nats = _supervised_nats(rows, first_row, teacher)
        return Prepared(chat.target.from_position(student.hidden_bos), chat.report, nats, unaligned=unaligned)

    def close(self) -> None:
        """Do nothing: the translation is cached when it is built."""


def _supervised_nats(rows: Rows, first_row: int, teacher: TokenizedSample) -> float:
    """Return the mean negative log-likelihood of the teacher's supervised, unmasked tokens; inf if there are none."""
    supervised = rows.actual[teacher.supervised_T[first_row:]]
    known = supervised[~np.isnan(supervised)]
    return -float(known.mean(dtype=float)) if len(known) else math.inf
