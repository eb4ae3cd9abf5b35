"""Agreement of the student with each teacher, and with the fused target, on held-out text.

Two values are measured per target and position: whether the student's most likely token is the most likely token that
the target lists, and KL(target ‖ student) in nats over the listed tokens and the tail. Averages are over the supervised
positions at which the target lists a token. Targets are aligned to the student's tokenizer, as in training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment import Target
from trainer.evaluation.bits_per_byte import evaluation_mode
from trainer.fusion.run_fuser import Fuser
from trainer.losses.head import head_loss
from trainer.losses.labels import Labels, labels_from
from trainer.losses.lm_head import LMHead
from trainer.losses.objective import Objective
from trainer.records import Sample, ScoredSample, TokenizedSample
from trainer.student.model import Student

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Agreement:
    """Sums over `positions`; add those of several samples with `+`."""

    agreeing: int = 0
    nats: float = 0.0
    positions: int = 0

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.agreeing + other.agreeing, self.nats + other.nats, self.positions + other.positions)

    @property
    def figures(self) -> dict[str, float | None]:
        """Values by name: top1 (a fraction) and kl (nats per position); None without a position."""
        if not self.positions:
            return {"top1": None, "kl": None}
        return {"top1": self.agreeing / self.positions, "kl": self.nats / self.positions}


def agreement_samples(held_out: Sequence[Sample], num_samples: int) -> list[Sample]:
    """Return this many held-out samples, evenly spaced."""
    chosen = np.linspace(0, len(held_out) - 1, min(num_samples, len(held_out)), dtype=int).tolist()
    return [held_out[i] for i in chosen]


def agreement(
    student: Student, scored: Sequence[ScoredSample], fused: Sequence[Target], names: Sequence[str], chunk_tokens: int
) -> Values:
    """Return the values of an eval event: agreement with each teacher, by name, and with the fused target.

    names are the names of the teachers, in the order of the scores. The result is empty without samples.
    """
    agreements = [
        compare(student, one.tokenized, [*(scores.target for scores in one.scores), target], chunk_tokens)
        for one, target in zip(scored, fused, strict=True)
    ]
    if not agreements:
        return {}
    *each, of_fused = (sum(column, Agreement()).figures for column in zip(*agreements, strict=True))
    return {"teachers": dict(zip(names, each, strict=True)), "fused": of_fused}


def fuse_held_out(
    make_fuser: Callable[[], Fuser], scored: Sequence[ScoredSample], batch_samples: int, step: int
) -> list[Target]:
    """Return the targets that the run would fuse from these scores at a step, in batches of the run's size.

    make_fuser returns a Fuser with the run's present state. Every batch has a new Fuser, because held-out text must not
    change the state of the run.
    """
    targets = []
    for begin in range(0, len(scored), batch_samples):
        examples = make_fuser().fuse(scored[begin : begin + batch_samples], step)
        targets += [Target.empty(len(e.tokenized)) if e.target is None else e.target for e in examples]
    return targets


def compare(
    student: Student, tokenized: TokenizedSample, targets: Sequence[Target], chunk_tokens: int
) -> list[Agreement]:
    """Return the agreement with each of several targets over the supervised positions of one sample."""
    first = student.first_position
    supervised: NDArray[np.bool_] = tokenized.supervised_T[first:]
    ids = tokenized.tokens.ids[first:][supervised]
    labels = [labels_from([ids], [t.from_position(first).select(supervised)]).to(student.device) for t in targets]
    objective = Objective(ce_weight=0.0, chunk_tokens=chunk_tokens)

    def predict(head: LMHead, hidden_TD: Tensor) -> tuple[Tensor, ...]:
        divergences = [head_loss(head, hidden_TD, one, objective).divergence_T for one in labels]
        return most_likely(head, hidden_TD, chunk_tokens), *divergences

    with evaluation_mode(student):
        predicted_T, *divergences = student.compute([tokenized.tokens], [supervised], predict)
    pairs = zip(labels, divergences, strict=True)
    return [agreement_of(one, predicted_T, divergence_T) for one, divergence_T in pairs]


def most_likely(head: LMHead, hidden_TD: Tensor, chunk_tokens: int) -> Tensor:
    """Return [T] the token with the largest logit at each position; logits exist for one chunk at a time.

    The logits are computed in float32: rounded to bf16, the two largest are equal at 4% of SmolLM2's positions.
    """
    with torch.autocast(hidden_TD.device.type, enabled=False):
        head = replace(head, weight_VD=head.weight_VD.float())
        return torch.cat([head.logits(chunk.float()).argmax(1) for chunk in hidden_TD.split(chunk_tokens)])


def agreement_of(labels: Labels, predicted_T: Tensor, divergence_T: Tensor) -> Agreement:
    """Return the agreement over the positions with listed tokens. With ties, each most likely token agrees."""
    largest_T = labels.probs_TK.amax(1)
    predicted_prob_T = (labels.probs_TK * (labels.ids_TK == predicted_T[:, None])).sum(1)
    listed_T = largest_T > 0
    agreeing_T = listed_T & (predicted_prob_T >= largest_T)
    return Agreement(int(agreeing_T.sum()), float(divergence_T[listed_T].double().sum()), int(listed_T.sum()))
