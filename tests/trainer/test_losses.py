"""LM head and loss in one pass: compared with autograd over dense float64 logits; minima of the losses."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from alignment.target import Target, target_from_entries
from trainer.losses import DIVERGENCES
from trainer.losses.divergences import MIN_LOG_PROB, apply_temperature, divergence
from trainer.losses.head import Loss, head_loss
from trainer.losses.labels import Labels, labels_from
from trainer.losses.lm_head import LMHead
from trainer.losses.objective import Objective, position_losses
from trainer.losses.sorted_probs_loss import SortedProbsLabels
from trainer.losses.span_loss import SpanLabels

VOCAB_SIZE = 40
WIDTH = 8


def target_with_mass(mass: float, top_k: int, positions: int = 3, seed: int = 0) -> Target:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(VOCAB_SIZE, top_k, replace=False) for _ in range(positions)])
    probs = rng.dirichlet(np.ones(top_k), size=positions) * mass
    rows = np.repeat(np.arange(positions), top_k)
    return target_from_entries(rows, ids.ravel().astype(np.int32), probs.ravel(), np.ones(positions, dtype=bool))


def some_labels() -> Labels:
    """Rows with few and many entries, rows that list the whole vocabulary, no target; gold tokens listed and not."""
    targets = [target_with_mass(0.7, 5), target_with_mass(0.9, 9), None, target_with_mass(1.0, VOCAB_SIZE, seed=3)]
    tokens = [np.array([int(t.ids[0]) if t is not None else 0, 1, 2]) for t in targets]
    return labels_from(tokens, targets)


def some_sorted_probs(share: float, top_k: int, seed: int) -> SortedProbsLabels:
    """Labels of 12 positions: two of them without teacher scores, another with an empty tail."""
    generator = torch.Generator().manual_seed(seed)
    probs_TK = torch.rand(12, top_k, generator=generator).softmax(1).sort(1, descending=True).values
    mass_T = torch.rand(12, generator=generator)
    mass_T[0] = 1.0
    scored_T = (torch.arange(12) % 6 != 4).float()
    return SortedProbsLabels(probs_TK * (mass_T * scored_T)[:, None], (1 - mass_T) * scored_T, share)


def some_spans(share: float = 1.0, seed: int = 0) -> SpanLabels:
    """Labels of 12 positions: spans of 1, 2 and 4 tokens, positions outside spans, likelihoods near 1 and near 0."""
    span_T = np.array([0, 1, 1, -1, 2, 2, 2, 2, -1, 3, 4, 4])
    offset_T = np.array([0, 0, 1, -1, 0, 1, 2, 3, -1, 0, 0, 1])
    logprobs_S = -np.logspace(-4, 1.5, 5) * (1 + seed)
    return SpanLabels.from_numpy(offset_T, np.append(logprobs_S, 0).astype(np.float32)[span_T], share)


def some_head(seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu", **given: float) -> LMHead:
    generator = torch.Generator().manual_seed(seed)
    shapes = (VOCAB_SIZE, WIDTH), (VOCAB_SIZE,)
    weight, bias = (torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes)
    return LMHead(weight.requires_grad_(), bias.requires_grad_(), **given)


def some_hidden(positions: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(positions, WIDTH, generator=generator, dtype=dtype).to(device).requires_grad_()


def dense(head: LMHead, hidden: torch.Tensor, labels: Labels, objective: Objective) -> torch.Tensor:
    """[T] the same loss over dense logits, differentiated by autograd."""
    logits = (hidden @ head.weight_VD.T + (0 if head.bias_V is None else head.bias_V)) * head.scale
    logits = head.cap * torch.tanh(logits / head.cap) if head.cap else logits
    ce = torch.nn.functional.cross_entropy(logits, labels.tokens_T, reduction="none")
    log_q = (logits / objective.temperature).log_softmax(-1)
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels.ids_TK, True)
    tail = log_q.masked_fill(inside, MIN_LOG_PROB).logsumexp(-1, keepdim=True).clamp(min=MIN_LOG_PROB)
    listed = log_q.gather(1, labels.ids_TK).masked_fill(~labels.listed_TK, MIN_LOG_PROB)
    p = torch.cat([labels.probs_TK, labels.tail_T[:, None]], 1).to(logits.dtype)
    has_target = labels.probs_TK.sum(1) > 0
    p = apply_temperature(p, objective.temperature, VOCAB_SIZE - labels.listed_TK.sum(1))
    divergence_T = objective.divergence(p, torch.cat([listed, tail], 1)) * has_target
    total = objective.ce_weight * ce
    total = total + (1 - objective.ce_weight) * objective.target_share * objective.temperature**2 * divergence_T
    for uld in (one for one in labels.auxiliary if isinstance(one, SortedProbsLabels)):
        top = logits.softmax(-1).sort(1, descending=True).values[:, : uld.probs_TK.shape[1]]
        difference = (uld.probs_TK - top).abs().sum(1) + (uld.tail_T - (1 - top.sum(1))).abs()
        has_scores = (uld.probs_TK.sum(1) + uld.tail_T) > 0
        total = total + (1 - objective.ce_weight) * uld.share * 0.5 * difference * has_scores
    for spans in (one for one in labels.auxiliary if isinstance(one, SpanLabels)):
        total = total + (1 - objective.ce_weight) * spans.share * dense_spans(ce, spans, objective)
    return total


def dense_spans(ce_T: torch.Tensor, spans: SpanLabels, objective: Objective) -> torch.Tensor:
    """[T] the loss of each span, at its first position."""
    losses_T = [ce_T.new_zeros(())] * len(ce_T)
    begins = torch.where(spans.offset_T < 0, -1, torch.arange(len(ce_T), device=ce_T.device) - spans.offset_T)
    for begin in torch.nonzero(spans.offset_T == 0)[:, 0].tolist():
        q = ce_T[begins == begin].sum().neg().div(objective.span_temperature).exp()
        p = spans.logprobs_T[begin].double().div(objective.span_temperature).exp()
        p_B, q_B = (torch.stack([prob, 1 - prob])[None] for prob in (p, q))
        losses_T[begin] = objective.span_temperature * objective.divergence(p_B, q_B.log())[0]
    return torch.stack(losses_T)


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_loss_and_gradients_equal_those_of_dense_logits(
    name: str, ce_weight: float, temperature: float, chunk: int, device: str
) -> None:
    labels, head = some_labels().to(device), some_head(device=device)
    hidden = some_hidden(len(labels), device=device)
    objective = Objective(ce_weight, divergence(name), temperature, chunk)
    got = head_loss(head, hidden, labels, objective)
    expected = dense(head, hidden, labels, objective)
    losses_T = position_losses(labels, objective, got.ce_T, got.divergence_T)
    torch.testing.assert_close(losses_T, expected, atol=1e-7, rtol=1e-6)
    assert head.bias_V is not None
    inputs = [hidden, head.weight_VD, head.bias_V]
    for one, two in zip(
        torch.autograd.grad(got.total / 7, inputs), torch.autograd.grad(expected.sum() / 7, inputs), strict=True
    ):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
@pytest.mark.parametrize("target_share", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_auxiliary_losses_and_gradients_equal_those_of_dense_logits(
    ce_weight: float, temperature: float, target_share: float, chunk: int, device: str
) -> None:
    hidden, head = some_hidden(12, device=device), some_head(device=device, scale=0.4, cap=3.0)
    uld, alm = (some_sorted_probs(0.3, 7, 1), some_sorted_probs(0.2, 3, 2)), (some_spans(0.3), some_spans(0.2, seed=1))
    objective = Objective(ce_weight, divergence("reverse_kl"), temperature, chunk, target_share)
    for auxiliary in (uld, alm, (*uld, *alm), (alm[0], uld[0], alm[1], uld[1])):
        labels = replace(some_labels(), auxiliary=auxiliary).to(device)
        got, expected = head_loss(head, hidden, labels, objective), dense(head, hidden, labels, objective)
        losses_T = position_losses(labels, objective, got.ce_T, got.divergence_T, *got.auxiliary_NT)
        torch.testing.assert_close(losses_T, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(got.total, expected.sum(), atol=1e-6, rtol=1e-6)
        inputs = [hidden, head.weight_VD]
        for one, two in zip(
            torch.autograd.grad(got.total, inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
        ):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_more_sorted_probabilities_than_tokens_are_rejected() -> None:
    labels = replace(some_labels(), auxiliary=(some_sorted_probs(1.0, VOCAB_SIZE + 1, 1),))
    with pytest.raises(ValueError, match=f"at most {VOCAB_SIZE} sorted probabilities, .* received {VOCAB_SIZE + 1}"):
        head_loss(some_head(), some_hidden(12), labels, Objective(0.0))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_include_scale_and_soft_cap(name: str) -> None:
    labels, head = some_labels(), some_head(scale=0.4, cap=3.0)
    hidden = some_hidden(len(labels))
    objective = Objective(0.3, divergence(name))
    inputs = [hidden, head.weight_VD]
    got = torch.autograd.grad(head_loss(head, hidden, labels, objective).total, inputs)
    expected = torch.autograd.grad(dense(head, hidden, labels, objective).sum(), inputs)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-6)


def test_a_second_backward_pass_is_rejected() -> None:
    hidden = some_hidden(12)
    total = head_loss(some_head(), hidden, some_labels(), Objective(0.5)).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used already"):
        total.backward()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_is_near_float64_for_every_confidence_of_the_student(name: str) -> None:
    """The student's tail falls to 1e-12 and less, where 1 − Σq would be rounding noise."""
    labels, head = replace(some_labels(), auxiliary=(some_spans(0.5),)), some_head()
    objective = Objective(0.3, divergence(name), target_share=0.5)
    for scale in (1.0, 10.0, 40.0):
        hidden = some_hidden(len(labels)).detach() * scale
        hidden_64 = hidden.requires_grad_()
        hidden_32 = hidden.detach().float().requires_grad_()
        head_32 = LMHead(head.weight_VD.detach().float(), None)
        loss_32 = head_loss(head_32, hidden_32, labels, objective)
        loss_64 = head_loss(LMHead(head.weight_VD.detach()), hidden_64, labels, objective)
        torch.testing.assert_close(loss_32.divergence_T.double(), loss_64.divergence_T, atol=1e-4, rtol=1e-5)
        (grad_32,) = torch.autograd.grad(loss_32.total, hidden_32)
        (grad_64,) = torch.autograd.grad(loss_64.total, hidden_64)
        torch.testing.assert_close(grad_32.double(), grad_64, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVERGENCES)
def test_free_logits_converge_to_the_teacher_and_its_tail(name: str) -> None:
    targets = [target_with_mass(mass, 6) for mass in (0.5, 0.7, 0.9, 0.99)]
    labels = labels_from([np.arange(3)] * 4, targets)
    probs = minimize(lambda logits: head_loss(FREE, logits, labels, Objective(0.0, divergence(name))).total, labels)
    for target, student in zip(targets, np.split(probs, 4), strict=True):
        np.testing.assert_allclose(student[target.rows, target.ids], target.probs, atol=2e-3)
        listed = np.zeros((3, VOCAB_SIZE), dtype=bool)
        listed[target.rows, target.ids] = True
        np.testing.assert_allclose(np.where(listed, 0, student).sum(1), target.tail, atol=2e-3)


FREE = LMHead(torch.eye(VOCAB_SIZE, dtype=torch.float64))  # hidden states are the logits


def minimize(loss: Callable[[torch.Tensor], torch.Tensor], labels: Labels, bias: float = 0.0) -> np.ndarray:
    """Probabilities [T, V] after training free logits that start uniform, or with a bias towards high ids."""
    logits = (bias * torch.arange(VOCAB_SIZE, dtype=torch.float64)).repeat(len(labels), 1).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        optimizer.zero_grad()
        loss(logits).backward()
        optimizer.step()
        schedule.step()
    probs: np.ndarray = logits.detach().softmax(-1).numpy()
    return probs


def listed_probs(logits: torch.Tensor, labels: Labels) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, K] teacher's probabilities and student's log-probabilities of the listed tokens, as top-k losses use them."""
    return labels.probs_TK.double(), logits.log_softmax(-1).gather(1, labels.ids_TK)


def truncated_forward(logits: torch.Tensor, labels: Labels) -> torch.Tensor:
    p, log_q = listed_probs(logits, labels)
    return (p * (p.log() - log_q)).sum()


def truncated_reverse(logits: torch.Tensor, labels: Labels) -> torch.Tensor:
    p, log_q = listed_probs(logits, labels)
    return (log_q.exp() * (log_q - p.log())).sum()


def renormalized_teacher(logits: torch.Tensor, labels: Labels) -> torch.Tensor:
    p, log_q = listed_probs(logits, labels)
    p = p / p.sum(1, keepdim=True)
    return (p * (p.log() - log_q)).sum()


def renormalized_both(logits: torch.Tensor, labels: Labels) -> torch.Tensor:
    p, log_q = listed_probs(logits, labels)
    p = p / p.sum(1, keepdim=True)
    return (p * (p.log() - log_q.log_softmax(-1))).sum()


PEERS = {
    "truncated forward KL": truncated_forward,
    "truncated reverse KL": truncated_reverse,
    "forward KL, teacher renormalized": renormalized_teacher,
    "forward KL, both renormalized": renormalized_both,
}


def minima_of_losses() -> list[str]:
    """The rows of the table in docs/losses.md: a Zipf-like teacher over 40 tokens that lists 8, with a mass of 0.7."""
    target = target_from_entries(
        np.zeros(8, dtype=np.int64),
        np.arange(8, dtype=np.int32),
        0.7 / np.arange(1, 9) / (1 / np.arange(1, 9)).sum(),
        np.ones(1, dtype=bool),
    )
    labels = labels_from([np.zeros(1, dtype=np.int64)], [target])
    with_tail = {f"{name}, tail as a bucket": Objective(0.0, divergence(name)) for name in DIVERGENCES}
    losses = {name: partial(_total, objective=objective) for name, objective in with_tail.items()} | PEERS

    def row(name: str, q: np.ndarray) -> str:
        return f"| {name} | {q[0]:.2f} | {q[:8].sum():.2f} | {q[8:].sum():.2f} |"

    rows = [f"| the teacher | {target.probs[0]:.2f} | {target.mass[0]:.2f} | {target.tail[0]:.2f} |"]
    for name, loss in losses.items():
        rows.append(row(name, minimize(partial(loss, labels=labels), labels)[0]))
    rows.append(
        row("ALM, where the text is the most likely token", minimize(partial(_span_total, labels=labels), labels)[0])
    )
    uld = (SortedProbsLabels(labels.probs_TK, labels.tail_T, 1.0),)
    uld_total = partial(_total, labels=replace(labels, auxiliary=uld), objective=Objective(0.0, target_share=0.0))
    (q,) = minimize(uld_total, labels, bias=0.01)
    rows.append(row("ULD, where the student starts with a bias towards other tokens", q))
    rows.append(row("the same, over the student's own most likely tokens", np.sort(q)[::-1]))
    return rows


def _span_total(logits: torch.Tensor, labels: Labels) -> torch.Tensor:
    logprobs_T = labels.probs_TK[0, :1].log().numpy()
    spans = SpanLabels.from_numpy(np.zeros(1, dtype=np.int64), logprobs_T, 1.0)
    return _total(logits, replace(labels, auxiliary=(spans,)), Objective(0.0, target_share=0.0))


def _total(logits: torch.Tensor, labels: Labels, objective: Objective) -> torch.Tensor:
    return head_loss(FREE, logits, labels, objective).total


@pytest.mark.slow
def test_the_documentation_has_the_minima_of_the_losses() -> None:
    text = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
    for row in minima_of_losses():
        assert row in text


def test_a_position_without_a_target_adds_no_divergence_and_no_gradient() -> None:
    labels = labels_from([np.arange(3)], [None])
    for name in DIVERGENCES:
        hidden = some_hidden(3)
        loss = head_loss(some_head(), hidden, labels, Objective(0.0, divergence(name)))
        loss.total.backward()
        assert hidden.grad is not None
        assert not loss.divergence_T.any()
        assert not hidden.grad.any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_target_that_lists_no_token_gives_no_gradient(name: str) -> None:
    nothing = Target.empty(3)
    tail_only = replace(nothing, tail=np.ones(3, dtype=np.float32), valid=np.ones(3, dtype=bool))
    hidden = some_hidden(3)
    labels = labels_from([np.arange(3)], [tail_only])
    head_loss(some_head(), hidden, labels, Objective(0.0, divergence(name))).total.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_padding_of_short_rows_has_no_effect() -> None:
    short, wide = target_with_mass(0.6, 2), target_with_mass(0.9, 9)
    hidden, head = some_hidden(6), some_head()
    objective = Objective(0.5, divergence("reverse_kl"))
    together = head_loss(head, hidden, labels_from([np.arange(3), np.arange(3)], [short, wide]), objective)
    alone = head_loss(head, hidden[:3], labels_from([np.arange(3)], [short]), objective)
    torch.testing.assert_close(together.divergence_T[:3], alone.divergence_T)


def test_frozen_heads_and_frozen_decoders_get_no_gradient() -> None:
    labels, head = some_labels(), some_head()
    hidden = some_hidden(len(labels))
    head_loss(LMHead(head.weight_VD.detach()), hidden, labels, Objective(0.5)).total.backward()
    assert hidden.grad is not None
    head_loss(head, hidden.detach(), labels, Objective(0.5)).total.backward()
    assert head.weight_VD.grad is not None
    with torch.no_grad():
        assert not head_loss(head, hidden, labels, Objective(0.5)).total.requires_grad


def test_bf16_autocast_is_near_float32(device: str) -> None:
    labels = replace(some_labels(), auxiliary=(some_spans(0.5),)).to(device)
    head, hidden = some_head(0, torch.float32, device), some_hidden(len(labels), torch.float32, device)
    objective = Objective(0.3, target_share=0.5)

    def run() -> tuple[Loss, list[torch.Tensor]]:
        loss = head_loss(head, hidden, labels, objective)
        return loss, list(torch.autograd.grad(loss.total, [hidden, head.weight_VD]))

    exact, exact_gradients = run()
    with torch.autocast(device, dtype=torch.bfloat16):
        rough, rough_gradients = run()
    assert rough.total.dtype == torch.float32
    torch.testing.assert_close(rough.total, exact.total, rtol=0.02, atol=0.1)
    for one, two in zip(rough_gradients, exact_gradients, strict=True):
        assert one.dtype == two.dtype
        assert float((one - two).norm() / two.norm()) < 0.02


def test_hidden_states_and_labels_of_different_lengths_are_rejected() -> None:
    with pytest.raises(ValueError, match="as many labels as hidden states, received 12 and 5"):
        head_loss(some_head(), some_hidden(5), some_labels(), Objective())


def test_a_target_of_another_length_is_rejected() -> None:
    with pytest.raises(ValueError, match="expected a target for 4 positions, received 3"):
        labels_from([np.arange(4)], [target_with_mass(0.5, 2)])


def test_every_id_of_a_row_counts_once() -> None:
    labels = some_labels()
    for ids, listed in itertools.islice(zip(labels.ids_TK, labels.listed_TK, strict=True), 12):
        unpadded = ids[listed].tolist()
        assert len(unpadded) == len(set(unpadded))
        assert set(ids.tolist()) == set(unpadded)
