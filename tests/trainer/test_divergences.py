"""Divergences over buckets: what they are, where they are least, and what bucketing and flooring do to them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import LossConfig
from trainer.learning.divergences import FLOOR, NAMES, NOTHING_NATS, divergence, tempered


def simplex(seed: int, rows: int, buckets: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(buckets), rows))


def textbook(name: str, p: np.ndarray, q: np.ndarray, mix: float) -> float:
    def kl(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * np.log(a / b)).sum())

    m = mix * p + (1 - mix) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: mix * kl(p, m) + (1 - mix) * kl(q, m),
        "skew_kl": lambda: kl(p, m),
        "skew_reverse_kl": lambda: kl(q, mix * q + (1 - mix) * p),
        "total_variation": lambda: float(np.abs(p - q).sum() / 2),
    }[name]()


@pytest.mark.parametrize("mix", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("name", NAMES)
def test_divergences_are_the_textbook_sums(name: str, mix: float) -> None:
    p, q = simplex(0, 20, 7), simplex(1, 20, 7)
    got = divergence(name, mix)(p, q.log())
    expected = [textbook(name, a, b, mix) for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_divergences_are_zero_where_both_are_equal_and_positive_elsewhere(name: str) -> None:
    p = simplex(0, 50, 9)
    np.testing.assert_allclose(divergence(name)(p, p.log()).numpy(), 0, atol=1e-12)
    assert (divergence(name)(p, simplex(1, 50, 9).log()) > 0).all()


@given(st.integers(0, 10_000), st.sampled_from(NAMES), st.integers(2, 6))
def test_putting_tokens_into_one_bucket_makes_no_divergence_larger(seed: int, name: str, listed: int) -> None:
    p, q = simplex(seed, 4, 12), simplex(seed + 1, 4, 12)

    def bucketed(full: torch.Tensor) -> torch.Tensor:
        return torch.cat([full[:, :listed], full[:, listed:].sum(1, keepdim=True)], 1)

    apart = divergence(name)
    assert (apart(bucketed(p), bucketed(q).log()) <= apart(p, q.log()) + 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_bucket_that_is_not_there_adds_nothing(name: str) -> None:
    p, q = simplex(0, 5, 6), simplex(1, 5, 6).log()
    wider_p = torch.cat([p, torch.zeros(5, 2)], 1)
    wider_q = torch.cat([q, torch.full((5, 2), -NOTHING_NATS)], 1).requires_grad_()
    apart = divergence(name)(wider_p, wider_q)
    torch.testing.assert_close(apart, divergence(name)(p, q))
    (slope,) = torch.autograd.grad(apart.sum(), wider_q)
    assert not slope[:, -2:].any()


@pytest.mark.parametrize("name", NAMES)
def test_divergences_stay_finite_where_one_side_has_nothing(name: str) -> None:
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    log_q = torch.tensor([[-NOTHING_NATS, 0.0], [-60.0, 0.0], [0.0, -NOTHING_NATS]], requires_grad=True)
    apart = divergence(name)(p, log_q)
    (slope,) = torch.autograd.grad(apart.sum(), log_q)
    assert torch.isfinite(apart).all()
    assert torch.isfinite(slope).all()


def test_the_floor_bounds_reverse_kl_where_the_target_has_nothing() -> None:
    apart = divergence("reverse_kl")(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]).log())
    assert float(apart) == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / FLOOR), abs=1e-5)


@pytest.mark.parametrize(("name", "bound"), [("skew_kl", -math.log(0.1)), ("skew_reverse_kl", -math.log(0.1))])
def test_skewed_divergences_are_bounded(name: str, bound: float) -> None:
    apart = divergence(name, 0.1)(torch.tensor([[1.0, 0.0]]), torch.tensor([[-50.0, 0.0]]))
    assert float(apart) <= bound + 1e-6


def test_the_run_file_names_the_divergences_that_there_are() -> None:
    for name in NAMES:
        assert LossConfig(divergence=name).divergence == name  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one of forward_kl"):
        divergence("kl")


@given(st.integers(0, 10_000), st.floats(0.05, 4))
def test_a_tempered_target_is_exact_where_its_tail_is_even(seed: int, temperature: float) -> None:
    listed = simplex(seed, 3, 5) * 0.8
    full = torch.cat([listed, torch.full((3, 20), 0.01, dtype=torch.float64)], 1)
    raised = full ** (1 / temperature)
    expected = raised / raised.sum(1, keepdim=True)
    got = tempered(torch.cat([listed, torch.full((3, 1), 0.2)], 1), temperature, torch.full((3,), 20))
    np.testing.assert_allclose(got[:, :5].numpy(), expected[:, :5].numpy(), rtol=1e-6)


@given(st.integers(0, 10_000), st.floats(0.3, 4))
def test_a_tempered_tail_is_too_heavy_above_one_and_too_light_below(seed: int, temperature: float) -> None:
    full = simplex(seed, 3, 25)
    raised = full ** (1 / temperature)
    true_tail = (raised / raised.sum(1, keepdim=True))[:, 5:].sum(1)
    buckets = torch.cat([full[:, :5], full[:, 5:].sum(1, keepdim=True)], 1)
    got = tempered(buckets, temperature, torch.full((3,), 20))[:, -1]
    assert (got >= true_tail - 1e-9).all() if temperature >= 1 else (got <= true_tail + 1e-9).all()
