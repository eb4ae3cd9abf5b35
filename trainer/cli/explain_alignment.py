"""`tutelage align --explain`: the teacher's rows and the aligned target at each position of a text."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignment import Target, Tokens, Translation, Vocabulary
from alignment.byte_chain import align_byte_chain
from teachers.protocol.rows import Rows

SPACE, CARRIER = "␣", "◌"
SMALL = 5e-4  # smaller numbers are printed as powers of ten
ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", " ": SPACE}
CAPTION = "Each list begins with the token of the text. Tail: not listed by the teacher + not placed by the alignment."
NO_BOS = "no BOS in front of the teacher's tokens: the first one has no row"
NORMALIZED = "the teacher's tokenizer drops or changes these bytes: masked"


@dataclass(frozen=True)
class TokenProb:
    """A token, as `visible` writes it, and its probability."""

    id: int
    token: str
    prob: float


@dataclass(frozen=True)
class TeacherRow:
    """The teacher's distribution at one token of the text.

    actual      the token of the text
    listed      whether it is among the K candidates
    candidates  the most probable of the K candidates
    tail        probability of everything but the K candidates and the actual token
    """

    actual: TokenProb
    listed: bool
    candidates: tuple[TokenProb, ...]
    tail: float


@dataclass(frozen=True)
class ExplainedPosition:
    """One student position and its target.

    actual           the student token of the text, with its probability in the target
    block            number of the position's block in the text
    index_in_block   number of the position in its block
    teacher_rows     the teacher's rows for all tokens of the block, the same at each position of the block
    target           the most probable student tokens of the target
    teacher_tail     tail that the teacher did not list, weighted by the probability of the text before it
    alignment_tail   tail that alignment cannot place: a branch ends here or is not followed further
    valid, reason    whether the position has a target, and if not, the reason
    """

    position: int
    actual: TokenProb
    block: int
    index_in_block: int
    teacher_rows: tuple[TeacherRow, ...]
    target: tuple[TokenProb, ...]
    teacher_tail: float
    alignment_tail: float
    valid: bool
    reason: str = ""


def explain(
    rows: Rows,
    first_row: int,
    tokens: tuple[Tokens, Tokens],
    translation: Translation,
    *,
    limit: int = 40,
    top: int = 3,
) -> list[ExplainedPosition]:
    """Explain the first `limit` positions of the target that `align` computes from a teacher's rows.

    tokens  the teacher's and the student's tokenization of one text
    top     number of candidates and of target tokens to keep
    Raises AlignmentError as `align` does.
    """
    teacher, student = tokens
    alignment = align_byte_chain(rows, first_row, teacher, student, translation)
    target, cuts = alignment.target, alignment.cuts
    teacher_rows = _teacher_rows(rows, teacher.ids[first_row:], translation.teacher, top)
    actual_probs = target.prob_of(student.ids)
    explained = []
    for s in range(min(limit, len(student))):
        b = int(np.searchsorted(cuts.student, s, side="right")) - 1
        begin, stop = (max(int(t) - first_row, 0) for t in cuts.teacher[b : b + 2])
        index, valid, tail = s - int(cuts.student[b]), bool(target.valid[s]), float(target.tail[s])
        # Later positions of a block are conditioned on the listed branches: the unlisted probability is not in Z.
        unlisted = _unlisted(teacher_rows[begin:stop]) / (1 + alignment.carried[b]) if valid and index == 0 else 0.0
        unlisted = min(unlisted, tail)
        explained.append(
            ExplainedPosition(
                position=s,
                actual=_token_prob(translation.student, int(student.ids[s]), float(actual_probs[s])),
                block=b,
                index_in_block=index,
                teacher_rows=tuple(teacher_rows[begin:stop]),
                target=_most_probable(target, s, translation.student, top),
                teacher_tail=unlisted,
                alignment_tail=tail - unlisted,
                valid=valid,
                reason="" if valid else NO_BOS if begin == 0 and first_row else NORMALIZED,
            )
        )
    return explained


def _teacher_rows(rows: Rows, actual_ids: NDArray[np.int64], vocabulary: Vocabulary, top: int) -> list[TeacherRow]:
    """Convert rows to token strings and probabilities; `actual_ids` [S] are the tokens of the text."""
    converted = []
    probs, actual = np.exp(rows.logprobs.astype(np.float64)), np.exp(rows.actual.astype(np.float64))
    for ids, prob, token, token_prob in zip(
        rows.ids.tolist(), probs, actual_ids.tolist(), actual.tolist(), strict=True
    ):
        listed = token in ids
        tail = 1.0 - float(prob.sum()) - (0.0 if listed else token_prob)
        candidates = (_token_prob(vocabulary, i, p) for i, p in zip(ids[:top], prob[:top].tolist(), strict=True))
        converted.append(
            TeacherRow(_token_prob(vocabulary, token, token_prob), listed, tuple(candidates), max(tail, 0.0))
        )
    return converted


def _unlisted(rows: Sequence[TeacherRow]) -> float:
    """Return the sum of the rows' tails, each weighted by the probability of the block's text before the row."""
    total, text_prob = 0.0, 1.0
    for row in rows:
        total += text_prob * row.tail
        text_prob *= row.actual.prob
    return total


def _most_probable(target: Target, position: int, vocabulary: Vocabulary, top: int) -> tuple[TokenProb, ...]:
    row = slice(int(target.offsets[position]), int(target.offsets[position + 1]))
    entries = sorted(
        zip(target.probs[row].tolist(), target.ids[row].tolist(), strict=True), key=lambda e: (-e[0], e[1])
    )
    return tuple(_token_prob(vocabulary, i, prob) for prob, i in entries[:top])


def _token_prob(vocabulary: Vocabulary, i: int, prob: float) -> TokenProb:
    return TokenProb(i, token_name(vocabulary, i), prob)


def token_name(vocabulary: Vocabulary, i: int) -> str:
    """Return the bytes of a token in visible form; for a token without bytes, its name or its id in «»."""
    data = vocabulary.token_bytes[i] if i < len(vocabulary) else None
    if data is not None:
        return visible(data)
    return f"«{visible((vocabulary.tokens[i] if i < len(vocabulary) else '').encode()) or i}»"


def visible(data: bytes) -> str:
    """Format bytes on one line: spaces as ␣, invisible characters escaped, bytes of incomplete characters as \\xNN."""
    return "".join(map(_visible, data.decode(errors="surrogateescape")))


def _visible(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not valid UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if character in ESCAPES:
        return ESCAPES[character]
    if category[0] in "CZ" or character in (SPACE, CARRIER):
        return f"\\u{{{code:x}}}"
    return CARRIER + character if category[0] == "M" else character


# --- printing ---


def show(explained: Sequence[ExplainedPosition], console: Console | None = None) -> None:
    """Print one table with a gap between blocks. The teacher's rows are printed at a block's first position."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=CAPTION, caption_justify="left")
    for name in ("", "student", "teacher", "target", "tail"):
        table.add_column(name, justify="right" if name in ("", "tail") else "left")
    for position, following in zip(explained, [*explained[1:], None], strict=True):
        is_last = following is None or following.block != position.block
        table.add_row(*_cells(position), end_section=is_last)
    (console or Console(highlight=False)).print(table)


def _cells(position: ExplainedPosition) -> Iterator[Text]:
    yield Text(str(position.position))
    yield Text(position.actual.token, style="bold")
    yield Text("\n").join(map(_row, position.teacher_rows)) if position.index_in_block == 0 else Text("")
    if not position.valid:
        yield Text(position.reason, style="red")
        yield Text("")
        return
    yield _probs(position.actual, position.target)
    yield Text(f"{position.teacher_tail:.3f}+{position.alignment_tail:.3f}")


def _row(row: TeacherRow) -> Text:
    text = _probs(row.actual, row.candidates)
    return text if row.listed else text + Text("  (unlisted)")


def _probs(actual: TokenProb, tokens: Iterable[TokenProb]) -> Text:
    """Format the actual token in bold, then the others. No item contains a space, so lines break between items."""
    others = [Text(f"{other.token}:{_number(other.prob)}") for other in tokens if other.id != actual.id]
    return Text("  ").join([Text(f"{actual.token}:{_number(actual.prob)}", style="bold"), *others])


def _number(prob: float) -> str:
    return f"{prob:.3f}" if prob >= SMALL or prob == 0 else f"{prob:.0e}"
