"""Alignment of one chat: from a teacher's rows for its rendering to a target over the student's rendering.

Only texts that both renderings have in common (trainer/chats/span_pairs.py) are aligned, each separately: from the
first byte at which both models begin a token to the last byte at which both models end one. A token that contains text
of the template and of the content (Mistral's space before an assistant content) covers bytes that the other rendering
does not have; it is left out and counted as masked. The teacher's end of turn is translated to the student's, although
the two tokens differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from alignment import AlignmentError, Target, Tokens, Translation, align
from alignment.byte_chain import ScoredRows
from alignment.offsets import INSIDE
from alignment.report import AlignmentReport, report
from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import RenderedChat, Span, SpanTokens, chat_tokens, supervised_mask
from trainer.chats.span_pairs import Reason, SpanPair, pair_spans

Align = Callable[[ScoredRows, int, Tokens, Tokens, Translation], Target]


class ChatRows(ScoredRows, Protocol):
    """A teacher's rows from position `start` of `RenderedChat.sequence` to its end."""

    @property
    def start(self) -> int: ...


@dataclass(frozen=True)
class SpanCounts:
    """Counts of one span.

    message      index of the message
    positions    student tokens of the span, with its end of turn
    aligned      positions that have a target
    end_of_turn  whether the last aligned position is the end of turn
    unaligned    positions without a target, by reason
    """

    message: int
    positions: int
    aligned: int
    end_of_turn: bool
    unaligned: Mapping[Reason, int]

    @property
    def masked(self) -> int:
        return self.positions - self.aligned


@dataclass(frozen=True, eq=False)
class ChatTarget:
    """A target over all tokens of the student's rendering, valid at supervised positions only.

    supervised_T  positions that the student's cross-entropy counts, with or without a target
    report        sums over the aligned texts; its `positions` also counts positions of spans that are not aligned
    """

    target: Target
    supervised_T: NDArray[np.bool_]
    spans: tuple[SpanCounts, ...]
    report: AlignmentReport


class _Stretch(NamedTuple):
    """The tokens of one model for consecutive bytes of a span. `begin` is the index of the first token in the chat."""

    tokens: Tokens
    begin: int


@dataclass(frozen=True, eq=False)
class _RowSlice:
    ids: NDArray[np.integer]
    logprobs: NDArray[np.floating]
    actual: NDArray[np.floating]


class _AlignedPair(NamedTuple):
    """The target of one pair of spans.

    begin  index of the first aligned token in the student's rendering
    end    index of the student's end of turn if it has a target, else −1
    """

    begin: int
    target: Target
    end: int
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
    by_message = {span.message: span for span in teacher.spans}
    supervised_T = supervised_mask(student)
    aligned: list[_AlignedPair] = []
    counts: list[SpanCounts] = []
    for span in student.spans:
        paired = pair_spans(teacher, by_message.get(span.message), student, span)
        of_span = [
            _align_pair((teacher, student), pair, (rows, first_row), translation, align) for pair in paired.pairs
        ]
        counts.append(_count(student, span, of_span, paired.unpaired))
        aligned += of_span
    figures = sum((pair.report for pair in aligned), AlignmentReport())
    return ChatTarget(
        target=_scatter([(pair.begin, pair.target) for pair in aligned], len(student.tokens)),
        supervised_T=supervised_T,
        spans=tuple(counts),
        report=replace(figures, positions=sum(span.positions for span in counts)),
    )


def _count(
    student: RenderedChat, span: Span, aligned: Sequence[_AlignedPair], unpaired: Sequence[tuple[int, int, Reason]]
) -> SpanCounts:
    """Count the positions of one span with a target and, by reason, those without."""
    tokens = chat_tokens(student, span)
    valid_T = np.zeros(len(student.tokens), dtype=bool)
    for pair in aligned:
        valid_T[pair.begin : pair.begin + len(pair.target)] |= pair.target.valid
    missing = ~valid_T[tokens.begin : tokens.stop]
    ends = student.tokens.ends[tokens.begin : tokens.stop]
    unaligned: dict[Reason, int] = {}
    for start, stop, reason in unpaired:
        inside = missing & (ends > start) & (ends <= stop)
        unaligned[reason] = unaligned.get(reason, 0) + int(inside.sum())
        missing &= ~inside
    unaligned["boundary"] = int(missing.sum())
    return SpanCounts(
        message=span.message,
        positions=len(tokens.tokens),
        aligned=int(valid_T[tokens.begin : tokens.stop].sum()),
        end_of_turn=bool(aligned) and tokens.closes and aligned[-1].end == tokens.stop - 1,
        unaligned={reason: count for reason, count in unaligned.items() if count},
    )


def _align_pair(
    chats: tuple[RenderedChat, RenderedChat],
    pair: SpanPair,
    response: tuple[ChatRows, int],
    translation: Translation,
    align: Align,
) -> _AlignedPair:
    """Align one pair. `response` is the teacher's rows and the index of the token that the first row predicts."""
    teacher, student = chats
    tokens = chat_tokens(teacher, pair.teacher), chat_tokens(student, pair.student)
    if not translation.is_identity:
        tokens = (
            _exclude_added_space(tokens[0], translation.pieces),
            _exclude_added_space(tokens[1], translation.student.token_bytes),
        )
    where = f"sample {teacher.sample}, message {pair.teacher.message}"
    stretches, closes = _shared_stretch(*tokens, f"{where}, {teacher.name} and {student.name}")
    teacher_part, student_part = stretches
    if pair.teacher.end_of_turn is not None and pair.student.end_of_turn is not None:
        translation = with_end_of_turn(translation, pair.teacher.end_of_turn, pair.student.end_of_turn)
    target, figures = Target.empty(len(student_part.tokens)), AlignmentReport()
    if len(teacher_part.tokens) and len(student_part.tokens):
        part = _slice_rows(response, teacher_part, f"{where}, teacher {teacher.name}")
        target = align(part, 0, teacher_part.tokens, student_part.tokens, translation)
        figures = report(part, 0, (teacher_part.tokens, student_part.tokens), target, translation)
    end = student_part.begin + len(student_part.tokens) - 1 if closes else -1
    return _AlignedPair(student_part.begin, target, end, figures)


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
    """Return a translation that maps the teacher's token `teacher_id` to the single student token `student_id`.

    A translation that already does so is returned unchanged.
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
    """Combine targets, each with the index of its first token, into one that is invalid at all other positions."""
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
