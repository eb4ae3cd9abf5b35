"""Properties of fusion for random targets, every method and every scope, and dense float64 references."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from alignment.target import Target, target_from_entries
from trainer.fusion import FUSION_METHODS
from trainer.fusion.base import SCOPES, FusionRule, fusion_method
from trainer.fusion.fuse import FusedTarget, fuse
from trainer.fusion.inputs import FusionInput

VOCAB_SIZE, POSITIONS = 12, 6

Floats = NDArray[np.float64]

RULES = [FusionRule(method, scope, temperature=0.7) for method in FUSION_METHODS for scope in SCOPES]
ARITHMETIC = [rule for rule in RULES if fusion_method(rule.method).mean == "arithmetic"]
WEIGHTS_ONLY = ("mean", "adaptive", "router")  # methods whose scores are 0: `fuse` applies the teacher weights alone
GEOMETRIC = FusionRule("geometric")
SEEDS = st.lists(st.integers(0, 10_000), min_size=1, max_size=5, unique=True)


def name_of(rule: FusionRule) -> str:
    return f"{rule.method} {rule.scope}"


def random_target(seed: int, holes: bool = True, tail: bool = True) -> Target:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(VOCAB_SIZE + 1, 0.3), size=POSITIONS)[:, :VOCAB_SIZE]
    probs[rng.random(probs.shape) < 0.3] = 0
    probs[:, seed % VOCAB_SIZE] = 0  # a row that lists the whole vocabulary would have no tail
    if not tail:
        probs /= probs.sum(axis=1, keepdims=True)
    valid = rng.random(POSITIONS) < 0.7 if holes else np.ones(POSITIONS, dtype=bool)
    rows, ids = np.nonzero(probs)
    return target_from_entries(rows, ids.astype(np.int32), probs[rows, ids], valid)


def input_of(targets: Sequence[Target], weights: Sequence[float] | None = None, seed: int = 0) -> FusionInput:
    rng = np.random.default_rng(seed)
    return FusionInput(
        tuple(targets),
        labels_T=rng.integers(0, VOCAB_SIZE, POSITIONS),
        num_bytes_T=rng.integers(0, 5, POSITIONS),
        teacher_weights_N=np.asarray([1.0] * len(targets) if weights is None else weights),
    )


def random_sample(seeds: Sequence[int], holes: bool = True) -> FusionInput:
    """Random teachers; every third has no tails, and every fourth has weight 0 if another has more."""
    targets = [random_target(s, holes, tail=s % 3 > 0) for s in seeds]
    weights = [0.0 if s % 4 == 0 else 0.1 + s % 7 for s in seeds]
    return input_of(targets, weights if any(weights) else None, seed=sum(seeds))


def fuse_one(sample: FusionInput, rule: FusionRule) -> FusedTarget:
    return fuse([sample], rule, VOCAB_SIZE)[0]


def dense(target: Target) -> Floats:
    """[T, V + 1] with the tail in the last column."""
    out = np.zeros((len(target), VOCAB_SIZE + 1))
    out[target.rows, target.ids] = target.probs
    out[:, -1] = target.tail
    return out


def with_uniform_tail(target: Target) -> Floats:
    """[T, V] with the tail distributed uniformly over the ids that are not listed."""
    full = dense(target)
    unlisted = np.ones((len(target), VOCAB_SIZE), dtype=bool)
    unlisted[target.rows, target.ids] = False
    count = np.maximum(unlisted.sum(axis=1, keepdims=True), 1)
    out: Floats = full[:, :-1] + np.where(unlisted, full[:, -1:] / count, 0)
    return out


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@given(seeds=SEEDS, more=st.integers(0, 10_000))
def test_mass_and_tail_sum_to_one_where_any_teacher_is_valid(rule: FusionRule, seeds: list[int], more: int) -> None:
    batch = [random_sample(seeds), random_sample([s + more for s in seeds])]
    for sample, fused in zip(batch, fuse(batch, replace(rule, top_k=5), VOCAB_SIZE), strict=True):
        participating = [t.valid & (w > 0) for t, w in zip(sample.targets, sample.teacher_weights_N, strict=True)]
        any_valid = np.logical_or.reduce(participating)
        target = fused.target
        np.testing.assert_array_equal(target.valid, any_valid)
        np.testing.assert_allclose(target.mass + target.tail, any_valid, atol=1e-6)
        assert np.diff(target.offsets).max(initial=0) <= 5
        assert (target.probs > 0).all()
        assert [a.dtype.name for a in (target.ids, target.probs, target.tail)] == ["int32", "float32", "float32"]
        assert fused.teacher_weights_N.sum() == pytest.approx(1.0 if any_valid.any() else 0.0)
        missing = [
            any_valid & ~t.valid & (w > 0) for t, w in zip(sample.targets, sample.teacher_weights_N, strict=True)
        ]
        assert fused.missing_N.tolist() == [int(m.sum()) for m in missing]


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@given(seed=st.integers(0, 10_000))
def test_one_teacher_is_returned_unchanged_except_for_the_cut(rule: FusionRule, seed: int) -> None:
    target = random_target(seed, tail=seed % 3 > 0)
    tolerance = 1e-6 if rule.method == "geometric" else 0
    np.testing.assert_allclose(dense(fuse_one(input_of([target]), rule).target), dense(target), rtol=0, atol=tolerance)
    cut = fuse_one(input_of([target]), replace(rule, top_k=3)).target
    np.testing.assert_allclose(dense(cut), dense(target.cut(3)), atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@given(seed=st.integers(0, 10_000), copies=st.integers(2, 16))
def test_identical_teachers_fuse_to_one(rule: FusionRule, seed: int, copies: int) -> None:
    target = random_target(seed, tail=seed % 3 > 0)
    weights = np.random.default_rng(seed).random(copies) + 0.1
    fused = fuse_one(input_of([target] * copies, weights.tolist()), rule)
    np.testing.assert_allclose(dense(fused.target), dense(target), atol=1e-6)
    assert fused.num_fallbacks == 0


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@given(seeds=SEEDS, random=st.randoms(use_true_random=False))
def test_the_order_of_teachers_does_not_matter(rule: FusionRule, seeds: list[int], random: Random) -> None:
    sample = random_sample(seeds)
    order = list(range(len(seeds)))
    random.shuffle(order)
    other = replace(
        sample, targets=tuple(sample.targets[i] for i in order), teacher_weights_N=sample.teacher_weights_N[order]
    )
    first, second = fuse_one(sample, rule), fuse_one(other, rule)
    np.testing.assert_allclose(dense(first.target), dense(second.target), atol=1e-6)
    np.testing.assert_allclose(first.teacher_weights_N[order], second.teacher_weights_N, atol=1e-9)
    np.testing.assert_array_equal(first.missing_N[order], second.missing_N)


def slow_loss(sample: FusionInput, rule: FusionRule, n: int, t: int) -> tuple[float, float]:
    """The loss of teacher n at position t and its units: bits and bytes, or nats of entropy and 1."""
    row = dense(sample.targets[n])[t]
    if rule.method == "confidence":
        return -sum(p * np.log(p) for p in row if p > 0), 1.0
    bits = -np.log2(max(row[sample.labels_T[t]] or row[-1], np.finfo(np.float32).tiny))
    if rule.method.startswith("fusellm"):
        return bits * np.log(2), 1.0
    return bits, float(sample.num_bytes_T[t])


def participating_teachers(sample: FusionInput, rule: FusionRule) -> list[int]:
    """Teachers with weight above 0 that, except for the methods of FuseLLM, have a valid row in the sample."""
    fusellm = rule.method.startswith("fusellm")
    return [n for n, t in enumerate(sample.targets) if sample.teacher_weights_N[n] > 0 and (fusellm or t.valid.any())]


def slow_losses(batch: Sequence[FusionInput], rule: FusionRule, i: int, t: int) -> list[float] | None:
    """The loss of each participating teacher for position t of sample i; None where nothing can be compared."""
    teachers = participating_teachers(batch[i], rule)
    if not teachers:
        return None
    if rule.scope == "token" and not rule.method.startswith("fusellm"):
        pairs = [slow_loss(batch[i], rule, n, t) for n in teachers]
        return [amount / max(units, 1) for amount, units in pairs]
    pool = batch if rule.scope == "batch" and not rule.method.startswith("fusellm") else batch[i : i + 1]
    totals, units_seen, anywhere = [0.0] * len(teachers), 0.0, False
    for sample in pool:
        if participating_teachers(sample, rule) != teachers:
            continue
        common = [s for s in range(POSITIONS) if all(sample.targets[n].valid[s] for n in teachers)]
        anywhere |= bool(common)
        for s in common:
            for j, n in enumerate(teachers):
                totals[j] += slow_loss(sample, rule, n, s)[0]
        units = sum(slow_loss(sample, rule, teachers[0], s)[1] for s in common)
        units_seen += max(units, 1.0) if common else 0.0
    return [total / units_seen for total in totals] if anywhere else None


def slow_weights(batch: Sequence[FusionInput], rule: FusionRule, i: int, t: int) -> Floats:
    """[N] weights of one position, computed teacher by teacher from the definitions."""
    sample = batch[i]
    valid = np.array([bool(target.valid[t]) for target in sample.targets])
    teachers = np.array(participating_teachers(sample, rule), dtype=int)
    factor = np.zeros(len(valid))
    losses = None if rule.method in WEIGHTS_ONLY else slow_losses(batch, rule, i, t)
    per_token = rule.scope == "token" and not rule.method.startswith("fusellm")
    best = min((x for x, n in zip(losses or [], teachers, strict=False) if valid[n] or not per_token), default=0.0)
    for j, n in enumerate(teachers):
        loss = losses[j] if losses is not None else best
        if rule.method in ("min_ce", "fusellm_min_ce"):
            factor[n] = abs(loss - best) < 1e-12
        elif rule.method == "fusellm_avg_ce":
            factor[n] = np.exp(np.exp(-loss)) if losses is not None else 1.0
        elif rule.method not in WEIGHTS_ONLY:
            factor[n] = np.exp((best - loss) / rule.temperature)
        else:
            factor[n] = 1.0
    given = (sample.teacher_weights_N > 0) * 1.0 if rule.method.startswith("fusellm") else sample.teacher_weights_N
    for weights in (factor * given * valid, sample.teacher_weights_N * valid):
        if weights.any():
            return np.asarray(weights / weights.sum())
    return np.zeros(len(valid))


@pytest.mark.parametrize("rule", ARITHMETIC, ids=name_of)
@given(seeds=SEEDS, more=st.integers(0, 10_000))
def test_arithmetic_methods_equal_the_weighted_sum_of_the_reference(
    rule: FusionRule, seeds: list[int], more: int
) -> None:
    batch = [random_sample(seeds), random_sample([s + more for s in seeds])]
    for i, fused in enumerate(fuse(batch, rule, VOCAB_SIZE)):
        weights = np.stack([slow_weights(batch, rule, i, t) for t in range(POSITIONS)], axis=1)
        each = np.stack([dense(target) for target in batch[i].targets])
        np.testing.assert_allclose(dense(fused.target), (weights[:, :, None] * each).sum(axis=0), atol=1e-6)


@pytest.mark.parametrize("rule", ARITHMETIC, ids=name_of)
@given(seeds=SEEDS)
def test_arithmetic_methods_are_between_their_teachers(rule: FusionRule, seeds: list[int]) -> None:
    sample = random_sample(seeds)
    each = np.stack([dense(t) for t in sample.targets])
    valid = np.stack([t.valid for t in sample.targets])[:, :, None]
    fused = fuse_one(sample, rule).target
    result = dense(fused)[fused.valid]
    assert (result >= np.where(valid, each, np.inf).min(axis=0)[fused.valid] - 1e-6).all()
    assert (result <= np.where(valid, each, -np.inf).max(axis=0)[fused.valid] + 1e-6).all()


def position_weights(sample: FusionInput) -> Floats:
    """[N, T] weights of mean and geometric, position by position."""
    out = np.zeros((len(sample.targets), POSITIONS))
    for t in range(POSITIONS):
        valid = np.array([bool(target.valid[t]) for target in sample.targets])
        weights = sample.teacher_weights_N * valid
        out[:, t] = weights / max(weights.sum(), 1e-300)
    return out


@given(seeds=SEEDS)
def test_the_arithmetic_mean_is_the_weighted_sum(seeds: list[int]) -> None:
    sample = random_sample(seeds)
    expected = sum(w[:, None] * dense(t) for w, t in zip(position_weights(sample), sample.targets, strict=True))
    fused = fuse_one(sample, FusionRule("mean"))
    np.testing.assert_allclose(dense(fused.target), expected, atol=1e-6)
    num_valid = max(int(fused.target.valid.sum()), 1)
    np.testing.assert_allclose(fused.teacher_weights_N, position_weights(sample).sum(axis=1) / num_valid)


@given(seeds=SEEDS)
def test_the_geometric_mean_is_the_normalized_product_with_uniform_tails(seeds: list[int]) -> None:
    sample = random_sample(seeds)
    weights = position_weights(sample)
    fused = fuse_one(sample, GEOMETRIC)
    result, fallbacks = dense(fused.target), 0
    means = sum(w[:, None] * dense(t) for w, t in zip(weights, sample.targets, strict=True))
    for t in np.flatnonzero(fused.target.valid):
        used = [n for n in range(len(seeds)) if weights[n, t] > 0]
        product = np.prod([with_uniform_tail(sample.targets[n])[t] ** weights[n, t] for n in used], axis=0)
        if product.sum() == 0:
            fallbacks += 1
            np.testing.assert_allclose(result[t], np.asarray(means)[t], atol=1e-6)
            continue
        product /= product.sum()
        listed = np.any([dense(sample.targets[n])[t, :-1] > 0 for n in used], axis=0)
        np.testing.assert_allclose(result[t, :-1], np.where(listed, product, 0), atol=1e-6)
        assert result[t, -1] == pytest.approx(product[~listed].sum(), abs=1e-6)
    assert fused.num_fallbacks == fallbacks


def kl(p: Floats, q: Floats) -> float:
    return float(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.maximum(q, 1e-300)), 0).sum())


@given(seeds=st.lists(st.integers(0, 10_000), min_size=2, max_size=4, unique=True), noise=st.integers(0, 10_000))
def test_no_nearby_distribution_has_less_forward_kl_than_the_mean(seeds: list[int], noise: int) -> None:
    sample = input_of([random_target(s, holes=False) for s in seeds], [1.0 + s % 5 for s in seeds])
    weights = sample.teacher_weights_N / sample.teacher_weights_N.sum()
    fused = dense(fuse_one(sample, FusionRule("mean")).target)
    near = fused * np.exp(np.random.default_rng(noise).normal(scale=0.05, size=fused.shape))
    near /= near.sum(axis=1, keepdims=True)

    def objective(q: Floats) -> float:
        return sum(float(w) * kl(dense(t), q) for w, t in zip(weights, sample.targets, strict=True))

    assert objective(fused) < objective(near)


@given(seeds=st.lists(st.integers(0, 10_000), min_size=2, max_size=4, unique=True), noise=st.integers(0, 10_000))
def test_no_nearby_distribution_has_less_reverse_kl_than_the_geometric_mean(seeds: list[int], noise: int) -> None:
    sample = input_of([random_target(s, holes=False) for s in seeds], [1.0 + s % 5 for s in seeds])
    weights = sample.teacher_weights_N / sample.teacher_weights_N.sum()
    fused = with_uniform_tail(fuse_one(sample, GEOMETRIC).target)
    near = fused * np.exp(np.random.default_rng(noise).normal(scale=0.05, size=fused.shape))
    near /= near.sum(axis=1, keepdims=True)

    def objective(q: Floats) -> float:
        return sum(float(w) * kl(q, with_uniform_tail(t)) for w, t in zip(weights, sample.targets, strict=True))

    assert objective(fused) < objective(near)


def rows_of(*rows: dict[int, float]) -> Target:
    """A valid target of the given rows; the rest of each row is its tail."""
    return target_from_entries(
        np.repeat(np.arange(len(rows)), [len(row) for row in rows]),
        np.array([i for row in rows for i in row], dtype=np.int32),
        np.array([p for row in rows for p in row.values()]),
        np.ones(len(rows), dtype=bool),
    )


def equal_weights(*targets: Target) -> FusionInput:
    ones = np.ones(len(targets[0]), dtype=np.int64)
    return FusionInput(targets, labels_T=ones, num_bytes_T=ones, teacher_weights_N=np.ones(len(targets)))


def test_in_a_geometric_mean_a_teacher_without_a_tail_excludes_ids_that_it_does_not_list() -> None:
    fused = fuse_one(equal_weights(rows_of({0: 0.5, 1: 0.5}), rows_of({1: 0.2, 2: 0.4})), GEOMETRIC).target
    assert (fused.ids.tolist(), fused.tail.tolist()) == ([0, 1], [0])
    product = np.sqrt([0.5 * 0.4 / 10, 0.5 * 0.2])
    np.testing.assert_allclose(fused.probs, product / product.sum(), rtol=1e-6)


def test_disjoint_teachers_without_tails_fall_back_to_the_arithmetic_mean() -> None:
    fused = fuse_one(equal_weights(rows_of({0: 1.0}, {3: 1.0}), rows_of({1: 1.0}, {3: 0.5})), GEOMETRIC)
    assert fused.num_fallbacks == 1
    np.testing.assert_allclose(dense(fused.target)[0, :2], [0.5, 0.5])
    assert dense(fused.target)[1, 3] == 1


@pytest.mark.parametrize("top_k", [1, 2, 4, 7, 12, 100])
@pytest.mark.parametrize("rule", [FusionRule("mean"), GEOMETRIC], ids=name_of)
@given(seeds=SEEDS)
def test_top_k_keeps_the_most_likely_ids_and_adds_the_rest_to_the_tail(
    rule: FusionRule, top_k: int, seeds: list[int]
) -> None:
    sample = random_sample(seeds)
    expected = fuse_one(sample, rule).target.cut(top_k)
    cut = fuse_one(sample, replace(rule, top_k=top_k)).target
    np.testing.assert_allclose(dense(cut)[:, :-1], dense(expected)[:, :-1], rtol=1e-6)  # implies equal ids
    np.testing.assert_allclose(cut.tail, expected.tail, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4, 7, 12])
@pytest.mark.parametrize("rule", RULES, ids=name_of)
@given(seeds=SEEDS)
def test_the_cut_keeps_the_label_of_a_sample_that_asks_for_it_wherever_it_is_listed(
    rule: FusionRule, top_k: int, seeds: list[int]
) -> None:
    sample = random_sample(seeds)
    whole, plain = fuse_one(sample, rule).target, fuse_one(sample, replace(rule, top_k=top_k)).target
    kept = fuse_one(replace(sample, keeps_label=True), replace(rule, top_k=top_k)).target
    np.testing.assert_array_equal(kept.valid, plain.valid)
    np.testing.assert_array_equal(np.diff(kept.offsets), np.diff(plain.offsets))
    np.testing.assert_allclose(kept.mass + kept.tail, kept.valid, atol=1e-6)
    for label, rows in zip(
        sample.labels_T.tolist(), zip(*map(row_dicts, (whole, plain, kept)), strict=True), strict=True
    ):
        whole_row, plain_row, kept_row = rows
        if label in plain_row or label not in whole_row:
            assert kept_row == plain_row
        else:
            least = min(plain_row, key=lambda i: (plain_row[i], -i))
            assert kept_row == {i: p for i, p in plain_row.items() if i != least} | {label: whole_row[label]}


def row_dicts(target: Target) -> list[dict[int, float]]:
    rows: list[dict[int, float]] = [{} for _ in range(len(target))]
    for row, token, prob in zip(target.rows.tolist(), target.ids.tolist(), target.probs.tolist(), strict=True):
        rows[row][token] = prob
    return rows


@given(ids=st.lists(st.integers(0, 299), min_size=1, max_size=200, unique=True), top_k=st.integers(1, 40))
def test_top_k_keeps_the_lowest_ids_among_equal_probabilities(ids: list[int], top_k: int) -> None:
    row = {i: 0.004 if i % 3 else 0.002 for i in ids}
    fused = fuse([equal_weights(rows_of(row))], FusionRule(top_k=top_k), 300)[0].target
    assert sorted(fused.ids.tolist()) == sorted(sorted(ids, key=lambda i: (-row[i], i))[:top_k])
    assert fused.tail[0] == pytest.approx(1 - fused.probs.sum(dtype=np.float64), abs=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_writable_inputs_are_not_changed(rule: FusionRule) -> None:
    sample, copy = random_sample([1, 2, 3]), random_sample([1, 2, 3])
    read_only = random_sample([1, 2, 3])
    for target in read_only.targets:
        for array in (target.offsets, target.ids, target.probs, target.tail, target.valid):
            array.flags.writeable = False
    first, second = fuse_one(sample, replace(rule, top_k=2)), fuse_one(read_only, replace(rule, top_k=2))
    np.testing.assert_array_equal(dense(first.target), dense(second.target))
    for target, original in zip(sample.targets, copy.targets, strict=True):
        for name in ("offsets", "ids", "probs", "tail", "valid"):
            np.testing.assert_array_equal(getattr(target, name), getattr(original, name))
    for name in ("labels_T", "num_bytes_T", "teacher_weights_N"):
        np.testing.assert_array_equal(getattr(sample, name), getattr(copy, name))


def test_sixteen_teachers_are_fused() -> None:
    sample = input_of([random_target(s, holes=False) for s in range(16)])
    fused = fuse_one(sample, FusionRule("mean"))
    np.testing.assert_allclose(dense(fused.target), np.mean([dense(t) for t in sample.targets], axis=0), atol=1e-6)
    np.testing.assert_allclose(fused.teacher_weights_N, np.full(16, 1 / 16))


def test_threads_give_the_same_results_as_one_thread() -> None:
    samples = [random_sample([s, s + 1, s + 2]) for s in range(24)]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda sample: fuse_one(sample, GEOMETRIC), samples))
    for result, expected in zip(threaded, fuse(samples, GEOMETRIC, VOCAB_SIZE), strict=True):
        np.testing.assert_array_equal(dense(result.target), dense(expected.target))


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_empty_inputs_give_empty_results(rule: FusionRule) -> None:
    assert fuse([], rule, VOCAB_SIZE) == []
    no_valid_row = fuse_one(input_of([Target.empty(POSITIONS)] * 2), rule)
    assert not no_valid_row.target.valid.any()
    assert (no_valid_row.teacher_weights_N.tolist(), no_valid_row.missing_N.tolist()) == ([0, 0], [0, 0])
    empty = np.zeros(0, dtype=np.int64)
    assert len(fuse_one(FusionInput((Target.empty(0),), empty, empty, np.ones(1)), rule).target) == 0
