"""Alignment of one chat: from a teacher's rows for its rendering to a target over the student's rendering.

The two renderings have only the contents in common, so that each content is aligned separately: from the first byte at
which both models begin a token to the last byte at which both models end one. A token that contains text of the
template and of the content (Mistral's space before an assistant content) covers bytes that the other rendering does
not have; it is left out and counted as masked. The teacher's end of turn is translated to the student's, although the
two tokens differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from alignment import AlignmentError, Target, Tokens, Translation, align
from alignment.byte_chain import ScoredRows
from alignment.offsets import INSIDE
from alignment.report import AlignmentReport, report
from trainer.chats.chat_template import RenderedChat, Span, SpanTokens, chat_tokens, supervised_mask
from trainer.chats.jinja_template import ChatError

Align = Callable[[ScoredRows, int, Tokens, Tokens, Translation], Target]


class ChatRows(ScoredRows, Protocol):
    """A teacher's rows from position `start` of `RenderedChat.sequence` to its end."""

    @property
    def start(self) -> int: ...


@dataclass(frozen=True)
class SpanCounts:
    """Counts of one span.

    message      index of the message
    positions    student tokens that contain the content or end the turn
    aligned      positions that have a target
    end_of_turn  whether the last aligned position is an end of turn
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
    """A target over all tokens of the student's rendering, valid at supervised positions only.

    supervised_T  positions that the student's cross-entropy counts, with or without a target
    report        figures over the aligned stretches; `positions` counts all positions of the spans
    """

    target: Target
    supervised_T: NDArray[np.bool_]
    spans: tuple[SpanCounts, ...]
    report: AlignmentReport


class _Stretch(NamedTuple):
    """The tokens of one model for a stretch of bytes; `begin` is the index of the first one in the rendered chat."""

    tokens: Tokens
    begin: int


@dataclass(frozen=True, eq=False)
class _RowSlice:
    ids: NDArray[np.integer]
    logprobs: NDArray[np.floating]
    actual: NDArray[np.floating]


class _RenderedSpan(NamedTuple):
    """One span in the rendering of one model."""

    rendered: RenderedChat
    span: Span


class _AlignedSpan(NamedTuple):
    """The target of one span's shared stretch, which begins at token `begin` of the student's rendering."""

    begin: int
    target: Target
    counts: SpanCounts
    report: AlignmentReport


def align_chat(
    rows: ChatRows, teacher: RenderedChat, student: RenderedChat, translation: Translation, align: Align = align
) -> ChatTarget:
    """Convert a teacher's rows for a chat into a target over the student's rendering of the same chat.

    rows         rows of teacher.sequence, from a position before its first span to its end
    translation  from the teacher's vocabulary to the student's; this function adds the ends of turns
    Raises AlignmentError if the rows do not belong to the teacher's tokens, ChatError if the renderings are not of
    the same chat.
    """
    first_row = rows.start - len(teacher.prefix)
    if first_row + len(rows.actual) != len(teacher.tokens):
        raise AlignmentError(
            f"sample {teacher.sample}, teacher {teacher.name}: expected rows up to position {len(teacher.sequence)}, "
            f"received {len(rows.actual)} rows from position {rows.start}"
        )
    if [s.message for s in teacher.spans] != [s.message for s in student.spans]:
        raise ChatError(
            f"sample {teacher.sample}: {teacher.name} supervises messages {[s.message for s in teacher.spans]}, "
            f"{student.name} {[s.message for s in student.spans]}: expected two renderings of the same chat"
        )
    spans = [
        _align_span(_RenderedSpan(teacher, a), _RenderedSpan(student, b), (rows, first_row), translation, align)
        for a, b in zip(teacher.spans, student.spans, strict=True)
    ]
    figures = sum((span.report for span in spans), AlignmentReport())
    return ChatTarget(
        target=_scatter([(span.begin, span.target) for span in spans], len(student.tokens)),
        supervised_T=supervised_mask(student),
        spans=tuple(span.counts for span in spans),
        report=replace(figures, positions=sum(span.counts.positions for span in spans)),
    )


def _align_span(
    teacher: _RenderedSpan,
    student: _RenderedSpan,
    response: tuple[ChatRows, int],
    translation: Translation,
    align: Align,
) -> _AlignedSpan:
    """Align one span. `response` is the teacher's rows and the index of the token that the first row predicts."""
    tokens = chat_tokens(*teacher), chat_tokens(*student)
    if not translation.is_identity:
        tokens = (
            _exclude_added_space(tokens[0], translation.pieces),
            _exclude_added_space(tokens[1], translation.student.token_bytes),
        )
    where = f"sample {teacher.rendered.sample}, message {teacher.span.message}"
    pair, closes = _shared_stretch(*tokens, f"{where}, {teacher.rendered.name} and {student.rendered.name}")
    teacher_part, student_part = pair
    if teacher.span.end_of_turn is not None and student.span.end_of_turn is not None:
        translation = with_end_of_turn(translation, teacher.span.end_of_turn, student.span.end_of_turn)
    target, figures = Target.empty(len(student_part.tokens)), AlignmentReport()
    if len(teacher_part.tokens) and len(student_part.tokens):
        part = _slice_rows(response, teacher_part, f"{where}, teacher {teacher.rendered.name}")
        target = align(part, 0, teacher_part.tokens, student_part.tokens, translation)
        figures = report(part, 0, (teacher_part.tokens, student_part.tokens), target, translation)
    counts = SpanCounts(teacher.span.message, len(tokens[1].tokens), int(target.valid.sum()), closes)
    return _AlignedSpan(student_part.begin, target, counts, figures)


def _slice_rows(response: tuple[ChatRows, int], stretch: _Stretch, where: str) -> _RowSlice:
    """Return the rows that predict the tokens of a stretch. Raises AlignmentError if the rows begin after it."""
    rows, first_row = response
    begin = stretch.begin - first_row
    if begin < 0:
        raise AlignmentError(
            f"{where}: expected rows from token {stretch.begin} of its rendering or before, received rows from token "
            f"{first_row}"
        )
    part = slice(begin, begin + len(stretch.tokens))
    return _RowSlice(rows.ids[part], rows.logprobs[part], rows.actual[part])


def _exclude_added_space(side: SpanTokens, token_bytes: Sequence[bytes | None]) -> SpanTokens:
    """Exclude a first token whose bytes differ from the content's: its tokenizer puts a space in front of the content.

    The other candidates at this position begin with that space too, and the other rendering has no such space. The
    token is excluded in the same way as a token that straddles the beginning of the content.
    """
    end = int(side.tokens.ends[0]) if len(side.tokens) > side.closes else INSIDE
    is_literal = end == INSIDE or token_bytes[side.tokens.ids[0]] == side.tokens.text[:end]
    return side if is_literal else replace(side, straddles=True)


def _shared_stretch(teacher: SpanTokens, student: SpanTokens, label: str) -> tuple[tuple[_Stretch, _Stretch], bool]:
    """Return the longest stretch of bytes at whose ends both models have a token boundary, in the tokens of each.

    The second value tells whether the stretch includes the end of turn. One of the templates may strip white space
    from the content, so that positions are compared within the stripped content. Raises ChatError if the contents
    differ in more than white space at their ends.
    """
    teacher_text, student_text = teacher.tokens.text, student.tokens.text
    common = teacher_text if teacher_text == student_text else teacher_text.decode().strip().encode()
    if teacher_text != student_text and common != student_text.decode().strip().encode():
        raise ChatError(f"{label}: the contents differ, {teacher_text[:60]!r} and {student_text[:60]!r}")
    # Byte offset of the common text in each content.
    starts = [
        len(text) - len(text.decode().lstrip().encode()) if common != text else 0
        for text in (teacher_text, student_text)
    ]
    (bytes_a, indices_a), (bytes_b, indices_b) = (
        _token_boundaries(side, start, len(common)) for side, start in zip((teacher, student), starts, strict=True)
    )
    shared, in_a, in_b = np.intersect1d(bytes_a, bytes_b, return_indices=True)
    if not len(shared):
        return (_stretch(teacher, (0, 0), (0, 0), False), _stretch(student, (0, 0), (0, 0), False)), False
    # With white space stripped on one side only, the end of turn follows different texts.
    closes = teacher_text == student_text and teacher.closes and student.closes
    first, last = int(shared[0]), int(shared[-1])
    a, b = indices_a[in_a[[0, -1]]], indices_b[in_b[[0, -1]]]
    return (
        _stretch(teacher, (int(a[0]), int(a[1])), (starts[0] + first, starts[0] + last), closes),
        _stretch(student, (int(b[0]), int(b[1])), (starts[1] + first, starts[1] + last), closes),
    ), closes


def _token_boundaries(side: SpanTokens, start: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the token boundaries within the common text, which begins at byte `start` of the content.

    The first array holds byte offsets in the common text, the second the number of the span's tokens before each. The
    beginning of the content is a boundary unless the first token straddles it.
    """
    content_ends = side.tokens.ends[: len(side.tokens) - side.closes]
    ends = np.concatenate([[INSIDE if side.straddles else 0], content_ends])
    index = np.flatnonzero((ends >= start) & (ends <= start + length))
    return ends[index] - start, index


def _stretch(side: SpanTokens, tokens: tuple[int, int], data: tuple[int, int], closes: bool) -> _Stretch:
    """Return the tokens [first, last) of a span with its bytes [start, stop); with `closes`, also the end of turn."""
    (first, last), (start, stop) = tokens, data
    return _Stretch(side.tokens.excerpt(slice(first, last + closes), start, stop), side.begin + first)


@lru_cache(maxsize=64)
def with_end_of_turn(translation: Translation, teacher_id: int, student_id: int) -> Translation:
    """Return the translation that maps the teacher's token `teacher_id` to the special token `student_id` alone.

    Return the translation itself if it does so already.
    """
    begin, end = translation.offsets[teacher_id : teacher_id + 2].tolist()
    if translation.pieces[teacher_id] is None and translation.tokens[begin:end].tolist() == [student_id]:
        return translation
    # The entry of teacher_id changes from end - begin student tokens to one; all later entries move accordingly.
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


def _scatter(stretches: Sequence[tuple[int, Target]], num_positions: int) -> Target:
    """Combine the targets of disjoint stretches, in order of `begin`, into one target; it is invalid between them."""
    counts = np.zeros(num_positions + 1, dtype=np.int64)
    tail, valid = np.zeros(num_positions, dtype=np.float32), np.zeros(num_positions, dtype=bool)
    for begin, target in stretches:
        where = slice(begin, begin + len(target))
        counts[begin + 1 : begin + 1 + len(target)] = np.diff(target.offsets)
        tail[where], valid[where] = target.tail, target.valid
    return Target(
        offsets=np.cumsum(counts),
        ids=np.concatenate([target.ids for _, target in stretches]),
        probs=np.concatenate([target.probs for _, target in stretches]),
        tail=tail,
        valid=valid,
    )
