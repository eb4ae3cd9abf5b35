"""Explanations of an alignment: consistent with teacher rows and target, and printed readably."""

import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from alignment import align, translate
from teachers.protocol.rows import Rows
from tests.alignment.toy_world import bpe
from tests.rows import random_rows
from tests.tiny import TEXT, tiny_vocabulary
from trainer.cli.__main__ import app
from trainer.cli.explain_alignment import NO_BOS, ExplainedPosition, explain, show, token_name, visible

BYTE_LEVEL, SENTENCEPIECE = tiny_vocabulary("byte_level"), tiny_vocabulary("sentencepiece")
TO_BYTE_LEVEL, SAME = translate(SENTENCEPIECE, BYTE_LEVEL), translate(BYTE_LEVEL, BYTE_LEVEL)
ALL = 10**6
SOME_TEXT = st.lists(st.sampled_from([*TEXT.split(), " ", "\n", "é", "😀", "日本"]), min_size=1).map("".join)


def explained(text: str, *, top_k: int = 16, first_row: int = 0, top: int = 3) -> list[ExplainedPosition]:
    teacher, student = SENTENCEPIECE.encode(text), BYTE_LEVEL.encode(text)
    rows = random_rows(teacher.ids, len(SENTENCEPIECE), top_k, seed=len(text), start=first_row)
    return explain(rows, first_row, (teacher, student), TO_BYTE_LEVEL, limit=ALL, top=top)


@given(text=SOME_TEXT, first_row=st.integers(0, 1), top_k=st.integers(1, 40))
def test_target_and_both_tails_sum_to_one_where_valid(text: str, first_row: int, top_k: int) -> None:
    for position in explained(text, top_k=top_k, first_row=first_row, top=ALL):
        total = sum(token.prob for token in position.target) + position.teacher_tail + position.alignment_tail
        assert total == pytest.approx(float(position.valid), abs=1e-5)
        assert min(position.teacher_tail, position.alignment_tail) >= 0
        assert position.valid == (not position.reason)


@given(text=SOME_TEXT)
def test_positions_blocks_and_tokens_cover_the_text_in_order(text: str) -> None:
    positions = explained(text)
    assert [e.position for e in positions] == list(range(len(positions)))
    assert [e.actual.id for e in positions] == BYTE_LEVEL.encode(text).ids.tolist()
    blocks = {e.block: e.teacher_rows for e in positions if e.index_in_block == 0}
    assert list(blocks) == list(range(len(blocks)))
    assert [row.actual.id for rows in blocks.values() for row in rows] == SENTENCEPIECE.encode(text).ids.tolist()


def test_identical_tokenizers_add_no_tail() -> None:
    tokens = BYTE_LEVEL.encode(TEXT)
    rows = random_rows(tokens.ids, len(BYTE_LEVEL), 200, seed=1)
    for position in explain(rows, 0, (tokens, tokens), SAME, limit=ALL):
        (row,) = position.teacher_rows
        assert position.alignment_tail == pytest.approx(0, abs=1e-6)
        assert position.teacher_tail == pytest.approx(row.tail, abs=1e-6)
        assert position.actual.prob == pytest.approx(row.actual.prob, rel=1e-5)
        assert [token.id for token in position.target] == [token.id for token in row.candidates]


def test_a_block_of_two_and_two_by_hand() -> None:
    """Teacher ab·c, student a·bc: [ab] 0.8 [a] 0.1, tail 0.1; then [c] 0.5 [a] 0.3, tail 0.2."""
    teacher, student = bpe("abc", "a+b"), bpe("abc", "b+c")
    tokens = (teacher.encode("abc"), student.encode("abc"))
    rows = Rows(
        start=0,
        ids=np.array([[3, 0], [2, 0]], dtype=np.uint32),
        logprobs=np.log(np.array([[0.8, 0.1], [0.5, 0.3]], dtype=np.float32)),
        actual=np.log(np.array([0.8, 0.5], dtype=np.float32)),
        tail=np.array([0.1, 0.2], dtype=np.float32),
    )
    one, two = explain(rows, 0, tokens, translate(teacher, student))
    assert {row.actual.token: row.actual.prob for row in one.teacher_rows} == pytest.approx({"ab": 0.8, "c": 0.5})
    assert one.target[0].token == "a"
    assert one.target[0].prob == pytest.approx(0.1 + 0.8 * (0.5 + 0.3))
    assert (one.teacher_tail, one.alignment_tail) == pytest.approx((0.1 + 0.8 * 0.2, 0), abs=1e-6)
    reached = 0.1 + 0.8 * 0.8
    assert {entry.token: entry.prob for entry in two.target} == pytest.approx(
        {"bc": 0.4 / reached, "b": 0.24 / reached}, rel=1e-5
    )
    assert (two.teacher_tail, two.alignment_tail) == pytest.approx(
        (0, 0.1 / reached), abs=1e-6
    )  # the teacher candidate [a] ends before bc


def test_the_first_position_without_bos_has_a_reason() -> None:
    first, *_ = explained("six sacks", first_row=1)
    assert (first.valid, first.reason, first.target, first.teacher_rows) == (False, NO_BOS, (), ())


def test_the_target_equals_that_of_align_and_limits_apply() -> None:
    teacher, student = SENTENCEPIECE.encode(TEXT), BYTE_LEVEL.encode(TEXT)
    rows = random_rows(teacher.ids, len(SENTENCEPIECE), 16, seed=2)
    target = align(rows, 0, teacher, student, TO_BYTE_LEVEL)
    limited = explain(rows, 0, (teacher, student), TO_BYTE_LEVEL, limit=11, top=2)
    assert len(limited) == 11
    assert all(len(e.target) <= 2 and all(len(row.candidates) == 2 for row in e.teacher_rows) for e in limited)
    np.testing.assert_allclose([e.actual.prob for e in limited], target.prob_of(student.ids)[:11])
    assert explain(rows, 0, (teacher, student), TO_BYTE_LEVEL, limit=ALL, top=2)[:11] == limited


# --- printing ---


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b" the", "␣the"),
        (b"\n\t", "\\n\\t"),
        (b"\x1b[31m", "\\u{1b}[31m"),
        ("日本".encode(), "日本"),
        ("日".encode()[:2], "\\xe6\\x97"),
        ("\u202e\u200d\u00a0".encode(), "\\u{202e}\\u{200d}\\u{a0}"),
        ("\u0301".encode(), "◌\u0301"),
        ("␣\\".encode(), "\\u{2423}\\\\"),
    ],
)
def test_bytes_are_printed_visibly(data: bytes, shown: str) -> None:
    assert visible(data) == shown


@given(
    st.lists(st.one_of(st.binary(max_size=4), st.text(" ␣◌\\x\u0301u{}a0", max_size=5).map(str.encode)), unique=True)
)
def test_different_bytes_are_printed_differently_and_on_one_line(tokens: list[bytes]) -> None:
    shown = [visible(token) for token in tokens]
    assert len(set(shown)) == len(shown)
    assert all(line.isprintable() and not any(c.isspace() for c in line) for line in shown)


def test_special_and_unassigned_tokens_have_names() -> None:
    assert token_name(BYTE_LEVEL, BYTE_LEVEL.roles["eos"]) == "«<|eos|>»"
    assert token_name(BYTE_LEVEL, len(BYTE_LEVEL) + 3) == f"«{len(BYTE_LEVEL) + 3}»"


@pytest.mark.parametrize("text", ["[bold]six[/bold] sacks", "日本語の文章です😀", "e\u0301\u0301 \x1b[31m", TEXT])
@pytest.mark.parametrize("width", [60, 120])
def test_the_table_fits_its_width_and_shows_every_token(text: str, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    positions = explained(text)
    show(positions, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(cell_len, printed.splitlines())) <= width
    assert "\x1b" not in printed
    shown = [line.split()[:2] for line in printed.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert [[str(e.position), e.actual.token] for e in positions] == shown


# --- the command ---


def test_align_explains_the_first_positions_through_all_windows(
    tmp_path: Path, tiny_sentencepiece: Path, tiny_byte_level: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = [
        "align",
        "--teacher",
        tiny_sentencepiece,
        "--student",
        tiny_byte_level,
        "--text",
        tmp_path / "text.txt",
    ]
    arguments += ["--explain", "--window-tokens", 20]
    result = CliRunner().invoke(app, [str(a) for a in [*arguments, "--positions", 30, "--json"]])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)["positions"]
    assert [e["position"] for e in printed] == list(range(30))
    assert "".join(e["actual"]["token"] for e in printed).startswith("The␣harbour␣office")
    assert all(0 <= after["block"] - before["block"] <= 1 for before, after in pairwise(printed))
    shown = CliRunner().invoke(app, [str(a) for a in arguments])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.split()[:4] == ["student", "teacher", "target", "tail"]


def test_the_worked_example_of_the_documentation(tmp_path: Path, gemma: Path, smollm2: Path) -> None:
    """opot·amus and opotam·us are one block; the candidate 'am' ends before the student token 'us'."""
    (tmp_path / "text.txt").write_text("The largest animal in the river is the hippopotamus.\n", encoding="utf-8")
    arguments = [
        "align",
        "--teacher",
        gemma,
        "--student",
        smollm2,
        "--text",
        tmp_path / "text.txt",
        "--explain",
        "--json",
    ]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    first, second = (e for e in json.loads(result.stdout)["positions"] if len(e["teacher_rows"]) == 2)
    opot, amus = first["teacher_rows"]
    am_prob = next(entry["prob"] for entry in amus["candidates"] if entry["token"] == "am")
    text_prob = opot["actual"]["prob"] * amus["actual"]["prob"]
    ended_prob = opot["actual"]["prob"] * am_prob
    assert [first["actual"]["token"], second["actual"]["token"]] == ["opotam", "us"]
    reached = first["actual"]["prob"]  # other candidates that start with the same bytes add up to 3e-3
    assert text_prob + ended_prob - 2e-4 < reached < text_prob + ended_prob + 3e-3
    assert second["actual"]["prob"] == pytest.approx(text_prob / reached, abs=2e-4)
    assert second["alignment_tail"] == pytest.approx(ended_prob / reached, abs=2e-4)
