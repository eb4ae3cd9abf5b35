"""How a fusion chooses its weights, on cases small enough to be worked out by hand; what is refused; priors."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from alignment.target import Target, target_from_entries
from tests.trainer.test_fusion import SEEDS, dense, random_sample, rows_of
from trainer.targets.fusion import METHODS, SCOPES, Aligned, Rule, fuse, text_nats
from trainer.targets.priors import SHAPES, RunningBpb, routed, scheduled

VOCAB_SIZE = 12
LABEL, OTHER = 3, 5

Floats = NDArray[np.float64]


def says(*label_probs: float, gaps: Sequence[int] = ()) -> Target:
    """A teacher that gives these probabilities to the label of each position and the rest to one other token."""
    rows = rows_of(*({LABEL: p, OTHER: 1 - p} if p else {OTHER: 1.0} for p in label_probs))
    valid = ~np.isin(np.arange(len(label_probs)), gaps)
    return target_from_entries(rows.rows, rows.ids, rows.probs, valid)


def case(*targets: Target, num_bytes: Sequence[int] | None = None, prior: Sequence[float] | None = None) -> Aligned:
    num_t = len(targets[0])
    return Aligned(
        targets,
        labels_T=np.full(num_t, LABEL),
        num_bytes_T=np.array([1] * num_t if num_bytes is None else num_bytes),
        prior_N=np.array([1.0] * len(targets) if prior is None else prior),
    )


def shares(sample: Aligned, method: str, scope: str = "sample", temperature: float = 1.0) -> list[float]:
    return [float(w) for w in fuse([sample], Rule(method, scope, temperature), VOCAB_SIZE)[0].shares_N]


def softmax(*scores: float) -> list[float]:
    weights = np.exp(scores)
    return [float(w) for w in weights / weights.sum()]


# sample one: A wins token 0, B token 1 and the sample; sample two: A wins both by far, and so the batch
ONE = case(says(0.9, 0.1), says(0.2, 0.6))
TWO = case(says(0.9, 0.9), says(0.1, 0.5))


def test_min_ce_takes_the_best_of_each_token_of_the_sample_or_of_the_batch() -> None:
    chosen = {
        scope: [fused.shares_N.tolist() for fused in fuse([ONE, TWO], Rule("min_ce", scope), VOCAB_SIZE)]
        for scope in SCOPES
    }
    assert chosen == {
        "token": [[0.5, 0.5], [1, 0]],
        "sample": [[0, 1], [1, 0]],
        "batch": [[1, 0], [1, 0]],
    }


def test_avg_ce_is_the_softmax_of_bits_per_byte_at_its_scope() -> None:
    samples = [replace(ONE, num_bytes_T=np.array([2, 3])), replace(TWO, num_bytes_T=np.array([4, 1]))]
    bits = [-np.log2([[0.9, 0.1], [0.2, 0.6]]), -np.log2([[0.9, 0.9], [0.1, 0.5]])]
    temperature = 0.4
    by_scope = {s: fuse(samples, Rule("avg_ce", s, temperature), VOCAB_SIZE) for s in SCOPES}
    of_batch = softmax(*(-(bits[0] + bits[1]).sum(axis=1) / 10 / temperature))
    for i, sample in enumerate(samples):
        tokens = [softmax(*(-bits[i][:, t] / sample.num_bytes_T[t] / temperature)) for t in range(2)]
        np.testing.assert_allclose(by_scope["token"][i].shares_N, np.mean(tokens, axis=0), rtol=1e-6)
        of_sample = softmax(*(-bits[i].sum(axis=1) / 5 / temperature))
        np.testing.assert_allclose(by_scope["sample"][i].shares_N, of_sample, rtol=1e-6)
        np.testing.assert_allclose(by_scope["batch"][i].shares_N, of_batch, rtol=1e-6)


def test_a_position_without_bytes_counts_as_one_byte_at_token_scope_and_its_bits_go_to_the_sample() -> None:
    sample = case(says(0.5, 0.5), says(0.25, 0.5), num_bytes=[0, 4])
    token, tied = softmax(-1, -2), [0.5, 0.5]
    assert shares(sample, "avg_ce", "token") == pytest.approx([(a + b) / 2 for a, b in zip(token, tied, strict=True)])
    assert shares(sample, "avg_ce") == pytest.approx(softmax(-2 / 4, -3 / 4))
    only_special = case(says(0.5), says(0.25), num_bytes=[0])
    assert shares(only_special, "avg_ce") == pytest.approx(softmax(-1, -2))


def test_bits_per_byte_decide_and_not_nats_per_token() -> None:
    """A writes the text in 16 tokens of its own and B in 4: per token A looks better, of the text B knows more."""
    sample = case(says(0.25, 0.25), says(0.5, 0.5), num_bytes=[4, 4])
    nats_N = np.array([4, 2]) * math.log(2)
    fine = replace(sample, own_ce_N=nats_N / [16, 4])
    assert shares(fine, "fusellm_min_ce") == [1, 0]
    assert shares(fine, "min_ce") == [0, 1]
    assert shares(fine, "avg_ce") == pytest.approx(softmax(-4 / 8, -2 / 8))


@pytest.mark.parametrize("scope", SCOPES)
def test_fusellm_weighs_by_the_softmax_of_exp_of_minus_ce_of_a_sequence(scope: str) -> None:
    own = replace(case(says(0.9), says(0.1), says(0.5)), own_ce_N=np.array([2.0, 1.0, 1.5]))
    expected = softmax(math.exp(-2.0), math.exp(-1.0), math.exp(-1.5))
    assert shares(own, "fusellm_avg_ce", scope, temperature=0.01) == pytest.approx(expected)
    weighed = replace(own, prior_N=np.array([1.0, 3.0, 9.0]))
    assert shares(weighed, "fusellm_avg_ce", scope) == pytest.approx(expected)  # it knows of no prior
    assert shares(weighed, "fusellm_min_ce", scope) == [0, 1, 0]
    without = replace(own, prior_N=np.array([1.0, 0.0, 9.0]))
    assert shares(without, "fusellm_min_ce", scope) == [0, 0, 1]


def test_fusellm_without_the_teachers_own_losses_takes_nats_per_student_token() -> None:
    sample = case(says(0.9, 0.1), says(0.2, 0.6), num_bytes=[7, 9])
    reward_N = np.exp([np.log([0.9, 0.1]).mean(), np.log([0.2, 0.6]).mean()])
    assert shares(sample, "fusellm_avg_ce") == pytest.approx(softmax(*reward_N), rel=1e-6)


def test_equals_share_by_their_prior() -> None:
    sample = case(says(0.5, 0.5), says(0.5, 0.5), says(0.1, 0.1), prior=[1, 3, 9])
    for scope in SCOPES:
        assert shares(sample, "min_ce", scope) == pytest.approx([0.25, 0.75, 0])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["min_ce", "avg_ce", "confidence"])
def test_a_teacher_of_prior_zero_is_not_chosen_however_good(method: str, scope: str) -> None:
    assert shares(case(says(0.99), says(0.5), prior=[0, 2]), method, scope) == [0, 1]


def test_confidence_weighs_by_entropy_with_the_tail_as_one_bucket() -> None:
    sure, unsure = rows_of({0: 0.9, 1: 0.05}, {0: 1.0}), rows_of({0: 0.25, 1: 0.25, 2: 0.25}, {0: 0.5, 4: 0.5})
    entropy = np.array([[-(0.9 * math.log(0.9) + 0.1 * math.log(0.05)), 0], [math.log(4), math.log(2)]])
    first, second = case(sure, unsure), case(unsure, sure)
    tokens = [softmax(*(-entropy[:, t] / 0.5)) for t in range(2)]
    assert shares(first, "confidence", "token", 0.5) == pytest.approx(np.mean(tokens, axis=0).tolist(), rel=1e-6)
    expected = softmax(*(-entropy.mean(axis=1) / 0.5))
    assert shares(first, "confidence", "sample", 0.5) == pytest.approx(expected, rel=1e-6)
    batch = fuse([first, second], Rule("confidence", "batch", 0.5), VOCAB_SIZE)
    np.testing.assert_allclose([fused.shares_N for fused in batch], 0.5)


def test_only_positions_where_all_who_take_part_answer_are_compared() -> None:
    sample = case(says(0.9, 0.001), says(0.5, 0.9, gaps=[1]), says(0.1, 0.1, gaps=[0, 1]), prior=[1, 1, 0])
    assert shares(sample, "min_ce") == [1, 0, 0]
    missing = fuse([sample], Rule("min_ce"), VOCAB_SIZE)[0]
    assert missing.left_out_N.tolist() == [0, 1, 0]  # who takes no part is not missed


def test_where_nothing_can_be_compared_all_are_equal() -> None:
    apart = case(says(0.9, 0.9, gaps=[0]), says(0.1, 0.1, gaps=[1]), says(0.5, 0.5))
    fused = fuse([apart], Rule("min_ce"), VOCAB_SIZE)[0]
    assert fused.shares_N.tolist() == [0.25, 0.25, 0.5]
    assert fused.left_out_N.tolist() == [1, 1, 0]


def test_where_the_chosen_one_is_missing_the_prior_of_the_others_decides() -> None:
    sample = case(says(0.9, 0.9, 0.9, gaps=[2]), says(0.5, 0.5, 0.5), says(0.4, 0.4, 0.4), prior=[1, 1, 3])
    assert shares(sample, "min_ce") == pytest.approx([2 / 3, 0.25 / 3, 0.75 / 3])
    chosen = replace(sample, prior_N=routed(["a", "b", "c"], "a"))
    alone = fuse([chosen], Rule("mean"), VOCAB_SIZE)[0]
    assert alone.target.valid.tolist() == [True, True, False]  # nobody teaches who takes no part
    assert alone.shares_N.tolist() == [1, 0, 0]


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_a_teacher_without_any_answer_does_not_end_the_comparison_of_the_others(scope: str) -> None:
    silent = says(0.9, 0.9, gaps=[0, 1])
    for method, few in (("min_ce", [1.0, 0.0]), ("avg_ce", None)):
        both = case(says(0.9, 0.9), says(0.1, 0.1))
        pair = fuse([both], Rule(method, scope), VOCAB_SIZE)[0].shares_N
        three = fuse([case(says(0.9, 0.9), says(0.1, 0.1), silent)], Rule(method, scope), VOCAB_SIZE)[0].shares_N
        np.testing.assert_allclose(three, [*pair, 0.0])
        assert few is None or pair.tolist() == few


def test_a_batch_compares_teachers_over_the_samples_in_which_the_same_ones_take_part() -> None:
    """A is worse than B where both take part, and alone in the sample where it shines."""
    both, alone = case(says(0.4), says(0.5)), case(says(0.99), says(0.5), prior=[1, 0])
    first, second = fuse([both, alone], Rule("min_ce", "batch"), VOCAB_SIZE)
    assert (first.shares_N.tolist(), second.shares_N.tolist()) == ([0, 1], [1, 0])


def test_a_label_that_is_not_listed_counts_with_the_tail() -> None:
    hidden, listed = rows_of({OTHER: 0.4}), rows_of({LABEL: 0.5, OTHER: 0.5})
    assert shares(case(hidden, listed), "min_ce") == [1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_label_that_all_call_impossible_leaves_finite_weights(method: str, scope: str, temperature: float) -> None:
    sample = case(says(0.0, 0.5, gaps=[1]), says(0.0, 0.9), says(0.0, 0.1))
    fused = fuse([sample], Rule(method, scope, temperature), VOCAB_SIZE)[0]
    assert fused.shares_N.sum() == pytest.approx(1)
    np.testing.assert_allclose(fused.target.mass + fused.target.tail, 1, atol=1e-6)


@given(seeds=SEEDS)
def test_token_scope_min_ce_gives_the_text_at_least_what_every_teacher_gives_it(seeds: list[int]) -> None:
    sample = replace(random_sample(seeds), prior_N=np.ones(len(seeds)))
    fused = fuse([sample], Rule("min_ce", "token"), VOCAB_SIZE)[0].target
    listed = np.array([target.prob_of(sample.labels_T) for target in sample.targets])
    tails = np.array([target.tail for target in sample.targets])
    best = np.where(listed > 0, listed, tails).max(axis=0)
    got = fused.prob_of(sample.labels_T)
    assert (np.where(got > 0, got, fused.tail) >= best - 1e-6).all()


def test_text_nats_are_those_of_the_common_positions_and_of_no_absent_teacher() -> None:
    sample = case(
        says(0.5, 0.5, 0.5), says(0.1, 0.2, 0.4, gaps=[0]), says(1, 1, 1, gaps=[0, 1, 2]), num_bytes=[5, 2, 0]
    )
    nats_N, bytes_N = text_nats(sample, VOCAB_SIZE)
    np.testing.assert_allclose(nats_N, [-2 * math.log(0.5), -math.log(0.2 * 0.4), 0], rtol=1e-6)
    assert bytes_N.tolist() == [2, 2, 0]


def with_target(change: Callable[[Target], Target]) -> Aligned:
    return replace(ONE, targets=(ONE.targets[0], change(ONE.targets[1])))


def with_ids(*ids: int) -> Aligned:
    return with_target(lambda target: replace(target, ids=np.array(ids, dtype=np.int32)))


def with_probs(*probs: float) -> Aligned:
    return with_target(lambda target: replace(target, probs=np.array(probs, dtype=np.float32)))


REFUSED = {
    "no teacher": (replace(ONE, targets=()), "expected 1 to 16 teachers, received 0"),
    "17 teachers": (replace(ONE, targets=ONE.targets[:1] * 17), "expected 1 to 16 teachers, received 17"),
    "targets": (with_target(lambda t: t.after(1)), r"expected 2 positions.* received \[2, 1\] from the teachers"),
    "labels": (replace(ONE, labels_T=np.array([1, 2, 3])), r"expected 3 positions.* received \[2, 2\]"),
    "bytes": (replace(ONE, num_bytes_T=np.array([1])), "received .* and 1 byte counts"),
    "negative bytes": (replace(ONE, num_bytes_T=np.array([1, -1])), "byte counts ≥ 0, received -1"),
    "label": (replace(ONE, labels_T=np.array([1, 12])), "labels from 0 to 11, received 1 to 12"),
    "prior length": (replace(ONE, prior_N=np.ones(3)), r"prior_N to be 2 numbers ≥ 0, received \[1.0, 1.0, 1.0\]"),
    "negative prior": (replace(ONE, prior_N=np.array([1.0, -1.0])), r"numbers ≥ 0, received \[1.0, -1.0\]"),
    "prior of nan": (replace(ONE, prior_N=np.array([1.0, math.nan])), "numbers ≥ 0, received"),
    "prior of nothing": (replace(ONE, prior_N=np.zeros(2)), r"not all 0, received \[0.0, 0.0\]"),
    "own losses": (replace(ONE, own_ce_N=np.ones(1)), "own_ce_N to be 2 numbers"),
    "id": (with_ids(3, 5, 3, 12), "teacher 1, position 1: expected distinct ids from 0 to 11 .* ids from 3 to 12"),
    "negative id": (with_ids(3, 5, -1, 5), "teacher 1, position 1: .* ids from -1 to 5"),
    "twice an id": (with_ids(3, 3, 3, 5), "teacher 1, position 0: .* received 1 distinct of 2 ids"),
    "sum": (with_probs(0.2, 0.7, 0.5, 0.5), "teacher 1, position 0: .* sum to 1 with the tail.* the sum 0.9"),
    "negative": (with_probs(0.2, 0.8, 1.5, -0.5), "position 1: .* the least probability -0.5"),
    "nan": (with_probs(0.2, 0.8, math.nan, 0.5), "position 1: .* the sum nan"),
    "offsets": (with_target(lambda t: replace(t, offsets=np.array([0, 5, 4]))), "offsets that rise from 0"),
    "tail": (with_target(lambda t: replace(t, tail=t.tail[:1])), "3 offsets and 1 tails for 2 positions"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_belong_together_is_refused_with_numbers_sample_and_teacher(what: str) -> None:
    broken, message = REFUSED[what]
    with pytest.raises(ValueError, match=f"sample 0 of the batch.*{message}"):
        fuse([broken], Rule(), VOCAB_SIZE)


def test_a_sample_with_other_teachers_than_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 of the batch: expected 2 teachers as in sample 0, received 1"):
        fuse([ONE, case(says(0.5))], Rule(), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "median"}, "fusion method: expected one of mean, geometric, min_ce.*, received 'median'"),
        ({"scope": "world"}, "fusion scope: expected one of token, sample, batch, received 'world'"),
        ({"temperature": 0.0}, "fusion temperature: expected a finite number above 0, received 0.0"),
        ({"temperature": math.nan}, "received nan"),
        ({"top_k": 0}, "fusion top_k: expected 1 or more, or None to keep all entries, received 0"),
    ],
)
def test_a_rule_names_the_value_and_the_choices(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Rule(), **wrong)  # type: ignore[arg-type]


def test_a_router_names_one_teacher_or_the_choices() -> None:
    assert routed(["a", "b", "c"], "b").tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="expected one of a, b, received 'd'"):
        routed(["a", "b"], "d")


def test_schedules_move_from_start_to_end() -> None:
    start, end = [2.0, 2.0], [0.0, 5.0]
    for shape in SHAPES:
        assert scheduled(start, end, shape, 0.0).tolist() == [0.5, 0.5]
    assert scheduled(start, end, "constant", 1.0).tolist() == [0.5, 0.5]
    assert scheduled(start, end, "linear", 0.25) == pytest.approx([0.375, 0.625])
    assert scheduled(start, end, "cosine", 0.5) == pytest.approx([0.25, 0.75])
    assert scheduled(start, end, "cosine", 0.1)[0] > scheduled(start, end, "linear", 0.1)[0]
    for shape in SHAPES[1:]:
        assert scheduled(start, end, shape, 1.0) == pytest.approx([0, 1])
    assert (start, end) == ([2.0, 2.0], [0.0, 5.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0], "sine", 0.5), "expected one of constant, linear, cosine, received 'sine'"),
        (([1.0], [1.0], "linear", 1.5), "progress from 0 to 1, received 1.5"),
        (([1.0], [1.0, 2.0], "linear", 0.5), "expected 1 at the end, as at the start, received 2"),
        (([1.0], [0.0], "linear", 0.5), r"end: expected numbers ≥ 0 that are not all 0, received \[0.0\]"),
    ],
)
def test_an_impossible_schedule_is_refused(
    arguments: tuple[list[float], list[float], str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scheduled(*arguments)


RUNNING = RunningBpb(("a", "b", "c"), half_life_bytes=1000, margin=0.5, temperature=0.2)


def seen(running: RunningBpb, domain: str, bpb: Sequence[float], num_bytes: Sequence[int]) -> RunningBpb:
    nats = [b * n * math.log(2) for b, n in zip(bpb, num_bytes, strict=True)]
    return running.updated(domain, nats, num_bytes)


def test_running_weights_are_even_at_first_then_a_softmax_of_those_within_the_margin() -> None:
    after = seen(RUNNING, "code", [0.8, 1.0, 1.4], [10, 10, 10])
    a, b = softmax(0, -0.2 / 0.2)
    assert after.weights("code") == pytest.approx([a, b, 0])
    assert after.weights("law") == pytest.approx([1 / 3] * 3)
    assert RUNNING.weights("code") == pytest.approx([1 / 3] * 3)  # the value before is as it was


def test_running_bits_are_halfway_after_a_half_life_and_exact_from_the_first_byte() -> None:
    first = seen(RUNNING, "code", [2.0, 2.0, 2.0], [1, 100_000, 0])
    assert [bpb for bpb, _ in first.seen["code"][:2]] == pytest.approx([2.0, 2.0])
    later = seen(first, "code", [1.0, 1.0, 1.0], [0, 1000, 0])
    assert [bpb for bpb, _ in later.seen["code"][:2]] == pytest.approx([2.0, 1.5])
    assert later.seen["code"][2] == (0.0, 0.0)


def test_a_teacher_not_yet_seen_in_a_domain_counts_as_the_best() -> None:
    assert seen(RUNNING, "code", [1.0, 2.0, 0.0], [10, 10, 0]).weights("code") == pytest.approx([0.5, 0, 0.5])


@given(
    parts=st.lists(st.tuples(st.floats(0, 8), st.integers(1, 5000)), min_size=1, max_size=6),
    cut=st.floats(0.1, 0.9),
)
def test_running_bits_lie_between_those_seen_and_do_not_depend_on_how_text_is_cut(
    parts: list[tuple[float, int]], cut: float
) -> None:
    whole = halves = RunningBpb(("a",), half_life_bytes=700, margin=1)
    for bpb, num_bytes in parts:
        whole = seen(whole, "x", [bpb], [num_bytes])
        first = int(cut * num_bytes)
        halves = seen(seen(halves, "x", [bpb], [first]), "x", [bpb], [num_bytes - first])
    (average, full), (same, same_full) = whole.seen["x"][0], halves.seen["x"][0]
    assert [average, full] == pytest.approx([same, same_full], abs=1e-9)
    assert min(b for b, _ in parts) - 1e-9 <= average <= max(b for b, _ in parts) + 1e-9


def test_running_bits_come_back_from_json_as_they_were() -> None:
    after = seen(seen(RUNNING, "code", [0.8, 1.0, 1.4], [10, 20, 0]), "law", [1, 2, 3], [5, 5, 5])
    assert RunningBpb.from_state(json.loads(json.dumps(after.state(), allow_nan=False))) == after


def test_impossible_running_bits_are_refused() -> None:
    for wrong, message in {"half_life_bytes": "half_life_bytes", "temperature": "temperature"}.items():
        with pytest.raises(ValueError, match=f"{message}: expected a finite number above 0, received 0"):
            replace(RUNNING, **{wrong: 0.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="margin: expected a finite number ≥ 0, received -1"):
        replace(RUNNING, margin=-1.0)
    with pytest.raises(ValueError, match="distinct names"):
        replace(RUNNING, names=("a", "a"))
    with pytest.raises(ValueError, match="domain 'code': expected nats ≥ 0 for each of a, b, c, received"):
        RUNNING.updated("code", [1.0, 1.0, math.nan], [1, 1, 1])
    with pytest.raises(ValueError, match=r"expected bytes ≥ 0 for each of a, b, c, received \[1, 1\]"):
        RUNNING.updated("code", [1.0, 1.0, 1.0], [1, 1])
    state = {**RUNNING.state(), "seen": {"code": [[1.0, 0.5]]}}
    with pytest.raises(ValueError, match="domain 'code': .* for each of 3 teachers"):
        RunningBpb.from_state(state)


def test_a_running_prior_and_the_mean_make_an_adaptive_fusion() -> None:
    running = seen(RUNNING, "code", [0.8, 0.8, 3.0], [10, 10, 10])
    sample = case(says(0.9), says(0.5), says(0.1), prior=(running.weights("code") * [1, 3, 1]).tolist())
    fused = fuse([sample], Rule("mean"), VOCAB_SIZE)[0]
    np.testing.assert_allclose(dense(fused.target)[0, [LABEL, OTHER]], [0.6, 0.4], rtol=1e-6)
