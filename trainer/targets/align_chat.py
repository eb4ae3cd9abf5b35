"""From a teacher's rows for its writing of a chat to a target over the student's writing of the same chat.

The writings differ in everything but the contents, so each content is aligned for itself, from the first byte at which
both models begin a token to the last at which both end one. A token that the template's text and the content share
(Mistral's space before an answer) tells of bytes that the other side does not have: it is left out, and counted.
End of turn speaks for end of turn, whatever the tokens are called.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from alignment import AlignmentError, Target, Tokens, Translation, align
from alignment.chain import Rows
from alignment.report import AlignmentReport, report
from alignment.spans import INSIDE
from trainer.data.chat import Rendered, Span, SpanTokens, chat_tokens, supervised_mask
from trainer.data.template import ChatError

Align = Callable[[Rows, int, Tokens, Tokens, Translation], Target]


class ChatRows(Rows, Protocol):
    """A teacher's answer from position `start` of `Rendered.sequence` to its end."""

    @property
    def start(self) -> int: ...


@dataclass(frozen=True)
class SpanCounts:
    """What arrived of one span: `aligned` of the `positions` (tokens that hold its content or end its turn in the
    student's rendering) have a target; `end_of_turn` says whether the last of them is an end of turn.
    """

    message: int
    positions: int
    aligned: int
    end_of_turn: bool

    @property
    def masked(self) -> int:
        return self.positions - self.aligned


@dataclass(frozen=True, eq=False)
class ChatTarget:
    """A target over all of the student's tokens; it is valid in supervised positions only.

    supervised_T  the positions that the student's own loss on the text counts, aligned or not
    report        over the aligned stretches; its positions are all supervised ones
    """

    target: Target
    supervised_T: NDArray[np.bool_]
    spans: tuple[SpanCounts, ...]
    report: AlignmentReport


class _Part(NamedTuple):
    """Tokens of a shared stretch of bytes, and the index of the first of them in the rendered chat."""

    tokens: Tokens
    begin: int


@dataclass(frozen=True, eq=False)
class _RowSlice:
    ids: NDArray[np.integer]
    logprobs: NDArray[np.floating]
    actual: NDArray[np.floating]


def align_chat(
    rows: ChatRows, teacher: Rendered, student: Rendered, translation: Translation, align: Align = align
) -> ChatTarget:
    """Turn a teacher's rows for one chat into a target over the student's writing of it.

    rows         for teacher.sequence, from before its first span to its end
    translation  from the teacher's vocabulary to the student's; ends of turn are added to it here
    Raises AlignmentError if the rows are not those of the teacher's tokens, ChatError if the two are not one chat.
    """
    first_row = rows.start - len(teacher.prefix)
    if first_row + len(rows.actual) != len(teacher.tokens):
        raise AlignmentError(
            f"sample {teacher.sample}, teacher {teacher.name}: expected rows up to position {len(teacher.sequence)}, "
            f"received {len(rows.actual)} from position {rows.start}"
        )
    if [s.message for s in teacher.spans] != [s.message for s in student.spans]:
        raise ChatError(
            f"sample {teacher.sample}: {teacher.name} supervises messages {[s.message for s in teacher.spans]}, "
            f"{student.name} {[s.message for s in student.spans]}: render one chat with both"
        )
    spans = [
        _align_span(_Side(teacher, a), _Side(student, b), (rows, first_row), translation, align)
        for a, b in zip(teacher.spans, student.spans, strict=True)
    ]
    figures = sum((span.report for span in spans), AlignmentReport())
    return ChatTarget(
        target=_spread([(span.begin, span.target) for span in spans], len(student.tokens)),
        supervised_T=supervised_mask(student),
        spans=tuple(span.counts for span in spans),
        report=replace(figures, positions=sum(span.counts.positions for span in spans)),
    )


class _Aligned(NamedTuple):
    """The target of one span's shared stretch, which begins at token `begin` of the student's."""

    begin: int
    target: Target
    counts: SpanCounts
    report: AlignmentReport


class _Side(NamedTuple):
    """One span as one model writes it."""

    rendered: Rendered
    span: Span


def _align_span(
    teacher: _Side, student: _Side, answer: tuple[ChatRows, int], translation: Translation, align: Align
) -> _Aligned:
    tokens = chat_tokens(*teacher), chat_tokens(*student)
    if not translation.is_identity:
        tokens = _literal(tokens[0], translation.pieces), _literal(tokens[1], translation.student.token_bytes)
    where = f"sample {teacher.rendered.sample}, message {teacher.span.message}"
    (spoken, heard), closes = _shared(*tokens, f"{where}, {teacher.rendered.name} and {student.rendered.name}")
    if teacher.span.end_of_turn is not None and student.span.end_of_turn is not None:
        translation = with_end_of_turn(translation, teacher.span.end_of_turn, student.span.end_of_turn)
    target, figures = Target.nothing(len(heard.tokens)), AlignmentReport()
    if len(spoken.tokens) and len(heard.tokens):
        (rows, first_row), begin = answer, spoken.begin - answer[1]
        if begin < 0:
            raise AlignmentError(
                f"{where}, teacher {teacher.rendered.name}: expected rows from token {spoken.begin} of its rendering "
                f"or before, received them from token {first_row}"
            )
        part = slice(begin, begin + len(spoken.tokens))
        those = _RowSlice(rows.ids[part], rows.logprobs[part], rows.actual[part])
        target = align(those, 0, spoken.tokens, heard.tokens, translation)
        figures = report(those, 0, (spoken.tokens, heard.tokens), target, translation)
    counts = SpanCounts(teacher.span.message, len(tokens[1].tokens), int(target.valid.sum()), closes)
    return _Aligned(heard.begin, target, counts, figures)


def _literal(side: SpanTokens, token_bytes: Sequence[bytes | None]) -> SpanTokens:
    """A first token that writes other bytes than the content's (a space of the tokenizer's own in front of it) is
    left out like one that straddles: the candidates beside it begin with that space, the other side's do not.
    """
    end = int(side.tokens.ends[0]) if len(side.tokens) > side.closes else INSIDE
    literal = end == INSIDE or token_bytes[side.tokens.ids[0]] == side.tokens.text[:end]
    return side if literal else replace(side, straddles=True)


def _shared(teacher: SpanTokens, student: SpanTokens, names: str) -> tuple[tuple[_Part, _Part], bool]:
    """Both sides of the longest stretch that both can begin and end, and whether it ends with the end of turn."""
    written, read = teacher.tokens.text, student.tokens.text
    core = written if written == read else written.decode().strip().encode()
    if written != read and core != read.decode().strip().encode():
        raise ChatError(f"{names}: they write different contents, {written[:60]!r} and {read[:60]!r}")
    starts = [len(text) - len(text.decode().lstrip().encode()) if core != text else 0 for text in (written, read)]
    (at_a, a), (at_b, b) = (_cuts(side, i, len(core)) for side, i in zip((teacher, student), starts, strict=True))
    at, in_a, in_b = np.intersect1d(at_a, at_b, return_indices=True)
    closes = len(at) > 0 and written == read and teacher.closes and student.closes
    if not len(at):
        return (_part(teacher, (0, 0), (0, 0), False), _part(student, (0, 0), (0, 0), False)), False
    first, last = int(at[0]), int(at[-1])
    a, b = a[in_a[[0, -1]]], b[in_b[[0, -1]]]
    return (
        _part(teacher, (int(a[0]), int(a[1])), (starts[0] + first, starts[0] + last), closes),
        _part(student, (int(b[0]), int(b[1])), (starts[1] + first, starts[1] + last), closes),
    ), closes


def _cuts(side: SpanTokens, start: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bytes of the common text, which begins at byte `start` of the content, where one token ends and another may
    begin, with the number of tokens before each.
    """
    content = side.tokens.ends[: len(side.tokens) - side.closes]
    ends = np.concatenate([[INSIDE if side.straddles else 0], content])
    index = np.flatnonzero((ends >= start) & (ends <= start + length))
    return ends[index] - start, index


def _part(side: SpanTokens, tokens: tuple[int, int], data: tuple[int, int], closes: bool) -> _Part:
    """Tokens [first, last) of a span, which write its bytes [start, stop), and the end of turn if they close."""
    (first, last), (start, stop) = tokens, data
    return _Part(side.tokens.part(slice(first, last + closes), start, stop), side.begin + first)


@lru_cache(maxsize=64)
def with_end_of_turn(translation: Translation, teacher_id: int, student_id: int) -> Translation:
    """The translation in which one special token of the teacher speaks for one of the student; else unchanged."""
    begin, end = translation.offsets[teacher_id : teacher_id + 2].tolist()
    if translation.pieces[teacher_id] is None and translation.tokens[begin:end].tolist() == [student_id]:
        return translation
    offsets, first = translation.offsets.copy(), translation.first.copy()
    offsets[teacher_id + 1 :] += 1 - (end - begin)
    first[teacher_id] = student_id
    return replace(
        translation,
        pieces=(*translation.pieces[:teacher_id], None, *translation.pieces[teacher_id + 1 :]),
        offsets=offsets,
        tokens=np.concatenate([translation.tokens[:begin], [student_id], translation.tokens[end:]]).astype(np.int32),
        first=first,
    )


def _spread(parts: Sequence[tuple[int, Target]], num_positions: int) -> Target:
    """The targets of stretches, in order, in one over all positions; nothing is valid between them."""
    counts = np.zeros(num_positions + 1, dtype=np.int64)
    tail, valid = np.zeros(num_positions, dtype=np.float32), np.zeros(num_positions, dtype=bool)
    for begin, target in parts:
        where = slice(begin, begin + len(target))
        counts[begin + 1 : begin + 1 + len(target)] = np.diff(target.offsets)
        tail[where], valid[where] = target.tail, target.valid
    return Target(
        offsets=np.cumsum(counts),
        ids=np.concatenate([target.ids for _, target in parts]),
        probs=np.concatenate([target.probs for _, target in parts]),
        tail=tail,
        valid=valid,
    )
