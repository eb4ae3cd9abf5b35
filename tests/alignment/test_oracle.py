"""Byte-chain alignment compared with the truth: where it is exact, and the size and sign of the error elsewhere.

The numbers are measured values.
"""

import numpy as np
import pytest

from alignment import align, translate
from tests.alignment.oracle import BOUNDS, aligned, determined, every_k, figures, listed_errors
from tests.alignment.toy_world import (
    LETTERS,
    PAIRS,
    TOKENS,
    Language,
    any_letters,
    exact_model,
    exact_rows,
    language,
    pair,
    syllables,
)

pytestmark = pytest.mark.slow

FLOAT = 1e-6


def full(name: str) -> int:
    return every_k(name)[-1]


@pytest.mark.parametrize("grammar", [any_letters, syllables])
def test_the_probabilities_of_all_texts_sum_to_one(grammar) -> None:  # type: ignore[no-untyped-def]
    assert language(grammar).probs.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_both_exact_models_give_every_text_its_probability(name: str) -> None:
    world = pair(name)
    for model in (world.teacher, world.student):
        rows = [exact_rows(model, tokens, 1) for tokens in model.tokens]
        np.testing.assert_allclose(np.exp([row.actual.sum() for row in rows]), world.language.probs, rtol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_distance_to_the_truth_never_grows_with_k(name: str) -> None:
    distances = [figures(name, top_k).distance for top_k in every_k(name)]
    assert (np.diff(distances) <= FLOAT).all()


def test_one_tokenizer_is_exact_at_every_k() -> None:
    for top_k in every_k("one tokenizer"):
        for bound in BOUNDS:
            assert listed_errors(aligned("one tokenizer", top_k, bound)).max() < FLOAT
    assert figures("one tokenizer", full("one tokenizer")).distance < FLOAT


def test_alignment_is_exact_at_full_k_if_the_text_shows_where_both_tokenizations_end_a_token() -> None:
    name = "syllables to letters"
    assert determined(name).all()
    for bound in BOUNDS:
        assert figures(name, full(name), bound).distance < FLOAT
    assert figures(name, 1).error > 0.1  # what the teacher did not list belongs to tokens that the target lists


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("tokens to letters", 0.29),
        ("letters to tokens", 0.06),
        ("tokens to other tokens", 0.07),
        ("letters to syllables", 0.09),
    ],
)
def test_determined_positions_are_exact_at_full_k_and_the_others_have_all_the_error(name: str, share: float) -> None:
    positions, certain = aligned(name, full(name), 0.0), determined(name)
    errors = listed_errors(positions)
    assert errors[certain].max() < FLOAT
    assert positions.weight[certain].sum() > share
    assert positions.weight[~certain] @ errors[~certain] == pytest.approx(figures(name, full(name)).error, abs=FLOAT)


def test_a_candidate_that_begins_a_longer_student_token_keeps_its_own_token() -> None:
    """Letters to syllables has no other error: every block begins where all tokenizations have a boundary."""
    name = "letters to syllables"
    world, positions = pair(name), aligned(name, full(name), 0.0)
    consonants = [world.student.vocabulary.tokens.index(letter) for letter in "bc"]
    assert not positions.truth[:, consonants].any()
    misplaced = positions.probs[:, consonants].sum(axis=1)
    np.testing.assert_allclose(listed_errors(positions), misplaced, atol=FLOAT)
    assert figures(name, full(name)).error == pytest.approx(0.2308, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "error", "student_error"),
    [
        ("tokens to letters", 0.0038, 0.0038),
        ("letters to tokens", 0.2718, 0.2688),
        ("tokens to other tokens", 0.1407, 0.1424),
    ],
)
def test_an_error_remains_at_full_k_if_student_tokens_cross_boundaries(
    name: str, error: float, student_error: float
) -> None:
    """Nearly every boundary can be crossed here; docs/alignment.md has the frequency in real text."""
    measured = figures(name, full(name))
    assert measured.error == pytest.approx(error, abs=5e-4)
    assert measured.student_error == pytest.approx(student_error, abs=5e-4)


@pytest.mark.parametrize("name", PAIRS)
def test_a_target_contains_no_information_about_the_text_after_its_position(name: str) -> None:
    """Without carried branches, tokens to letters predicts 0.25 bits per byte better than the truth does."""
    assert all(abs(figures(name, top_k).leak) < 5e-4 for top_k in every_k(name))


def test_the_error_falls_with_every_candidate_if_only_teacher_tokens_cross_boundaries() -> None:
    errors = [figures("tokens to letters", top_k).error for top_k in (1, 2, 4, 6, 8)]
    assert (np.diff(errors) < 0).all()
    assert errors[0] > 0.15
    assert errors[-1] < 0.004


@pytest.mark.parametrize("name", PAIRS)
def test_the_text_is_at_least_as_likely_as_in_truth_at_every_k(name: str) -> None:
    assert all(figures(name, top_k).leak > -FLOAT for top_k in every_k(name))


def test_a_longer_token_is_carried_across_the_end_of_a_shorter_one() -> None:
    """Texts ab (0.6) and ac (0.4), tokens [ab] and [a][c]: after a, b has 0.6 in both; [a] ends a block in one."""
    texts = Language(("ab", "ac"), np.array([0.6, 0.4]))
    teacher, student = exact_model(TOKENS, texts), exact_model(LETTERS, texts)
    b, translation = LETTERS.tokens.index("b"), translate(TOKENS, LETTERS)
    pairs = list(zip(teacher.tokens, student.tokens, strict=True))

    def prob_of_b(**bounds: float) -> list[float]:
        rows = [exact_rows(teacher, t, len(TOKENS)) for t, _ in pairs]
        targets = [align(r, 0, t, s, translation, **bounds) for r, (t, s) in zip(rows, pairs, strict=True)]
        return [float(target.prob_of(np.full(len(target), b))[1]) for target in targets]

    assert student.following[(LETTERS.tokens.index("a"),)][b] == pytest.approx(0.6)
    assert prob_of_b() == pytest.approx([0.6, 0.6])
    assert prob_of_b(carry_above=np.inf) == pytest.approx([0.6, 0.0])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("bound", "cost"), [(1e-4, 2e-5), (1e-3, 1e-4), (1e-2, 3e-3)])
def test_a_bound_on_exact_branches_costs_little(name: str, bound: float, cost: float) -> None:
    exact, bounded = figures(name, full(name)), figures(name, full(name), bound)
    assert abs(bounded.distance - exact.distance) < cost
    assert abs(bounded.error - exact.error) < cost
