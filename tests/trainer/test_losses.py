"""Losses: their optimum, their gradients, their chunks."""

import numpy as np
import pytest
import torch

from alignment.target import Target, target_from_entries
from trainer.losses import Labels, chunked_loss, cross_entropy, forward_kl, labels_from

VOCAB_SIZE = 40


def target_with_mass(mass: float, top_k: int, positions: int = 3, seed: int = 0) -> Target:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(VOCAB_SIZE, top_k, replace=False) for _ in range(positions)])
    probs = rng.dirichlet(np.ones(top_k), size=positions) * mass
    rows = np.repeat(np.arange(positions), top_k)
    return target_from_entries(rows, ids.ravel().astype(np.int32), probs.ravel(), np.ones(positions, dtype=bool))


def labels_for(target: Target | None, positions: int = 3) -> Labels:
    return labels_from([np.arange(positions)], [target])


@pytest.mark.parametrize("mass", [0.5, 0.7, 0.9, 0.99])
def test_free_logits_land_on_the_teacher_with_its_tail(mass: float) -> None:
    target = target_with_mass(mass, 6)
    labels = labels_for(target)
    logits = torch.zeros(3, VOCAB_SIZE, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = forward_kl(logits, labels).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    probs = logits.detach().softmax(-1).numpy()
    np.testing.assert_allclose(probs[target.rows, target.ids], target.probs, atol=1e-4)
    listed = np.zeros((3, VOCAB_SIZE), dtype=bool)
    listed[target.rows, target.ids] = True
    np.testing.assert_allclose(np.where(listed, 0, probs).sum(1), 1 - mass, atol=1e-4)
    assert float(forward_kl(logits.detach(), labels).abs().max()) < 1e-6


def test_forward_kl_is_the_textbook_sum_in_float64() -> None:
    target = target_with_mass(0.8, 5)
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    got = forward_kl(logits, labels_for(target)).double().numpy()
    student = logits.double().softmax(-1).numpy()
    for i in range(3):
        own = slice(target.offsets[i], target.offsets[i + 1])
        p, q = target.probs[own].astype(float), student[i, target.ids[own]]
        rest_p, rest_q = 1 - p.sum(), 1 - q.sum()
        assert got[i] == pytest.approx((p * np.log(p / q)).sum() + rest_p * np.log(rest_p / rest_q), abs=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    labels = labels_for(target_with_mass(0.8, 5))
    wide = Labels(labels.tokens_T, labels.ids_TK, labels.probs_TK.double(), labels.tail_T.double())
    logits = torch.randn(3, VOCAB_SIZE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: forward_kl(x, wide), (logits,))


def test_a_target_that_lists_the_whole_vocabulary_has_finite_gradients() -> None:
    target = target_with_mass(1.0, VOCAB_SIZE)
    logits = torch.zeros(3, VOCAB_SIZE, requires_grad=True)
    loss = forward_kl(logits, labels_for(target)).sum()
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_a_position_without_a_target_adds_nothing() -> None:
    logits = torch.randn(3, VOCAB_SIZE, requires_grad=True)
    loss = forward_kl(logits, labels_for(None)).sum()
    loss.backward()
    assert logits.grad is not None
    assert float(loss.detach()) == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_chunks_change_neither_loss_nor_gradient(chunk: int) -> None:
    labels = labels_for(target_with_mass(0.7, 5, positions=5), positions=5)
    head = torch.nn.Linear(8, VOCAB_SIZE, bias=False)
    hidden = torch.randn(5, 8, requires_grad=True)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [hidden, head.weight]))

    ce, kl = chunked_loss(head, hidden, labels, 0.3, chunk)
    logits = head(hidden)
    expected = 0.3 * cross_entropy(logits, labels).sum() + 0.7 * forward_kl(logits, labels).sum()
    got = 0.3 * ce.sum() + 0.7 * kl.sum()
    torch.testing.assert_close(got, expected)
    for one, two in zip(gradients(got), gradients(expected), strict=True):
        torch.testing.assert_close(one, two)


def test_short_rows_are_padded_without_effect() -> None:
    short, wide = target_with_mass(0.6, 2), target_with_mass(0.9, 9)
    logits = torch.randn(6, VOCAB_SIZE)
    together = forward_kl(logits, labels_from([np.arange(3), np.arange(3)], [short, wide]))
    alone = forward_kl(logits[:3], labels_for(short))
    torch.testing.assert_close(together[:3], alone)


def test_a_target_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a target for 4 positions, received 3"):
        labels_from([np.arange(4)], [target_with_mass(0.5, 2)])
