"""How much of a teacher's knowledge arrives, for every ordered pair of the real tokenizers in tests/zoo.py.

`python -m benchmarks.tokenizers [--json FILE] [--write docs/tokenizers.md]` prints three tables, writes a flat
{name: figure} and replaces the tables between the markers of the page. Per pair: coverage, the share of the student's
positions with a valid target; mass, their mean listed probability; untranslated, the share of the teacher's ids without
a counterpart among the student's tokens. It takes nine minutes on one core.

Models exist for two of the tokenizers only, so only the rows of Gemma 3 270M are those of a model. It scores the text
(K = 64, after BOS). For every other teacher its rows are aligned to that teacher's tokenizer and cut to K = 64 again.
If Gemma's alignment has no target for a token of that tokenizer (see Gemma's row of the first table), the row is
artificial: the token of the text with probability 1/2, the rest in the tail.
"""

import argparse
import asyncio
import inspect
import json
import json.decoder
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import NDArray

from alignment import AlignmentError, Target, Tokens, Vocabulary, align, translate
from alignment.byte_chain import ScoredRows
from alignment.kernels import NONE
from teachers.engines.transformers import TransformersEngine
from teachers.protocol.rows import Rows
from teachers.protocol.wire_format import as_received
from tests.zoo import ZOO, prepare_zoo

SCORER = "gemma-3-270m"
TOP_K = 64
ARTIFICIAL_PROB = 0.5  # of a token for which the scorer's alignment has no target
BEGIN, END = "<!-- tables: python -m benchmarks.tokenizers --write docs/tokenizers.md -->", "<!-- end of tables -->"
SCRIPTS = (
    "中文的分词没有空格，每个字都可能是一个词。\n"
    "日本語では漢字とひらがな、カタカナが混ざります。\n"
    "한국어는 음절을 모아 씁니다.\n"
    "تُكتب العربية من اليمين إلى اليسار.\n"
    "שָׁלוֹם, עברית נכתבת מימין לשמאל.\n"
    "हिन्दी देवनागरी लिपि में लिखी जाती है।\n"
    "Русский текст пишут кириллицей.\n"
    "Größe, naïve, Façade, São Tomé, e\u0301te\u0301, ﬁne, Ĳssel, ①②, ２０２６\n"
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽 😀😀\n"
    "3.14159265358979 1,000,000 0x7F 2026-11-21T08:30:00Z\n"
    "a  b   c    d     e        f\n"
    "\tone tab\t\ttwo tabs\r\n"
    "CRLF ends this line\r\n\r\n"
    "wide\u3000space, no\u00a0break, zero\u200bwidth, ▁mark, <s>not special</s>\n"
    "end with blanks   \n"
)


@dataclass(frozen=True)
class Figures:
    """Figures of one ordered pair, from 0 to 1; mass is nan if no position is valid."""

    coverage: float
    mass: float
    untranslated: float


def mixed_text() -> str:
    """Return prose and code from the documentation and source of this Python, then many scripts."""
    return topics["execmodel"][:700] + "\n" + inspect.getsource(json.decoder)[:700] + "\n" + SCRIPTS


def scorer_rows(folder: Path, tokens: Tokens) -> Rows:
    """Return the scorer's rows for every token, as a client receives them; BOS precedes the first token."""
    engine = TransformersEngine(folder)
    try:
        sequence = engine.card.prefix + tokens.ids.tolist()
        if len(sequence) == len(tokens):
            raise AlignmentError(f"expected {SCORER} to begin with BOS, its card has none")
        return as_received(asyncio.run(engine.score(sequence, 1, TOP_K)), sequence, engine.card)
    finally:
        engine.close()


def rows_of_target(target: Target, tokens: Tokens) -> Rows:
    """Convert a target to rows of a teacher: the TOP_K most probable ids, the actual token, the tail."""
    cut, actual = target.cut(TOP_K), np.where(target.valid, target.prob_of(tokens.ids), ARTIFICIAL_PROB)
    if not actual.all():
        raise AlignmentError(f"expected token {int(np.argmin(actual))} of the text in its row, it is not listed")
    listed = [
        (cut.ids[begin:end], cut.probs[begin:end]) if valid else (tokens.ids[i : i + 1], np.array([ARTIFICIAL_PROB]))
        for i, (valid, begin, end) in enumerate(zip(cut.valid, cut.offsets[:-1], cut.offsets[1:], strict=True))
    ]
    filled = [_filled(*row) for row in listed]
    probs = np.stack([row_probs for _, row_probs in filled])
    with np.errstate(divide="ignore"):
        return Rows(
            start=0,
            ids=np.stack([ids for ids, _ in filled]).astype(np.uint32),
            logprobs=np.log(probs).astype(np.float32),
            actual=np.log(actual).astype(np.float32),
            tail=np.maximum(1 - probs.sum(axis=1), 0).astype(np.float32),
        )


def _filled(ids: NDArray[np.integer], probs: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return a row of TOP_K entries: the most probable first, then other ids with probability 0."""
    order = np.argsort(-probs, kind="stable")
    others = np.setdiff1d(np.arange(2 * TOP_K), ids)[: TOP_K - len(ids)]
    return np.concatenate([ids[order], others]), np.concatenate([probs[order], np.zeros(len(others))])


def compare(rows: ScoredRows, text: str, teacher: Vocabulary, student: Vocabulary) -> tuple[Figures, Target]:
    """Align the rows of one teacher to one student."""
    translation = translate(teacher, student)
    target = align(rows, 0, teacher.encode(text), student.encode(text), translation)
    valid = target.valid
    return Figures(
        coverage=float(valid.mean()),
        mass=float(target.mass[valid].mean()) if valid.any() else math.nan,
        untranslated=float((translation.first == NONE).mean()),
    ), target


def measure(folders: Mapping[str, Path]) -> dict[tuple[str, str], Figures]:
    """Measure every ordered pair, those of the scorer first: the rows of the others are made from its targets."""
    text = mixed_text()
    vocabularies = {name: Vocabulary.load(folder) for name, folder in folders.items()}
    rows: dict[str, Rows] = {SCORER: scorer_rows(folders[SCORER], vocabularies[SCORER].encode(text))}
    figures = {}
    for teacher in [SCORER, *(name for name in folders if name != SCORER)]:
        for student in folders:
            figures[teacher, student], target = compare(
                rows[teacher], text, vocabularies[teacher], vocabularies[student]
            )
            if teacher == SCORER != student:
                rows[student] = rows_of_target(target, vocabularies[student].encode(text))
    return figures


def flat(figures: Mapping[tuple[str, str], Figures]) -> dict[str, float]:
    """Return {"tokenizers_TEACHER_to_STUDENT_coverage": …, and the same for mass and untranslated}, to six digits."""
    return {
        _key(teacher, student, field): round(value, 6)
        for (teacher, student), pair in figures.items()
        for field, value in vars(pair).items()
    }


def _key(teacher: str, student: str, field: str) -> str:
    return f"tokenizers_{teacher}_to_{student}_{field}"


def tables(figures: Mapping[str, float]) -> str:
    """Format flat figures as tables of coverage, mass and untranslated ids in per cent: teachers × students."""
    titles = {
        "coverage": "Coverage: % of the student's positions that have a target",
        "mass": "Mass: mean % of probability that is listed, where there is a target",
        "untranslated": "Untranslated: % of the teacher's ids without a counterpart in the student",
    }
    return "\n".join(f"**{title}**\n\n{_table(figures, field)}" for field, title in titles.items())


def _table(figures: Mapping[str, float], field: str) -> str:
    names = [entry.name for entry in ZOO]
    lines = ["| teacher ↓ student → | " + " | ".join(str(i + 1) for i in range(len(names))) + " |"]
    lines.append("|---|" + "--:|" * len(names))
    for i, teacher in enumerate(names):
        cells = (percentage(figures[_key(teacher, student, field)]) for student in names)
        lines.append(f"| {i + 1} {teacher} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def percentage(share: float) -> str:
    """Format a share with one decimal; 0 and 100 only if it is exactly that."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f}"
    return "<0.1" if share < 0.001 else ">99.9" if share > 0.999 else f"{100 * share:.1f}"


def with_tables(page: str, new_tables: str) -> str:
    """Replace the tables of a page. Raises ValueError if it does not have each marker once, in order."""
    before, *rest = page.split(BEGIN)
    if len(rest) != 1 or rest[0].count(END) != 1:
        raise ValueError(f"expected the markers {BEGIN!r} and {END!r} in the page, each once and in this order")
    return f"{before}{BEGIN}\n{new_tables}{END}{rest[0].split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", type=Path, help="replace the tables of this page")
    arguments = parser.parse_args()
    if arguments.write:
        with_tables(arguments.write.read_text(encoding="utf-8"), "")  # fail before minutes of work
    figures = flat(measure(prepare_zoo(_log)))
    sys.stdout.write(tables(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.write:
        page = with_tables(arguments.write.read_text(encoding="utf-8"), tables(figures))
        arguments.write.write_text(page, encoding="utf-8")


def _log(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
