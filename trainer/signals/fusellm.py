"""Signals `em` and `min_ed`: alignment as in the FuseLLM paper (arXiv 2401.10491), for comparison. Texts only."""

from pathlib import Path
from typing import ClassVar, Literal

from alignment import Vocabulary, translate
from alignment.fusellm import fusellm_target, token_map
from alignment.report import report
from teachers.protocol.rows import Rows
from trainer.records import TokenizedSample
from trainer.signals.base import Prepared


class _FuseLLMSignal:
    """Map the teacher's tokens to the student's by their strings."""

    fused: ClassVar[bool] = True
    supports_chats: ClassVar[bool] = False
    supports_masked: ClassVar[bool] = False
    method: ClassVar[Literal["em", "min_ed"]]

    def __init__(self, teacher: Vocabulary, student: Vocabulary, vocab_size: int, cache: Path) -> None:
        self._translation = translate(teacher, student, vocab_size, cache=cache)
        self._mapping = token_map(teacher, student, self.method, cache)

    def prepare(self, rows: Rows, first_row: int, teacher: TokenizedSample, student: TokenizedSample) -> Prepared:
        """Align one text."""
        tokens = (teacher.tokens, student.tokens)
        target = fusellm_target(rows, first_row, *tokens, self._mapping)
        figures = report(rows, first_row, tokens, target, self._translation)
        return Prepared(target, figures, -float(rows.actual.mean(dtype=float)))

    def close(self) -> None:
        """Write the token map, which grows while texts are aligned."""
        self._mapping.save()


class ExactMatchSignal(_FuseLLMSignal):
    """Map tokens with equal strings. A TeacherSignal."""

    method = "em"


class MinEditDistanceSignal(_FuseLLMSignal):
    """Map each token to the one with the smallest edit distance. A TeacherSignal."""

    method = "min_ed"
