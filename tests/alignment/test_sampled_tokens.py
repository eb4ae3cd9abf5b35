"""Sampled tokens: random segmentations of any text after a prompt, by every kind, and a slow reference by blocks."""

from collections.abc import Sequence
from functools import cache
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment import AlignmentError, Target, Tokens
from alignment.sampled_tokens import are_equal, complete_length, num_noncanonical, transfer_target
from alignment.target import target_from_entries
from tests.kinds import KINDS, vocabulary_of
from tests.tiny import TEXT

UNCHANGED = ("byte_level", "sentencepiece", "prefixed")  # tokens write the bytes of every text
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
MIXED_TEXT = st.lists(st.sampled_from([*TEXT.split(), " ", "\n\n", "  ", "é", "▁", "😀", "日本", "x=1;"])).map("".join)
TEXTS = st.one_of(ANY_TEXT, MIXED_TEXT)
EXACT_TEXTS = TEXTS.filter(lambda text: "▁" not in text)  # SentencePiece writes this character as a space
RANDOM = st.randoms(use_true_random=False)


@cache
def ids_by_bytes(kind: str) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {}
    for i, data in enumerate(vocabulary_of(kind).token_bytes):
        if data:
            found.setdefault(data, []).append(i)
    return found


def segmentation(kind: str, text: str, random: Random) -> list[int]:
    """Tokenize a text into random tokens of the vocabulary."""
    data, ids = text.encode(), ids_by_bytes(kind)
    chosen, start, longest = [], 0, max(map(len, ids))
    while start < len(data):
        end = random.choice([e for e in range(start + 1, start + longest + 1) if data[start:e] in ids])
        chosen.append(random.choice(ids[data[start:end]]))
        start = min(end, len(data))
    return chosen


def numbered_target(num_rows: int, gaps: Sequence[int] = ()) -> Target:
    """A target whose row i lists the ids i (probability 1/4), i + 1 and i + 2 (1/8); rows of `gaps` are invalid."""
    rows = np.arange(num_rows)
    valid = ~np.isin(rows, gaps)
    ids = np.stack([rows, rows + 1, rows + 2], axis=1).astype(np.int32)
    return target_from_entries(np.repeat(rows, 3), ids.ravel(), np.tile([0.25, 0.125, 0.125], num_rows), valid)


def rows_of(target: Target) -> list[tuple[bool, float, dict[int, float]]]:
    rows: list[dict[int, float]] = [{} for _ in range(len(target))]
    for row, token, prob in zip(target.rows.tolist(), target.ids.tolist(), target.probs.tolist(), strict=True):
        rows[row][token] = prob
    return list(zip(target.valid.tolist(), target.tail.tolist(), rows, strict=True))


def reference(canonical: Tokens, sampled: Tokens) -> list[int | None]:
    """The canonical token whose row each sampled token has: the first of its block for the first of a block."""
    ends, own_ends = canonical.ends.tolist(), sampled.ends.tolist()
    rows: list[int | None] = []
    begin, own_begin = 0, 0
    for at in sorted(set(ends) & set(own_ends)):
        stop, own_stop = ends.index(at) + 1, own_ends.index(at) + 1
        rows += [begin] + [None] * (own_stop - own_begin - 1)
        begin, own_begin = stop, own_stop
    return rows


def continued(kind: str, prompt: str, ids: Sequence[int], *, close: bool = False) -> Tokens:
    """The tokens of a prompt and of the ids that were sampled after it."""
    vocabulary = vocabulary_of(kind)
    pieces = [vocabulary.token_bytes[i] or b"" for i in ids]
    tokens = vocabulary.encode(prompt).continued(b"".join(pieces), ids, [len(piece) for piece in pieces])
    return tokens.with_end_token(vocabulary.roles["eos"]) if close else tokens


def both(kind: str, prompt: str, text: str, random: Random, close: bool) -> tuple[Tokens, Tokens]:
    """The canonical tokens of a prompt and a text, and those of the prompt with a random segmentation of the text."""
    sampled = continued(kind, prompt, segmentation(kind, text, random), close=close)
    return vocabulary_of(kind).encode(prompt + text, close=close), sampled


@pytest.mark.parametrize("kind", UNCHANGED)
@given(text=EXACT_TEXTS.filter(bool), close=st.booleans())
def test_canonical_ids_are_located_as_by_the_tokenizer(kind: str, text: str, close: bool) -> None:
    canonical = vocabulary_of(kind).encode(text, close=close)
    ids = canonical.ids[: len(canonical) - close].tolist()
    for length in range(1, len(text) + 1):
        start = vocabulary_of(kind).encode(text[:length]).ids.tolist()
        if ids[: len(start)] != start:
            continue
        tokens = continued(kind, text[:length], ids[len(start) :], close=close)
        assert tokens.text == canonical.text
        assert (tokens.placement is None) == (canonical.placement is None)
        for name in ("ids", "ends", "starts", "own_space", "written", "bytes_per_token"):
            received, expected = getattr(tokens, name), getattr(canonical, name)
            np.testing.assert_array_equal(received, expected)
            assert received.dtype == expected.dtype


@pytest.mark.parametrize("kind", UNCHANGED)
@given(prompt=TEXTS.filter(bool), text=TEXTS, random=RANDOM, close=st.booleans())
def test_sampled_tokens_write_the_bytes_between_their_offsets(
    kind: str, prompt: str, text: str, random: Random, close: bool
) -> None:
    vocabulary = vocabulary_of(kind)
    _, tokens = both(kind, prompt, text, random, close)
    data, before = (prompt + text).encode(), vocabulary.encode(prompt)
    assert tokens.text == data
    assert tokens.ids[: len(before)].tolist() == before.ids.tolist()
    spans = zip(tokens.ids, tokens.starts, tokens.ends, strict=True)
    for i, start, end in list(spans)[len(before) :]:
        assert tokens.text[start:end] == (vocabulary.token_bytes[i] or b"")
    assert tokens.ends[-1] == len(data) + close
    assert tokens.own_space.tolist() == before.own_space.tolist() + [False] * (len(tokens) - len(before))


@pytest.mark.parametrize("kind", KINDS)
@given(random=RANDOM, length=st.integers(0, 12))
def test_the_complete_length_is_the_longest_prefix_that_is_text(kind: str, random: Random, length: int) -> None:
    vocabulary, known = vocabulary_of(kind), [i for each in ids_by_bytes(kind).values() for i in each]
    ids = random.choices(known, k=length)
    expected = max(n for n in range(length + 1) if is_text(b"".join(vocabulary.token_bytes[i] or b"" for i in ids[:n])))
    assert complete_length(vocabulary, ids) == expected


def is_text(data: bytes) -> bool:
    try:
        return data.decode() is not None
    except UnicodeDecodeError:
        return False


def test_a_text_is_cut_before_a_character_that_is_not_complete_or_not_valid() -> None:
    vocabulary, ids = vocabulary_of("byte_level"), {b: i[0] for b, i in ids_by_bytes("byte_level").items()}
    a, accented, lone = ids[b"a"], [ids[b"\xc3"], ids[b"\xa9"]], ids[b"\xff"]
    assert complete_length(vocabulary, [a, *accented]) == 3
    assert complete_length(vocabulary, [a, *accented[:1]]) == 1
    assert complete_length(vocabulary, [a, lone, a, a]) == 1
    assert complete_length(vocabulary, []) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_write_no_text_are_rejected_by_name(kind: str) -> None:
    vocabulary, a = vocabulary_of(kind), next(iter(ids_by_bytes(kind).values()))[0]
    end = vocabulary.roles["eos"]
    with pytest.raises(AlignmentError, match=rf"from 0 to {len(vocabulary) - 1}, received {len(vocabulary)} at pos"):
        complete_length(vocabulary, [a, len(vocabulary)])
    with pytest.raises(AlignmentError, match="received -1 at position 0"):
        complete_length(vocabulary, [-1, a])
    with pytest.raises(AlignmentError, match=rf"that write text, received '.*' \(id {end}\) at position 1"):
        complete_length(vocabulary, [a, end])


@pytest.mark.parametrize("kind", UNCHANGED)
@given(prompt=EXACT_TEXTS.filter(bool), text=EXACT_TEXTS, random=RANDOM, close=st.booleans())
def test_transferred_rows_are_those_of_the_first_tokens_of_the_blocks(
    kind: str, prompt: str, text: str, random: Random, close: bool
) -> None:
    canonical, sampled = both(kind, prompt, text, random, close)
    target = numbered_target(len(canonical), gaps=random.sample(range(len(canonical)), len(canonical) // 4))
    before = rows_of(target)
    transferred = transfer_target(target, canonical, sampled)
    rows = reference(canonical, sampled)
    assert rows_of(transferred) == [(False, 0.0, {}) if row is None else before[row] for row in rows]
    assert num_noncanonical(canonical, sampled) == rows.count(None)
    assert are_equal(canonical, sampled) == (canonical.ids.tolist() == sampled.ids.tolist())
    np.testing.assert_array_equal(transferred.mass + transferred.tail, transferred.valid)
    for name in ("offsets", "ids", "probs", "tail", "valid"):
        assert getattr(transferred, name).dtype == getattr(target, name).dtype
    assert rows_of(target) == before  # inputs are not changed


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXTS.filter(bool), random=RANDOM, length=st.integers(0, 20), close=st.booleans())
def test_no_row_is_moved_to_another_byte_and_equal_tokens_keep_their_rows(
    kind: str, prompt: str, random: Random, length: int, close: bool
) -> None:
    """Normalizers change these texts: canonical tokens can have gaps between them, and unknown offsets."""
    vocabulary, known = vocabulary_of(kind), [i for each in ids_by_bytes(kind).values() for i in each]
    ids = random.choices(known, k=length)
    sampled = continued(kind, prompt, ids[: complete_length(vocabulary, ids)], close=close)
    canonical = vocabulary.encode(sampled.text.decode(), close=close)
    transferred = transfer_target(numbered_target(len(canonical)), canonical, sampled)
    assert num_noncanonical(canonical, sampled) == (~transferred.valid).sum()
    row_of = {j: min(row) for j, (valid, _, row) in enumerate(rows_of(transferred)) if valid}
    assert list(row_of.values()) == sorted(set(row_of.values()))
    for j, row in row_of.items():
        # Blanks at the end of a prompt, which WordPiece drops, are bytes of the first sampled token.
        assert sampled.starts[j] == canonical.starts[row] or are_equal(canonical, sampled)
    if canonical.written.all() and canonical.own_space.tolist()[:1] == sampled.own_space.tolist()[:1]:
        row_of_span = dict(zip(spans(canonical), range(len(canonical)), strict=True))
        for j, span in enumerate(spans(sampled)):
            assert span not in row_of_span or row_of[j] == row_of_span[span]


def spans(tokens: Tokens) -> list[tuple[int, int, int]]:
    """Start, end and id of each token."""
    return list(zip(tokens.starts.tolist(), tokens.ends.tolist(), tokens.ids.tolist(), strict=True))


def test_an_added_space_that_is_a_token_of_its_own_ends_a_block() -> None:
    vocabulary, ids = vocabulary_of("prefixed"), {data: i[0] for data, i in ids_by_bytes("prefixed").items()}
    canonical = vocabulary.encode("日 sacks")
    assert [vocabulary.token_bytes[i] for i in canonical.ids[:2]] == [b" ", b"\xe6"]
    sampled = continued("prefixed", "日", [ids[bytes([byte])] for byte in b" sacks"])
    transferred = transfer_target(numbered_target(len(canonical)), canonical, sampled)
    assert [min(row) for _, _, row in rows_of(transferred)[:5]] == [0, 1, 2, 3, 4]
    assert not transferred.valid.all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokens_return_the_target_itself(kind: str) -> None:
    tokens = vocabulary_of(kind).encode("six sacks", close=True)
    target = numbered_target(len(tokens))
    assert transfer_target(target, tokens, tokens) is target
    assert num_noncanonical(tokens, tokens) == 0


def test_tokens_of_other_texts_and_targets_of_other_lengths_are_rejected() -> None:
    vocabulary = vocabulary_of("byte_level")
    tokens, other = vocabulary.encode("six sacks"), vocabulary.encode("six backs")
    target = numbered_target(len(tokens))
    with pytest.raises(AlignmentError, match="9 bytes without EOS and 9 bytes without EOS"):
        transfer_target(target, tokens, other)
    closed = vocabulary.encode("six sacks", close=True)
    with pytest.raises(AlignmentError, match="9 bytes without EOS and 9 bytes with EOS"):
        transfer_target(target, tokens, closed)
    with pytest.raises(
        AlignmentError, match=f"expected {len(closed)} rows, one per canonical token, received {len(tokens)}"
    ):
        transfer_target(target, closed, tokens)
