"""Divergences over buckets: values, minima, the effect of buckets and of the clamp, and construction by name."""

import math
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.losses import DIVERGENCES
from trainer.losses.config import LossConfig
from trainer.losses.divergences import (
    MIN_LOG_PROB,
    MIN_TARGET_PROB,
    apply_temperature,
    divergence,
    divergence_parameters,
)
from trainer.training.plan import objective_at

DEFAULTS = {"skew_kl": {"alpha": 0.1}, "skew_reverse_kl": {"alpha": 0.1}, "jensen_shannon": {"beta": 0.5}}


def random_distributions(seed: int, rows: int, buckets: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(buckets), rows))


def with_parameter(name: str, value: float) -> dict[str, Any]:
    """The divergence's parameter, if it has one, set to a value."""
    return dict.fromkeys(divergence_parameters(name), value)


def textbook_divergence(name: str, p: np.ndarray, q: np.ndarray, weight: float) -> float:
    def kl(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * np.log(a / b)).sum())

    m = weight * p + (1 - weight) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: weight * kl(p, m) + (1 - weight) * kl(q, m),
        "skew_kl": lambda: kl(p, m),
        "skew_reverse_kl": lambda: kl(q, weight * q + (1 - weight) * p),
        "total_variation": lambda: float(np.abs(p - q).sum() / 2),
    }[name]()


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_equal_the_textbook_sums(name: str, weight: float) -> None:
    p, q = random_distributions(0, 20, 7), random_distributions(1, 20, 7)
    result = divergence(name, **with_parameter(name, weight))(p, q.log())
    expected = [textbook_divergence(name, a, b, weight) for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_zero_for_equal_distributions_and_positive_otherwise(name: str) -> None:
    p = random_distributions(0, 50, 9)
    np.testing.assert_allclose(divergence(name)(p, p.log()).numpy(), 0, atol=1e-12)
    assert (divergence(name)(p, random_distributions(1, 50, 9).log()) > 0).all()


@given(st.integers(0, 10_000), st.sampled_from(list(DIVERGENCES)), st.integers(2, 6))
def test_merging_tokens_into_a_bucket_increases_no_divergence(seed: int, name: str, num_listed: int) -> None:
    p, q = random_distributions(seed, 4, 12), random_distributions(seed + 1, 4, 12)

    def bucketed(full: torch.Tensor) -> torch.Tensor:
        return torch.cat([full[:, :num_listed], full[:, num_listed:].sum(1, keepdim=True)], 1)

    function = divergence(name)
    assert (function(bucketed(p), bucketed(q).log()) <= function(p, q.log()) + 1e-12).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_bucket_that_does_not_exist_contributes_nothing(name: str) -> None:
    p, q = random_distributions(0, 5, 6), random_distributions(1, 5, 6).log()
    wider_p = torch.cat([p, torch.zeros(5, 2)], 1)
    wider_q = torch.cat([q, torch.full((5, 2), MIN_LOG_PROB)], 1).requires_grad_()
    loss = divergence(name)(wider_p, wider_q)
    torch.testing.assert_close(loss, divergence(name)(p, q))
    (gradient,) = torch.autograd.grad(loss.sum(), wider_q)
    assert not gradient[:, -2:].any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_stay_finite_where_one_side_has_no_probability(name: str) -> None:
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    log_q = torch.tensor([[MIN_LOG_PROB, 0.0], [-60.0, 0.0], [0.0, MIN_LOG_PROB]], requires_grad=True)
    loss = divergence(name)(p, log_q)
    (gradient,) = torch.autograd.grad(loss.sum(), log_q)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


def test_the_clamp_bounds_reverse_kl_where_the_target_has_no_probability() -> None:
    loss = divergence("reverse_kl")(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]).log())
    assert float(loss) == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / MIN_TARGET_PROB), abs=1e-5)


@pytest.mark.parametrize("name", ["skew_kl", "skew_reverse_kl"])
def test_skew_divergences_are_at_most_minus_log_alpha(name: str) -> None:
    loss = divergence(name, alpha=0.1)(torch.tensor([[1.0, 0.0]]), torch.tensor([[-50.0, 0.0]]))
    assert float(loss) <= -math.log(0.1) + 1e-6


# --- construction by name ---


def test_the_configuration_accepts_every_registered_divergence() -> None:
    for name in DIVERGENCES:
        assert LossConfig(divergence=name).divergence == name


def test_an_unknown_divergence_is_rejected_with_the_registered_names() -> None:
    for function in (divergence, divergence_parameters):
        with pytest.raises(ValueError, match=rf"expected one of {', '.join(DIVERGENCES)}, received 'kl'"):
            function("kl")


@pytest.mark.parametrize("name", DIVERGENCES)
def test_parameters_default_to_the_value_of_the_divergence(name: str) -> None:
    p, log_q = random_distributions(0, 5, 6), random_distributions(1, 5, 6).log()
    defaults = DEFAULTS.get(name, {})
    assert divergence_parameters(name) == tuple(defaults)
    assert torch.equal(divergence(name)(p, log_q), divergence(name, **defaults)(p, log_q))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("parameter", ["alpha", "beta"])
def test_a_parameter_that_the_divergence_does_not_take_is_rejected(name: str, parameter: str) -> None:
    given: dict[str, Any] = {parameter: 0.3}
    if parameter in divergence_parameters(name):
        divergence(name, **given)
        for wrong in (0.0, 1.0, math.nan):
            with pytest.raises(ValueError, match=f"{name}: expected {parameter} between 0 and 1, received {wrong}"):
                divergence(name, **{parameter: wrong})
    else:
        with pytest.raises(ValueError, match=rf"{name}: takes .*received {parameter} = 0.3; remove {parameter}"):
            divergence(name, **given)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("value", [None, 0.3])
def test_the_objective_of_a_step_passes_alpha_and_beta_to_the_divergence(name: str, value: float | None) -> None:
    p, log_q = random_distributions(0, 5, 6), random_distributions(1, 5, 6).log()
    parameters = {} if value is None else with_parameter(name, value)
    objective = objective_at(LossConfig(divergence=name, **parameters), 0.0)
    expected = divergence(name, **parameters)
    assert torch.equal(objective.divergence(p, log_q), expected(p, log_q))


def test_the_registry_imports_no_heavy_library() -> None:
    code = "import sys, trainer.losses; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'numba')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def first_sentence(name: str) -> str:
    docstring = resolve_name(DIVERGENCES[name]).__doc__
    assert docstring is not None, f"the divergence {name} has no docstring"
    return " ".join(docstring.split()).partition(". ")[0]


def test_the_documentation_lists_every_divergence_with_the_first_sentence_of_its_docstring() -> None:
    text = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| `")]
    documented = {name.strip("| `"): definition.replace("\\|", "|") for name, definition in rows}
    assert documented.pop("loss.divergence") == "definition"  # the header
    assert documented == {name: first_sentence(name) for name in DIVERGENCES}


# --- temperature ---


@given(st.integers(0, 10_000), st.floats(0.05, 4))
def test_temperature_is_exact_for_a_uniform_tail(seed: int, temperature: float) -> None:
    listed = random_distributions(seed, 3, 5) * 0.8
    full = torch.cat([listed, torch.full((3, 20), 0.01, dtype=torch.float64)], 1)
    raised = full ** (1 / temperature)
    expected = raised / raised.sum(1, keepdim=True)
    result = apply_temperature(torch.cat([listed, torch.full((3, 1), 0.2)], 1), temperature, torch.full((3,), 20))
    np.testing.assert_allclose(result[:, :5].numpy(), expected[:, :5].numpy(), rtol=1e-6)


@given(st.integers(0, 10_000), st.floats(0.3, 4))
def test_a_tempered_tail_is_too_heavy_above_one_and_too_light_below(seed: int, temperature: float) -> None:
    full = random_distributions(seed, 3, 25)
    raised = full ** (1 / temperature)
    true_tail = (raised / raised.sum(1, keepdim=True))[:, 5:].sum(1)
    buckets = torch.cat([full[:, :5], full[:, 5:].sum(1, keepdim=True)], 1)
    tail = apply_temperature(buckets, temperature, torch.full((3,), 20))[:, -1]
    assert (tail >= true_tail - 1e-9).all() if temperature >= 1 else (tail <= true_tail + 1e-9).all()
