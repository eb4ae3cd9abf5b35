"""How much a replica is asked at once, and which questions are stragglers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachers.asking.pacing import LEAST_S, START, Pace, Stragglers, backoff_s


def run(pace: Pace, seconds: float, answers: int) -> None:
    for _ in range(answers):
        pace.answered(seconds, 512, pace.limit)


def test_more_is_asked_at_once_while_latency_holds() -> None:
    pace = Pace(16)
    run(pace, 0.1, 300)
    assert pace.limit == 16


def test_no_more_is_asked_when_answers_only_wait_longer() -> None:
    """A server of one place: with n questions under way each takes n times as long."""
    pace = Pace(64)
    for _ in range(2000):
        pace.answered(0.1 * pace.limit, 512, pace.limit)
    assert START <= pace.limit <= 20


def test_a_place_that_is_not_used_proves_nothing() -> None:
    pace = Pace(16)
    for _ in range(300):
        pace.answered(0.1, 512, 1)
    assert pace.limit == START


def test_a_complaint_lowers_it_and_one_question_stays() -> None:
    pace = Pace(16)
    run(pace, 0.1, 300)
    pace.complained()
    assert pace.limit == 11
    for _ in range(50):
        pace.complained()
    assert pace.limit == 1


def test_a_replica_that_was_away_begins_with_one_question_and_grows_again() -> None:
    pace = Pace(8)
    pace.restart()
    assert pace.limit == 1
    run(pace, 0.1, 100)
    assert pace.limit == 8


@given(st.lists(st.tuples(st.floats(1e-4, 1e3), st.integers(1, 10_000), st.booleans())), st.integers(1, 64))
def test_the_limit_stays_between_one_and_the_most(answers: list[tuple[float, int, bool]], most: int) -> None:
    pace = Pace(most)
    for seconds, tokens, complains in answers:
        pace.complained() if complains else pace.answered(seconds, tokens, pace.limit)
        assert 1 <= pace.limit <= most


def test_nothing_is_a_straggler_before_enough_was_seen() -> None:
    stragglers = Stragglers()
    for _ in range(19):
        stragglers.answered(1.0, 512)
    assert stragglers.patience_s(512) is None
    stragglers.answered(1.0, 512)
    assert stragglers.patience_s(512) == pytest.approx(2.0)


def test_a_longer_question_may_take_longer_and_a_hiccup_is_no_straggler() -> None:
    stragglers = Stragglers()
    for _ in range(20):
        stragglers.answered(0.64, 512)
    assert stragglers.patience_s(1152) == pytest.approx(2 * 1.28)
    for _ in range(300):
        stragglers.answered(1e-4, 512)
    assert stragglers.patience_s(512) == LEAST_S


def test_three_in_a_hundred_questions_are_asked_twice_and_four_at_once() -> None:
    stragglers = Stragglers()
    twice = 0
    for _ in range(1000):
        stragglers.asked()
        twice += stragglers.may_ask_twice()
    assert 25 <= twice <= 30
    for _ in range(1000):
        stragglers.asked()
    assert [stragglers.may_ask_twice() for _ in range(6)] == [True] * 4 + [False] * 2


def test_a_failing_replica_is_left_alone_longer_and_longer_up_to_a_limit() -> None:
    waits = [backoff_s(failures) for failures in range(1, 30)]
    assert 0.15 < waits[0] < 0.35
    assert waits[3] > waits[0] * 3
    assert max(waits) <= 12.5
    assert backoff_s(10_000) <= 12.5
