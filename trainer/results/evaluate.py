"""Bits per byte of the student on text that is never trained on, over all of it and in each domain."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignment.report import bits_per_byte
from alignment.spans import Tokens
from trainer.config import DataConfig, RunConfig, StudentConfig
from trainer.data.reading import Reader, Reading, readable
from trainer.data.samples import Corpus, load_corpus
from trainer.errors import DataError, NonFiniteLoss
from trainer.learning.labels import labels_from
from trainer.learning.losses import Objective, head_loss
from trainer.learning.student import Student, load_student, reader_of
from trainer.ranks import Ranks

AT_ONCE = 8  # samples in a forward pass of each rank


@dataclass(frozen=True)
class Evaluation:
    """nats of the text over num_tokens predicted tokens, which write num_bytes bytes. Add those of several texts."""

    nats: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)

    @property
    def bpb(self) -> float:
        """NaN where no byte is predicted."""
        return bits_per_byte(-self.nats, self.num_bytes)


@contextmanager
def at_rest(student: Student) -> Iterator[None]:
    """Without gradients and without dropout; afterwards it trains as before."""
    was_training = student.model.training
    student.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        student.model.train(was_training)


def token_nats(student: Student, samples: Sequence[Tokens], chunk_tokens: int) -> list[torch.Tensor]:
    """[T − first_position] nats that the student pays for each predicted token, of each sample."""
    lengths = [len(tokens.ids) - student.first_position for tokens in samples]
    labels = labels_from([tokens.ids[student.first_position :] for tokens in samples], [None] * len(samples))
    objective = Objective(chunk_tokens=chunk_tokens)
    with at_rest(student):
        _, ce_T, *_ = student.compute(
            samples,
            [np.ones(length, dtype=bool) for length in lengths],
            partial(head_loss, labels=labels.to(student.device), objective=objective),
        )
    return list(ce_T.cpu().split(lengths))


def evaluate(
    student: Student, samples: Sequence[Reading], chunk_tokens: int, ranks: Ranks = Ranks()
) -> list[Evaluation]:
    """Each sample, over its supervised tokens; the bytes of a first token that nothing predicts do not count.

    Every rank calls it alike, computes its part and gets all.
    """
    found: list[Evaluation] = []
    for begin in range(0, len(samples), AT_ONCE * ranks.size):
        mine = ranks.part(samples[begin : begin + AT_ONCE * ranks.size])
        paid = token_nats(student, [reading.tokens for reading in mine], chunk_tokens)
        each = [_evaluated(reading, nats, student.first_position) for reading, nats in zip(mine, paid, strict=True)]
        found += [one for part in ranks.gathered(each) for one in part]
    return found


def _evaluated(reading: Reading, paid_T: torch.Tensor, first: int) -> Evaluation:
    wanted = reading.supervised_T[first:]
    nats = float(paid_T.double()[torch.from_numpy(wanted)].sum())
    return Evaluation(nats, int(wanted.sum()), int(reading.num_bytes_T[first:][wanted].sum()))


# --- by domain ---

SCORING = {"device", "precision", "roles", "chat_template"}  # what of [student] a model needs that is not trained
Domains = dict[str, list[Reading]]


def held_out_domains(corpus: Corpus, reader: Reader, data: DataConfig) -> Domains:
    """Held-out samples as the student reads them, by domain. Raises DataError if none of them can be read."""
    domains: Domains = {}
    for sample in corpus.held_out:
        for reading in readable([sample], reader, data):
            domains.setdefault(sample.domain, []).append(reading)
    if corpus.held_out and not domains:
        raise DataError(f"none of the {len(corpus.held_out)} held-out chats can be read: see data.broken_chats")
    return domains


def evaluate_domains(
    student: Student, domains: Domains, chunk_tokens: int, ranks: Ranks = Ranks()
) -> dict[str, Evaluation]:
    """Each domain, by its name; every rank calls it alike."""
    names = [name for name, samples in domains.items() for _ in samples]
    found = evaluate(student, [reading for samples in domains.values() for reading in samples], chunk_tokens, ranks)
    totals = dict.fromkeys(domains, Evaluation())
    for name, one in zip(names, found, strict=True):
        totals[name] += one
    return totals


def figures(domains: Mapping[str, Evaluation]) -> dict[str, Any]:
    """As the metrics file has them: over all, and of each domain where there are several; None over no byte.

    Raises NonFiniteLoss.
    """
    for name, one in domains.items():
        if not math.isfinite(one.nats):
            raise NonFiniteLoss(
                f"held-out text of {name} costs {one.nats} nats: the student has diverged; lower optim.lr and go on "
                "from its last checkpoint with --resume"
            )
    whole = sum(domains.values(), Evaluation())
    values: dict[str, Any] = {"held_out_bpb": whole.bpb, "held_out_nats_per_token": whole.nats / whole.num_tokens}
    if len(domains) > 1:
        values["held_out_domains"] = {name: one.bpb if one.num_bytes else None for name, one in domains.items()}
    return values


def evaluate_folder(folder: Path, config: RunConfig) -> dict[str, Evaluation]:
    """An exported model, by domain, on what a run file holds out, in the run's precision and on its device.

    Raises DataError if nothing is held out.
    """
    student = load_student(StudentConfig(model=str(folder), **config.student.model_dump(include=SCORING)))
    corpus = load_corpus(config.data, config.eval, student.vocabulary, config.train.seed)
    if not corpus.held_out:
        raise DataError("nothing is held out: set eval.held_out_documents")
    reader = reader_of(folder, student.vocabulary, config)
    return evaluate_domains(student, held_out_domains(corpus, reader, config.data), config.loss.chunk_tokens)
