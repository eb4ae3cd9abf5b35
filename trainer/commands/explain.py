"""`tutelage align --explain`: what the teacher said at each place of a text, and where alignment put it."""

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
from alignment.chain import chained
from teachers.rows import Rows

SPACE, CARRIER = "␣", "◌"
SMALL = 5e-4  # smaller numbers are printed as powers of ten
ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", " ": SPACE}
CAPTION = "First of each list: the token that stands there. Tail: not listed by the teacher + not placed by alignment."
UNSPOKEN = "the teacher saw no BOS: it says nothing of its first token"
CHANGED = "the teacher's tokenizer drops or changes these bytes: it says nothing of them"


@dataclass(frozen=True)
class Share:
    """A token as `visible` writes it, and its probability."""

    id: int
    token: str
    prob: float


@dataclass(frozen=True)
class Spoken:
    """What the teacher said of one of its tokens.

    actual      the token that stands there
    listed      whether it is among the K candidates
    candidates  the likeliest few of the K
    tail        probability of everything else than the K and the actual token
    """

    actual: Share
    listed: bool
    candidates: tuple[Share, ...]
    tail: float


@dataclass(frozen=True)
class Explained:
    """One student position.

    actual        the student token that stands there, with its probability in the target
    block, place  which block of the text it belongs to, and its place in it from 0
    spoken        the teacher's answers for all of the block's tokens, the same at each of its places
    target        the likeliest few student tokens of the target
    teacher_tail  tail because the teacher did not list it, weighted by the probability of the text up to there
    added_tail    tail because alignment cannot place it: a branch that ends here, or one not followed further
    valid, why    whether the position has a target, and if not, why
    """

    position: int
    actual: Share
    block: int
    place: int
    spoken: tuple[Spoken, ...]
    target: tuple[Share, ...]
    teacher_tail: float
    added_tail: float
    valid: bool
    why: str = ""


def explain(
    rows: Rows,
    first_row: int,
    tokens: tuple[Tokens, Tokens],
    translation: Translation,
    *,
    limit: int = 40,
    top: int = 3,
) -> list[Explained]:
    """Explain the first `limit` positions of the target that `align` makes of a teacher's rows.

    tokens  the teacher's and the student's tokenization of one text
    top     candidates and target tokens to keep
    Raises AlignmentError as `align` does.
    """
    teacher, student = tokens
    alignment = chained(rows, first_row, teacher, student, translation)
    target, cuts = alignment.target, alignment.cuts
    said = _said(rows, teacher.ids[first_row:], translation.teacher, top)
    right = target.prob_of(student.ids)
    out = []
    for s in range(min(limit, len(student))):
        b = int(np.searchsorted(cuts.student, s, side="right")) - 1
        begin, stop = (max(int(t) - first_row, 0) for t in cuts.teacher[b : b + 2])
        place, valid, tail = s - int(cuts.student[b]), bool(target.valid[s]), float(target.tail[s])
        # a later place is conditioned on the branches that begin like the text: what was not listed is not among them
        unlisted = _unlisted(said[begin:stop]) / (1 + alignment.carried[b]) if valid and place == 0 else 0.0
        unlisted = min(unlisted, tail)
        out.append(
            Explained(
                position=s,
                actual=_share(translation.student, int(student.ids[s]), float(right[s])),
                block=b,
                place=place,
                spoken=tuple(said[begin:stop]),
                target=_likeliest(target, s, translation.student, top),
                teacher_tail=unlisted,
                added_tail=tail - unlisted,
                valid=valid,
                why="" if valid else UNSPOKEN if begin == 0 and first_row else CHANGED,
            )
        )
    return out


def _said(rows: Rows, actual_ids: NDArray[np.int64], vocabulary: Vocabulary, top: int) -> list[Spoken]:
    """Every row in words."""
    out = []
    probs, actual = np.exp(rows.logprobs.astype(np.float64)), np.exp(rows.actual.astype(np.float64))
    for ids, prob, token, chance in zip(rows.ids.tolist(), probs, actual_ids.tolist(), actual.tolist(), strict=True):
        listed = token in ids
        tail = 1.0 - float(prob.sum()) - (0.0 if listed else chance)
        candidates = (_share(vocabulary, i, p) for i, p in zip(ids[:top], prob[:top].tolist(), strict=True))
        out.append(Spoken(_share(vocabulary, token, chance), listed, tuple(candidates), max(tail, 0.0)))
    return out


def _unlisted(said: Sequence[Spoken]) -> float:
    """The tails of a block's rows, each weighted by the probability of the block's text before it."""
    total, before = 0.0, 1.0
    for row in said:
        total += before * row.tail
        before *= row.actual.prob
    return total


def _likeliest(target: Target, position: int, vocabulary: Vocabulary, top: int) -> tuple[Share, ...]:
    row = slice(int(target.offsets[position]), int(target.offsets[position + 1]))
    entries = sorted(
        zip(target.probs[row].tolist(), target.ids[row].tolist(), strict=True), key=lambda e: (-e[0], e[1])
    )
    return tuple(_share(vocabulary, i, prob) for prob, i in entries[:top])


def _share(vocabulary: Vocabulary, i: int, prob: float) -> Share:
    return Share(i, token_name(vocabulary, i), prob)


def token_name(vocabulary: Vocabulary, i: int) -> str:
    """What a token writes, made visible; a token without text by its name in «», or by its id where it has none."""
    data = vocabulary.token_bytes[i] if i < len(vocabulary) else None
    if data is not None:
        return visible(data)
    return f"«{visible((vocabulary.tokens[i] if i < len(vocabulary) else '').encode()) or i}»"


def visible(data: bytes) -> str:
    """Bytes on one line: spaces as ␣, controls and invisible characters escaped, bytes of half a character as \\xNN."""
    return "".join(map(_visible, data.decode(errors="surrogateescape")))


def _visible(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if character in ESCAPES:
        return ESCAPES[character]
    if category[0] in "CZ" or character in (SPACE, CARRIER):
        return f"\\u{{{code:x}}}"
    return CARRIER + character if category[0] == "M" else character


# --- printing ---


def show(explained: Sequence[Explained], console: Console | None = None) -> None:
    """One table, blocks apart; what the teacher said of a block stands at its first place."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=CAPTION, caption_justify="left")
    for name in ("", "student", "the teacher said", "target", "tail"):
        table.add_column(name, justify="right" if name in ("", "tail") else "left")
    for here, following in zip(explained, [*explained[1:], None], strict=True):
        ends = following is None or following.block != here.block
        table.add_row(*_cells(here), end_section=ends)
    (console or Console(highlight=False)).print(table)


def _cells(here: Explained) -> Iterator[Text]:
    yield Text(str(here.position))
    yield Text(here.actual.token, style="bold")
    yield Text("\n").join(_row(spoken) for spoken in here.spoken) if here.place == 0 else Text("")
    if not here.valid:
        yield Text(here.why, style="red")
        yield Text("")
        return
    yield _shares(here.actual, here.target)
    yield Text(f"{here.teacher_tail:.3f}+{here.added_tail:.3f}")


def _row(spoken: Spoken) -> Text:
    text = _shares(spoken.actual, spoken.candidates)
    return text if spoken.listed else text + Text("  (unlisted)")


def _shares(actual: Share, likeliest: Iterable[Share]) -> Text:
    """The actual token in bold, then the others; one word each, so that lines break between them."""
    others = [Text(f"{share.token}:{_number(share.prob)}") for share in likeliest if share.id != actual.id]
    return Text("  ").join([Text(f"{actual.token}:{_number(actual.prob)}", style="bold"), *others])


def _number(prob: float) -> str:
    return f"{prob:.3f}" if prob >= SMALL or prob == 0 else f"{prob:.0e}"
