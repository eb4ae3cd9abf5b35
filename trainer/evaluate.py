"""Bits per byte of the student on text that is never trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from alignment.report import bits_per_byte
from alignment.spans import Tokens
from trainer.labels import labels_from
from trainer.losses import Objective, head_loss
from trainer.reading import Reading
from trainer.student import Student


@dataclass(frozen=True)
class Evaluation:
    """nats of the text over num_tokens predicted tokens, which write num_bytes bytes."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def bpb(self) -> float:
        return bits_per_byte(-self.nats, self.num_bytes)


def token_nats(student: Student, tokens: Tokens, chunk_tokens: int) -> torch.Tensor:
    """[T − first_position] nats that the student pays for each predicted token of one sample."""
    labels = labels_from([tokens.ids[student.first_position :]], [None]).to(student.device)
    objective = Objective(chunk_tokens=chunk_tokens)
    with torch.no_grad():
        _, ce_T, _ = student.compute(
            [tokens], [np.ones(len(labels), dtype=bool)], partial(head_loss, labels=labels, objective=objective)
        )
    return ce_T.cpu()


def evaluate(student: Student, samples: Sequence[Reading], chunk_tokens: int) -> Evaluation:
    """Sum over the supervised tokens of all samples; the bytes of a first token that nothing predicts do not count."""
    was_training = student.model.training
    student.model.eval()
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for reading in samples:
        first = student.first_position
        wanted = reading.supervised_T[first:]
        paid = token_nats(student, reading.tokens, chunk_tokens).double()
        nats += float(paid[torch.from_numpy(wanted)].sum())
        num_tokens += int(wanted.sum())
        num_bytes += int(reading.num_bytes_T[first:][wanted].sum())
    student.model.train(was_training)
    return Evaluation(nats, num_tokens, num_bytes)
