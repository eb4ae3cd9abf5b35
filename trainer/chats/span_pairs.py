"""Pairs of equal text in a teacher's and in the student's rendering of one chat.

The teacher's scores can be aligned only where both renderings have the same text. A span is cut into segments: its
parts, the text of the template in front of each part, and the text after the last part. Segments of the same name with
equal bytes form a pair, and adjacent pairs are joined. If two templates render a whole turn alike, the result is one
pair. If only the contents are equal, the result is one pair for each content. Pairs are also cut after special tokens,
which have no bytes; a special token ends a pair in the same way as the end of turn.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import RenderedChat, Span, token_range

Reason = Literal["omitted", "different", "boundary"]
"""Why a supervised position has no target: the teacher's template omits the part, or renders it or the text around it
differently, or a token contains text of both sides of a boundary."""

_Segments = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class SpanPair:
    """Two spans whose texts are equal up to white space at their ends, in the teacher's and in the student's chat."""

    teacher: Span
    student: Span


@dataclass(frozen=True)
class PairedSpan:
    """The pairs of one span of the student, in order, and the bytes [start, stop) without a pair, with the reason."""

    pairs: tuple[SpanPair, ...]
    unpaired: tuple[tuple[int, int, Reason], ...]


def pair_spans(teacher: RenderedChat, a: Span | None, student: RenderedChat, b: Span) -> PairedSpan:
    """Pair the student's span `b` with the teacher's span `a` of the same message. `a` is None if the teacher has none.

    Raises ChatError if the contents differ in more than white space at their ends.
    """
    if a is None:
        return PairedSpan((), ((b.start, b.stop, "omitted"),))
    ours, theirs = _segments(b), _segments(a)
    pairs, unpaired = list[SpanPair](), list[tuple[int, int, Reason]]()
    is_joinable = False  # whether the next equal segment continues the last pair
    for name, (start, stop) in ours.items():
        if name not in theirs:
            is_omitted = name in ("reasoning", "content", "tool_calls", "tool_result")
            unpaired.append((start, stop, "omitted" if is_omitted else "different"))
            is_joinable = is_joinable and start == stop
            continue
        begin, end = theirs[name]
        texts = teacher.tokens.text[begin:end], student.tokens.text[start:stop]
        if texts[0] == texts[1]:
            if is_joinable and (pairs[-1].teacher.stop, pairs[-1].student.stop) == (begin, start):
                pairs[-1] = SpanPair(replace(pairs[-1].teacher, stop=end), replace(pairs[-1].student, stop=stop))
            else:
                pairs.append(SpanPair(Span(a.message, begin, end, None), Span(b.message, start, stop, None)))
            is_joinable = True
            continue
        is_joinable = False
        if name in ("reasoning", "content") and texts[0].decode().strip() == texts[1].decode().strip():
            pairs.append(SpanPair(Span(a.message, begin, end, None), Span(b.message, start, stop, None)))
        elif name == "content":
            raise ChatError(
                f"sample {student.sample}, message {b.message}, {teacher.name} and {student.name}: the contents "
                f"differ, {texts[0][:60]!r} and {texts[1][:60]!r}"
            )
        else:
            unpaired.append((start, stop, "different"))
    if is_joinable and pairs and (pairs[-1].teacher.stop, pairs[-1].student.stop) == (a.stop, b.stop):
        last = pairs[-1]
        pairs[-1] = SpanPair(
            replace(last.teacher, end_of_turn=a.end_of_turn), replace(last.student, end_of_turn=b.end_of_turn)
        )
    cut = [each for pair in pairs for each in _cut(teacher, student, pair)]
    return PairedSpan(tuple(cut), tuple(unpaired))


def _segments(span: Span) -> _Segments:
    """Return the bytes of the parts of a span and of the template's text around them, by name."""
    segments: _Segments = {}
    at = span.start
    for part in span.parts:
        segments[f"before {part.kind}"] = (at, part.start)
        segments[part.kind] = (part.start, part.stop)
        at = part.stop
    segments["end"] = (at, span.stop)
    return {
        name: each for name, each in segments.items() if each[0] < each[1] or not name.startswith(("before", "end"))
    }


def _cut(teacher: RenderedChat, student: RenderedChat, pair: SpanPair) -> Iterator[SpanPair]:
    """Cut a pair of equal texts at the special tokens in either of them."""
    a, b = pair.teacher, pair.student
    tokens = _special_tokens(teacher, a), _special_tokens(student, b)
    if not tokens[0] and not tokens[1]:
        yield pair
        return
    at = 0
    for start, stop in sorted({*tokens[0], *tokens[1]}):
        if start < at:
            continue
        ids = [
            each.get((start, stop), _token_at(chat, span.start + start, span.start + stop))
            for each, chat, span in zip(tokens, (teacher, student), (a, b), strict=True)
        ]
        is_shared = None not in ids
        yield SpanPair(
            Span(a.message, a.start + at, a.start + start, ids[0] if is_shared else None),
            Span(b.message, b.start + at, b.start + start, ids[1] if is_shared else None),
        )
        at = stop
    yield SpanPair(replace(a, start=a.start + at), replace(b, start=b.start + at))


def _special_tokens(chat: RenderedChat, span: Span) -> dict[tuple[int, int], int]:
    """Return the ids of the special tokens in a span, by their bytes relative to its start."""
    begin, end, _ = token_range(chat.tokens, span.start, span.stop)
    inside = begin + np.flatnonzero(chat.special_T[begin:end])
    places = [(max(int(chat.tokens.ends[i - 1]) if i else 0, span.start), int(chat.tokens.ends[i])) for i in inside]
    return {
        (start - span.start, stop - span.start): int(chat.tokens.ids[i])
        for i, (start, stop) in zip(inside, places, strict=True)
    }


def _token_at(chat: RenderedChat, start: int, stop: int) -> int | None:
    """Return the id of the token that has exactly these bytes; None if there is no such token."""
    begin, end, is_whole = token_range(chat.tokens, start, stop)
    starts = int(chat.tokens.ends[begin - 1]) if begin else 0
    return int(chat.tokens.ids[begin]) if is_whole and end - begin == 1 and starts == start else None
