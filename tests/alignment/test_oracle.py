"""Alignment against the truth: where it is exact, how far it is off elsewhere, and which way. The numbers were seen."""

import numpy as np
import pytest

from alignment import align, translate
from tests.alignment.oracle import (
    BOUNDS,
    LETTERS,
    PAIRS,
    TOKENS,
    Language,
    aligned,
    every_k,
    exact_model,
    exact_rows,
    figures,
    free,
    language,
    listed_errors,
    pair,
    settled,
    syllables,
)

FLOAT = 1e-6


def full(name: str) -> int:
    return every_k(name)[-1]


@pytest.mark.parametrize("follows", [free, syllables])
def test_the_texts_are_all_there_are(follows) -> None:  # type: ignore[no-untyped-def]
    assert language(follows).probs.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_both_exact_models_give_every_text_its_probability(name: str) -> None:
    world = pair(name)
    for model in (world.teacher, world.student):
        rows = [exact_rows(model, tokens, 1) for tokens in model.tokens]
        np.testing.assert_allclose(np.exp([row.actual.sum() for row in rows]), world.spoken.probs, rtol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_distance_to_the_truth_never_grows_with_k(name: str) -> None:
    distances = [figures(name, top_k).distance for top_k in every_k(name)]
    assert (np.diff(distances) <= FLOAT).all()


def test_one_tokenizer_is_exact_at_every_k() -> None:
    for top_k in every_k("one tokenizer"):
        for bound in BOUNDS:
            assert listed_errors(aligned("one tokenizer", top_k, bound)).max() < FLOAT
    assert figures("one tokenizer", full("one tokenizer")).distance < FLOAT


def test_it_is_exact_at_full_k_where_both_tokenizations_show_their_ends() -> None:
    name = "syllables to letters"
    assert settled(name).all()
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
def test_settled_positions_are_exact_at_full_k_and_the_others_bear_the_error(name: str, share: float) -> None:
    positions, sure = aligned(name, full(name), 0.0), settled(name)
    errors = listed_errors(positions)
    assert errors[sure].max() < FLOAT
    assert positions.weight[sure].sum() > share
    assert positions.weight[~sure] @ errors[~sure] == pytest.approx(figures(name, full(name)).error, abs=FLOAT)


def test_a_candidate_that_a_longer_student_token_continues_is_taken_for_itself() -> None:
    """Letters to syllables has no other error: every block begins where all tokenizations have a boundary."""
    name = "letters to syllables"
    world, positions = pair(name), aligned(name, full(name), 0.0)
    consonants = [world.student.vocabulary.tokens.index(letter) for letter in "bc"]
    assert not positions.truth[:, consonants].any()
    astray = positions.probs[:, consonants].sum(axis=1)
    np.testing.assert_allclose(listed_errors(positions), astray, atol=FLOAT)
    assert figures(name, full(name)).error == pytest.approx(0.2308, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "error", "learned"),
    [
        ("tokens to letters", 0.0038, 0.0038),
        ("letters to tokens", 0.2718, 0.2688),
        ("tokens to other tokens", 0.1407, 0.1424),
    ],
)
def test_a_bias_remains_at_full_k_where_the_students_tokens_run_across_boundaries(
    name: str, error: float, learned: float
) -> None:
    """Here nearly every boundary can be crossed; docs/alignment.md says how often real ones can."""
    seen = figures(name, full(name))
    assert seen.error == pytest.approx(error, abs=5e-4)
    assert seen.learned == pytest.approx(learned, abs=5e-4)


@pytest.mark.parametrize("name", PAIRS)
def test_a_target_knows_nothing_of_the_text_beyond_its_position(name: str) -> None:
    """Without what is carried over cuts it predicts tokens to letters 0.25 bits per byte better than the truth does."""
    assert all(abs(figures(name, top_k).gain) < 5e-4 for top_k in every_k(name))


def test_it_comes_closer_to_the_truth_with_every_candidate_where_only_the_teachers_tokens_run_across() -> None:
    errors = [figures("tokens to letters", top_k).error for top_k in (1, 2, 4, 6, 8)]
    assert (np.diff(errors) < 0).all()
    assert errors[0] > 0.15
    assert errors[-1] < 0.004


@pytest.mark.parametrize("name", PAIRS)
def test_the_text_is_at_least_as_likely_as_in_truth_at_every_k(name: str) -> None:
    assert all(figures(name, top_k).gain > -FLOAT for top_k in every_k(name))


def test_a_longer_token_is_not_forgotten_where_a_shorter_one_ends() -> None:
    """Texts ab (0.6) and ac (0.4), tokens [ab] and [a][c]: after a, b has 0.6 in both; [a] ends a block in one."""
    spoken = Language(("ab", "ac"), np.array([0.6, 0.4]))
    teacher, student = exact_model(TOKENS, spoken), exact_model(LETTERS, spoken)
    b, translation = LETTERS.tokens.index("b"), translate(TOKENS, LETTERS)
    pairs = list(zip(teacher.tokens, student.tokens, strict=True))

    def taught(**bounds: float) -> list[float]:
        rows = [exact_rows(teacher, t, len(TOKENS)) for t, _ in pairs]
        targets = [align(r, 0, t, s, translation, **bounds) for r, (t, s) in zip(rows, pairs, strict=True)]
        return [float(target.prob_of(np.full(len(target), b))[1]) for target in targets]

    assert student.following[(LETTERS.tokens.index("a"),)][b] == pytest.approx(0.6)
    assert taught() == pytest.approx([0.6, 0.6])
    assert taught(carry_above=np.inf) == pytest.approx([0.6, 0.0])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("bound", "cost"), [(1e-4, 2e-5), (1e-3, 1e-4), (1e-2, 3e-3)])
def test_a_bound_on_exact_branches_costs_little(name: str, bound: float, cost: float) -> None:
    exact, bounded = figures(name, full(name)), figures(name, full(name), bound)
    assert abs(bounded.distance - exact.distance) < cost
    assert abs(bounded.error - exact.error) < cost
