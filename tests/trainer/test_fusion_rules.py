"""Weights of the fusion methods on small cases, validation of inputs, schedules, and the state of methods."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from alignment.target import Target, target_from_entries
from tests.trainer.test_fusion import SEEDS, dense, random_sample, rows_of
from trainer.errors import CheckpointError
from trainer.fusion import FUSION_METHODS
from trainer.fusion.adaptive import Adaptive
from trainer.fusion.base import SCOPES, FusionMethod, FusionRule, fusion_method
from trainer.fusion.comparison import text_nats
from trainer.fusion.config import FusionConfig
from trainer.fusion.fuse import fuse
from trainer.fusion.inputs import FusionInput
from trainer.fusion.router import Router
from trainer.fusion.running_bits_per_byte import RunningBitsPerByte
from trainer.fusion.teacher_weights import SCHEDULES, scheduled
from trainer.records import Sample

VOCAB_SIZE = 12
LABEL, OTHER = 3, 5

Floats = NDArray[np.float64]


def target_of(*label_probs: float, gaps: Sequence[int] = ()) -> Target:
    """A target with these probabilities of the label at each position; one other token has the rest."""
    rows = rows_of(*({LABEL: p, OTHER: 1 - p} if p else {OTHER: 1.0} for p in label_probs))
    valid = ~np.isin(np.arange(len(label_probs)), gaps)
    return target_from_entries(rows.rows, rows.ids, rows.probs, valid)


def case(
    *targets: Target, num_bytes: Sequence[int] | None = None, weights: Sequence[float] | None = None
) -> FusionInput:
    num_t = len(targets[0])
    return FusionInput(
        targets,
        labels_T=np.full(num_t, LABEL),
        num_bytes_T=np.array([1] * num_t if num_bytes is None else num_bytes),
        teacher_weights_N=np.array([1.0] * len(targets) if weights is None else weights),
    )


def fused_weights(sample: FusionInput, method: str, scope: str = "sample", temperature: float = 1.0) -> list[float]:
    return [float(w) for w in fuse([sample], FusionRule(method, scope, temperature), VOCAB_SIZE)[0].teacher_weights_N]


def softmax(*scores: float) -> list[float]:
    weights = np.exp(scores)
    return [float(w) for w in weights / weights.sum()]


# sample ONE: teacher A is better at token 0, B at token 1 and over the sample; sample TWO: A is better at both tokens
# by so much that it is better over the batch
ONE = case(target_of(0.9, 0.1), target_of(0.2, 0.6))
TWO = case(target_of(0.9, 0.9), target_of(0.1, 0.5))


def test_min_ce_selects_the_best_teacher_per_token_per_sample_or_per_batch() -> None:
    selected = {
        scope: [fused.teacher_weights_N.tolist() for fused in fuse([ONE, TWO], FusionRule("min_ce", scope), VOCAB_SIZE)]
        for scope in SCOPES
    }
    assert selected == {
        "token": [[0.5, 0.5], [1, 0]],
        "sample": [[0, 1], [1, 0]],
        "batch": [[1, 0], [1, 0]],
    }


def test_avg_ce_is_the_softmax_of_bits_per_byte_over_its_scope() -> None:
    samples = [replace(ONE, num_bytes_T=np.array([2, 3])), replace(TWO, num_bytes_T=np.array([4, 1]))]
    bits = [-np.log2([[0.9, 0.1], [0.2, 0.6]]), -np.log2([[0.9, 0.9], [0.1, 0.5]])]
    temperature = 0.4
    by_scope = {s: fuse(samples, FusionRule("avg_ce", s, temperature), VOCAB_SIZE) for s in SCOPES}
    batch_weights = softmax(*(-(bits[0] + bits[1]).sum(axis=1) / 10 / temperature))
    for i, sample in enumerate(samples):
        tokens = [softmax(*(-bits[i][:, t] / sample.num_bytes_T[t] / temperature)) for t in range(2)]
        np.testing.assert_allclose(by_scope["token"][i].teacher_weights_N, np.mean(tokens, axis=0), rtol=1e-6)
        sample_weights = softmax(*(-bits[i].sum(axis=1) / 5 / temperature))
        np.testing.assert_allclose(by_scope["sample"][i].teacher_weights_N, sample_weights, rtol=1e-6)
        np.testing.assert_allclose(by_scope["batch"][i].teacher_weights_N, batch_weights, rtol=1e-6)


def test_a_position_without_bytes_counts_as_one_byte_per_token_and_adds_its_bits_per_sample() -> None:
    sample = case(target_of(0.5, 0.5), target_of(0.25, 0.5), num_bytes=[0, 4])
    token, tied = softmax(-1, -2), [0.5, 0.5]
    assert fused_weights(sample, "avg_ce", "token") == pytest.approx(
        [(a + b) / 2 for a, b in zip(token, tied, strict=True)]
    )
    assert fused_weights(sample, "avg_ce") == pytest.approx(softmax(-2 / 4, -3 / 4))
    only_special = case(target_of(0.5), target_of(0.25), num_bytes=[0])
    assert fused_weights(only_special, "avg_ce") == pytest.approx(softmax(-1, -2))


def test_min_ce_and_avg_ce_compare_bits_per_byte_not_nats_per_token() -> None:
    """A has 16 tokens of its own for the text and B has 4: per token A is better, per byte B."""
    sample = case(target_of(0.25, 0.25), target_of(0.5, 0.5), num_bytes=[4, 4])
    nats_N = np.array([4, 2]) * math.log(2)
    with_own_ce = replace(sample, own_ce_N=nats_N / [16, 4])
    assert fused_weights(with_own_ce, "fusellm_min_ce") == [1, 0]
    assert fused_weights(with_own_ce, "min_ce") == [0, 1]
    assert fused_weights(with_own_ce, "avg_ce") == pytest.approx(softmax(-4 / 8, -2 / 8))


@pytest.mark.parametrize("scope", SCOPES)
def test_fusellm_avg_ce_is_the_softmax_of_exp_of_minus_ce_per_sequence(scope: str) -> None:
    own = replace(case(target_of(0.9), target_of(0.1), target_of(0.5)), own_ce_N=np.array([2.0, 1.0, 1.5]))
    expected = softmax(math.exp(-2.0), math.exp(-1.0), math.exp(-1.5))
    assert fused_weights(own, "fusellm_avg_ce", scope, temperature=0.01) == pytest.approx(expected)
    weighted = replace(own, teacher_weights_N=np.array([1.0, 3.0, 9.0]))
    assert fused_weights(weighted, "fusellm_avg_ce", scope) == pytest.approx(expected)  # teacher weights are ignored
    assert fused_weights(weighted, "fusellm_min_ce", scope) == [0, 1, 0]
    without = replace(own, teacher_weights_N=np.array([1.0, 0.0, 9.0]))
    assert fused_weights(without, "fusellm_min_ce", scope) == [0, 0, 1]


def test_fusellm_without_own_ce_uses_nats_per_student_token() -> None:
    sample = case(target_of(0.9, 0.1), target_of(0.2, 0.6), num_bytes=[7, 9])
    reward_N = np.exp([np.log([0.9, 0.1]).mean(), np.log([0.2, 0.6]).mean()])
    assert fused_weights(sample, "fusellm_avg_ce") == pytest.approx(softmax(*reward_N), rel=1e-6)


def test_equal_teachers_share_by_their_weights() -> None:
    sample = case(target_of(0.5, 0.5), target_of(0.5, 0.5), target_of(0.1, 0.1), weights=[1, 3, 9])
    for scope in SCOPES:
        assert fused_weights(sample, "min_ce", scope) == pytest.approx([0.25, 0.75, 0])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["min_ce", "avg_ce", "confidence"])
def test_a_teacher_with_weight_zero_is_never_selected(method: str, scope: str) -> None:
    assert fused_weights(case(target_of(0.99), target_of(0.5), weights=[0, 2]), method, scope) == [0, 1]


def test_confidence_weighs_by_entropy_with_the_tail_as_one_bucket() -> None:
    confident, uncertain = rows_of({0: 0.9, 1: 0.05}, {0: 1.0}), rows_of({0: 0.25, 1: 0.25, 2: 0.25}, {0: 0.5, 4: 0.5})
    entropy = np.array([[-(0.9 * math.log(0.9) + 0.1 * math.log(0.05)), 0], [math.log(4), math.log(2)]])
    first, second = case(confident, uncertain), case(uncertain, confident)
    tokens = [softmax(*(-entropy[:, t] / 0.5)) for t in range(2)]
    assert fused_weights(first, "confidence", "token", 0.5) == pytest.approx(np.mean(tokens, axis=0).tolist(), rel=1e-6)
    expected = softmax(*(-entropy.mean(axis=1) / 0.5))
    assert fused_weights(first, "confidence", "sample", 0.5) == pytest.approx(expected, rel=1e-6)
    batch = fuse([first, second], FusionRule("confidence", "batch", 0.5), VOCAB_SIZE)
    np.testing.assert_allclose([fused.teacher_weights_N for fused in batch], 0.5)


def test_teachers_are_compared_at_positions_where_all_participating_teachers_are_valid() -> None:
    sample = case(
        target_of(0.9, 0.001), target_of(0.5, 0.9, gaps=[1]), target_of(0.1, 0.1, gaps=[0, 1]), weights=[1, 1, 0]
    )
    assert fused_weights(sample, "min_ce") == [1, 0, 0]
    fused = fuse([sample], FusionRule("min_ce"), VOCAB_SIZE)[0]
    assert fused.missing_N.tolist() == [0, 1, 0]  # a teacher with weight 0 is not missing


def test_teachers_without_common_positions_are_equal() -> None:
    disjoint = case(target_of(0.9, 0.9, gaps=[0]), target_of(0.1, 0.1, gaps=[1]), target_of(0.5, 0.5))
    fused = fuse([disjoint], FusionRule("min_ce"), VOCAB_SIZE)[0]
    assert fused.teacher_weights_N.tolist() == [0.25, 0.25, 0.5]
    assert fused.missing_N.tolist() == [1, 1, 0]


def test_where_the_selected_teacher_is_missing_the_weights_of_the_others_decide() -> None:
    sample = case(
        target_of(0.9, 0.9, 0.9, gaps=[2]), target_of(0.5, 0.5, 0.5), target_of(0.4, 0.4, 0.4), weights=[1, 1, 3]
    )
    assert fused_weights(sample, "min_ce") == pytest.approx([2 / 3, 0.25 / 3, 0.75 / 3])
    routed = replace(sample, teacher_weights_N=np.array([1.0, 0.0, 0.0]))
    alone = fuse([routed], FusionRule("mean"), VOCAB_SIZE)[0]
    assert alone.target.valid.tolist() == [True, True, False]  # teachers with weight 0 give no target
    assert alone.teacher_weights_N.tolist() == [1, 0, 0]


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_a_teacher_without_any_valid_row_does_not_prevent_the_comparison_of_the_others(scope: str) -> None:
    unavailable = target_of(0.9, 0.9, gaps=[0, 1])
    for method, few in (("min_ce", [1.0, 0.0]), ("avg_ce", None)):
        both = case(target_of(0.9, 0.9), target_of(0.1, 0.1))
        pair = fuse([both], FusionRule(method, scope), VOCAB_SIZE)[0].teacher_weights_N
        three = fuse(
            [case(target_of(0.9, 0.9), target_of(0.1, 0.1), unavailable)], FusionRule(method, scope), VOCAB_SIZE
        )[0].teacher_weights_N
        np.testing.assert_allclose(three, [*pair, 0.0])
        assert few is None or pair.tolist() == few


def test_scope_batch_compares_teachers_over_samples_with_the_same_participating_teachers() -> None:
    """A is worse than B where both take part; in the sample where A is good, it is the only one."""
    both, alone = case(target_of(0.4), target_of(0.5)), case(target_of(0.99), target_of(0.5), weights=[1, 0])
    first, second = fuse([both, alone], FusionRule("min_ce", "batch"), VOCAB_SIZE)
    assert (first.teacher_weights_N.tolist(), second.teacher_weights_N.tolist()) == ([0, 1], [1, 0])


def test_a_label_that_is_not_listed_counts_with_the_whole_tail() -> None:
    unlisted, listed = rows_of({OTHER: 0.4}), rows_of({LABEL: 0.5, OTHER: 0.5})
    assert fused_weights(case(unlisted, listed), "min_ce") == [1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", FUSION_METHODS)
def test_a_label_with_probability_zero_gives_finite_weights(method: str, scope: str, temperature: float) -> None:
    sample = case(target_of(0.0, 0.5, gaps=[1]), target_of(0.0, 0.9), target_of(0.0, 0.1))
    fused = fuse([sample], FusionRule(method, scope, temperature), VOCAB_SIZE)[0]
    assert fused.teacher_weights_N.sum() == pytest.approx(1)
    np.testing.assert_allclose(fused.target.mass + fused.target.tail, 1, atol=1e-6)


@given(seeds=SEEDS)
def test_min_ce_per_token_gives_the_label_at_least_the_probability_of_every_teacher(seeds: list[int]) -> None:
    sample = replace(random_sample(seeds), teacher_weights_N=np.ones(len(seeds)))
    fused = fuse([sample], FusionRule("min_ce", "token"), VOCAB_SIZE)[0].target
    listed = np.array([target.prob_of(sample.labels_T) for target in sample.targets])
    tails = np.array([target.tail for target in sample.targets])
    best = np.where(listed > 0, listed, tails).max(axis=0)
    result = fused.prob_of(sample.labels_T)
    assert (np.where(result > 0, result, fused.tail) >= best - 1e-6).all()


def test_text_nats_cover_the_common_positions_of_the_available_teachers() -> None:
    sample = case(
        target_of(0.5, 0.5, 0.5),
        target_of(0.1, 0.2, 0.4, gaps=[0]),
        target_of(1, 1, 1, gaps=[0, 1, 2]),
        num_bytes=[5, 2, 0],
    )
    nats_N, bytes_N = text_nats(sample, VOCAB_SIZE)
    np.testing.assert_allclose(nats_N, [-2 * math.log(0.5), -math.log(0.2 * 0.4), 0], rtol=1e-6)
    assert bytes_N.tolist() == [2, 2, 0]


def with_target(change: Callable[[Target], Target]) -> FusionInput:
    return replace(ONE, targets=(ONE.targets[0], change(ONE.targets[1])))


def with_ids(*ids: int) -> FusionInput:
    return with_target(lambda target: replace(target, ids=np.array(ids, dtype=np.int32)))


def with_probs(*probs: float) -> FusionInput:
    return with_target(lambda target: replace(target, probs=np.array(probs, dtype=np.float32)))


INVALID = {
    "no teacher": (replace(ONE, targets=()), "expected 1 to 16 teachers, received 0"),
    "17 teachers": (replace(ONE, targets=ONE.targets[:1] * 17), "expected 1 to 16 teachers, received 17"),
    "targets": (with_target(lambda t: t.from_position(1)), r"expected 2 positions.* received \[2, 1\] from the teach"),
    "labels": (replace(ONE, labels_T=np.array([1, 2, 3])), r"expected 3 positions.* received \[2, 2\]"),
    "bytes": (replace(ONE, num_bytes_T=np.array([1])), "received .* and 1 byte counts"),
    "negative bytes": (replace(ONE, num_bytes_T=np.array([1, -1])), "byte counts ≥ 0, received -1"),
    "label": (replace(ONE, labels_T=np.array([1, 12])), "labels from 0 to 11, received 1 to 12"),
    "number of weights": (
        replace(ONE, teacher_weights_N=np.ones(3)), r"teacher_weights_N to be 2 numbers ≥ 0, received \[1.0, 1.0, 1.0\]"
    ),
    "negative weight": (replace(ONE, teacher_weights_N=np.array([1.0, -1.0])), r"numbers ≥ 0, received \[1.0, -1.0\]"),
    "weight of nan": (replace(ONE, teacher_weights_N=np.array([1.0, math.nan])), "numbers ≥ 0, received"),
    "weights of 0": (replace(ONE, teacher_weights_N=np.zeros(2)), r"not all 0, received \[0.0, 0.0\]"),
    "own losses": (replace(ONE, own_ce_N=np.ones(1)), "own_ce_N to be 2 numbers"),
    "id": (with_ids(3, 5, 3, 12), "teacher 1, position 1: expected distinct ids from 0 to 11 .* ids from 3 to 12"),
    "negative id": (with_ids(3, 5, -1, 5), "teacher 1, position 1: .* ids from -1 to 5"),
    "repeated id": (with_ids(3, 3, 3, 5), "teacher 1, position 0: .* received 1 distinct of 2 ids"),
    "sum": (with_probs(0.2, 0.7, 0.5, 0.5), "teacher 1, position 0: .* sum to 1 with the tail.* the sum 0.9"),
    "negative": (with_probs(0.2, 0.8, 1.5, -0.5), "position 1: .* the lowest probability -0.5"),
    "nan": (with_probs(0.2, 0.8, math.nan, 0.5), "position 1: .* the sum nan"),
    "offsets": (with_target(lambda t: replace(t, offsets=np.array([0, 5, 4]))), "offsets that rise from 0"),
    "tail": (with_target(lambda t: replace(t, tail=t.tail[:1])), "3 offsets and 1 tails for 2 positions"),
}  # fmt: skip


@pytest.mark.parametrize("what", INVALID)
def test_invalid_inputs_are_rejected_with_values_sample_and_teacher(what: str) -> None:
    sample, message = INVALID[what]
    with pytest.raises(ValueError, match=f"sample 0 of the batch.*{message}"):
        fuse([sample], FusionRule(), VOCAB_SIZE)


def test_a_sample_with_another_number_of_teachers_than_the_first_is_rejected() -> None:
    with pytest.raises(ValueError, match="sample 1 of the batch: expected 2 teachers as in sample 0, received 1"):
        fuse([ONE, case(target_of(0.5))], FusionRule(), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"method": "median"},
            f"fusion method: expected one of {', '.join(FUSION_METHODS)}, received 'median'",
        ),
        ({"scope": "world"}, "fusion scope: expected one of token, sample, batch, received 'world'"),
        ({"temperature": 0.0}, "fusion temperature: expected a finite number above 0, received 0.0"),
        ({"temperature": math.nan}, "received nan"),
        ({"top_k": 0}, "fusion top_k: expected 1 or more, or None to keep all entries, received 0"),
    ],
)
def test_an_invalid_rule_is_rejected_with_the_value_and_the_choices(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FusionRule(), **wrong)  # type: ignore[arg-type]


# --- teacher weights of a sample ---


def weights_of(method: FusionMethod, sample: Sample, scheduled_N: list[float], available: list[bool]) -> list[float]:
    weights: list[float] = method.teacher_weights(sample, np.array(scheduled_N), np.array(available)).tolist()
    return weights


@pytest.mark.parametrize("name", FUSION_METHODS)
def test_methods_keep_the_proportions_of_scheduled_weights_until_they_observe_text(name: str) -> None:
    method = fusion_method(name)(["a", "b"], FusionConfig())
    a, b = weights_of(method, Sample(0, "s", teacher="b"), [0.2, 0.8], [True, True])
    assert a / (a + b) == pytest.approx(0.0 if name == "router" else 0.2)
    assert (method.state() is not None) == method.observes_text


def test_the_configuration_accepts_every_registered_method() -> None:
    for name in FUSION_METHODS:
        assert FusionConfig(method=name).method == name


def test_the_registry_imports_no_heavy_library() -> None:
    code = "import sys, trainer.fusion; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'numba')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_router_selects_the_teacher_that_the_sample_names() -> None:
    router = Router(["a", "b", "c"], FusionConfig())
    assert weights_of(router, Sample(0, "s", teacher="b"), [1, 1, 1], [True] * 3) == [0, 1, 0]
    for teacher in ("d", None):
        with pytest.raises(ValueError, match=f"router: expected one of a, b, c, received {teacher!r}"):
            weights_of(router, Sample(0, "s", teacher=teacher), [1, 1, 1], [True] * 3)


def test_adaptive_weights_multiply_the_scheduled_weights_by_the_running_weights() -> None:
    config = FusionConfig(method="adaptive", margin_bpb=0.5, temperature=0.2)
    method, sample = Adaptive(["a", "b", "c"], config), Sample(0, "s", domain="code")
    assert weights_of(method, sample, [1, 2, 1], [True] * 3) == pytest.approx([1 / 3, 2 / 3, 1 / 3])
    nats_N, bytes_N = np.array([0.8, 1.0, 1.4]) * 10 * math.log(2), np.array([10, 10, 10])
    method.observe("code", nats_N, bytes_N)
    a, b = softmax(0, -0.2 / 0.2)
    assert weights_of(method, sample, [1, 2, 1], [True] * 3) == pytest.approx([a, 2 * b, 0])
    assert weights_of(method, sample, [1, 2, 1], [False, False, True]) == [1, 2, 1]  # only teachers without weight


def test_the_state_of_adaptive_fusion_is_restored_by_teacher_name() -> None:
    config = FusionConfig(method="adaptive", margin_bpb=5.0)
    method, sample = Adaptive(["a", "b"], config), Sample(0, "s", domain="x")
    method.observe("x", np.array([5.0, 15.0]), np.array([10, 10]))
    restored = Adaptive(["b", "a"], config)
    restored.load_state(json.loads(json.dumps(method.state())))
    expected = weights_of(method, sample, [1, 1], [True, True])
    assert weights_of(restored, sample, [1, 1], [True, True]) == expected[::-1]
    with pytest.raises(
        CheckpointError, match="statistics of the teachers a, b, this run has a, c; resume with the same"
    ):
        Adaptive(["a", "c"], config).load_state(method.state())


# --- schedules ---


def test_schedules_move_from_start_to_end() -> None:
    start, end = [2.0, 2.0], [0.0, 5.0]
    for schedule in SCHEDULES:
        assert scheduled(start, end, schedule, 0.0).tolist() == [0.5, 0.5]
    assert scheduled(start, end, "constant", 1.0).tolist() == [0.5, 0.5]
    assert scheduled(start, end, "linear", 0.25) == pytest.approx([0.375, 0.625])
    assert scheduled(start, end, "cosine", 0.5) == pytest.approx([0.25, 0.75])
    assert scheduled(start, end, "cosine", 0.1)[0] > scheduled(start, end, "linear", 0.1)[0]
    for schedule in SCHEDULES[1:]:
        assert scheduled(start, end, schedule, 1.0) == pytest.approx([0, 1])
    assert (start, end) == ([2.0, 2.0], [0.0, 5.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0], "sine", 0.5), "expected one of constant, linear, cosine, received 'sine'"),
        (([1.0], [1.0], "linear", 1.5), "progress from 0 to 1, received 1.5"),
        (([1.0], [1.0, 2.0], "linear", 0.5), "expected 1 weights at the end, as at the start, received 2"),
        (([1.0], [0.0], "linear", 0.5), r"end: expected numbers ≥ 0 that are not all 0, received \[0.0\]"),
    ],
)
def test_an_invalid_schedule_is_rejected(arguments: tuple[list[float], list[float], str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduled(*arguments)


# --- running bits per byte ---

RUNNING = RunningBitsPerByte(("a", "b", "c"), half_life_bytes=1000, margin=0.5, temperature=0.2)


def updated(
    running: RunningBitsPerByte, domain: str, bpb: Sequence[float], num_bytes: Sequence[int]
) -> RunningBitsPerByte:
    nats = [b * n * math.log(2) for b, n in zip(bpb, num_bytes, strict=True)]
    return running.updated(domain, nats, num_bytes)


def test_running_weights_are_equal_at_first_then_a_softmax_within_the_margin() -> None:
    after = updated(RUNNING, "code", [0.8, 1.0, 1.4], [10, 10, 10])
    a, b = softmax(0, -0.2 / 0.2)
    assert after.weights("code") == pytest.approx([a, b, 0])
    assert after.weights("law") == pytest.approx([1 / 3] * 3)
    assert RUNNING.weights("code") == pytest.approx([1 / 3] * 3)  # values are immutable


def test_running_bits_are_exact_from_the_first_byte_and_halfway_after_a_half_life() -> None:
    first = updated(RUNNING, "code", [2.0, 2.0, 2.0], [1, 100_000, 0])
    assert [bpb for bpb, _ in first.averages["code"][:2]] == pytest.approx([2.0, 2.0])
    later = updated(first, "code", [1.0, 1.0, 1.0], [0, 1000, 0])
    assert [bpb for bpb, _ in later.averages["code"][:2]] == pytest.approx([2.0, 1.5])
    assert later.averages["code"][2] == (0.0, 0.0)


def test_a_teacher_without_text_of_a_domain_counts_as_the_best() -> None:
    assert updated(RUNNING, "code", [1.0, 2.0, 0.0], [10, 10, 0]).weights("code") == pytest.approx([0.5, 0, 0.5])


@given(
    parts=st.lists(st.tuples(st.floats(0, 8), st.integers(1, 5000)), min_size=1, max_size=6),
    cut=st.floats(0.1, 0.9),
)
def test_running_bits_are_between_the_observed_values_and_do_not_depend_on_splits(
    parts: list[tuple[float, int]], cut: float
) -> None:
    whole = halves = RunningBitsPerByte(("a",), half_life_bytes=700, margin=1)
    for bpb, num_bytes in parts:
        whole = updated(whole, "x", [bpb], [num_bytes])
        first = int(cut * num_bytes)
        halves = updated(updated(halves, "x", [bpb], [first]), "x", [bpb], [num_bytes - first])
    (average, total), (split_average, split_total) = whole.averages["x"][0], halves.averages["x"][0]
    assert [average, total] == pytest.approx([split_average, split_total], abs=1e-9)
    assert min(b for b, _ in parts) - 1e-9 <= average <= max(b for b, _ in parts) + 1e-9


def test_running_bits_are_restored_from_json() -> None:
    after = updated(updated(RUNNING, "code", [0.8, 1.0, 1.4], [10, 20, 0]), "law", [1, 2, 3], [5, 5, 5])
    assert RunningBitsPerByte.from_state(json.loads(json.dumps(after.state(), allow_nan=False))) == after


def test_invalid_running_bits_are_rejected() -> None:
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
    state = {**RUNNING.state(), "averages": {"code": [[1.0, 0.5]]}}
    with pytest.raises(ValueError, match="domain 'code': .* for each of 3 teachers"):
        RunningBitsPerByte.from_state(state)


def test_adaptive_fusion_is_the_mean_by_running_weights() -> None:
    running = updated(RUNNING, "code", [0.8, 0.8, 3.0], [10, 10, 10])
    weights = running.weights("code") * [1, 3, 1]
    sample = case(target_of(0.9), target_of(0.5), target_of(0.1), weights=weights.tolist())
    fused = fuse([sample], FusionRule("adaptive"), VOCAB_SIZE)[0]
    np.testing.assert_allclose(dense(fused.target)[0, [LABEL, OTHER]], [0.6, 0.4], rtol=1e-6)
