"""Bits per byte of the student on held-out text, over all of it and in each domain."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignment import Tokens
from alignment.report import bits_per_byte
from trainer.config import RunConfig
from trainer.distributed import Ranks
from trainer.errors import DataError, NonFiniteLoss
from trainer.losses.head import head_loss
from trainer.losses.labels import labels_from
from trainer.losses.objective import Objective
from trainer.records import TokenizedSample
from trainer.sources.config import DataConfig
from trainer.sources.corpus import Corpus, load_corpus
from trainer.student.config import StudentConfig
from trainer.student.loading import load_student, student_tokenizer
from trainer.student.model import Student
from trainer.tokenization import SampleTokenizer, tokenize_samples

SAMPLES_PER_PASS = 8  # samples per forward pass of each process
SCORING_KEYS = {
    "device",
    "precision",
    "roles",
    "chat_template",
}  # keys of [student] for evaluation only
Domains = dict[str, list[TokenizedSample]]


@dataclass(frozen=True)
class Evaluation:
    """Negative log-likelihood, in nats, of predicted tokens, with their number and their bytes. Supports `+`."""

    nats: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)

    @property
    def bpb(self) -> float:
        """Bits per byte; NaN without a predicted byte."""
        return bits_per_byte(-self.nats, self.num_bytes)


@contextmanager
def evaluation_mode(student: Student) -> Iterator[None]:
    """Disable gradients and dropout in the block, and restore the previous mode of the model afterwards."""
    was_training = student.model.training
    student.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        student.model.train(was_training)


def token_nats(student: Student, samples: Sequence[Tokens], chunk_tokens: int) -> list[torch.Tensor]:
    """Return the cross-entropy in nats of each predicted token: one tensor [T − first_position] per sample."""
    lengths = [len(tokens.ids) - student.first_position for tokens in samples]
    labels = labels_from([tokens.ids[student.first_position :] for tokens in samples], [None] * len(samples))
    objective = Objective(chunk_tokens=chunk_tokens)
    with evaluation_mode(student):
        _, ce_T, *_ = student.compute(
            samples,
            [np.ones(length, dtype=bool) for length in lengths],
            partial(head_loss, labels=labels.to(student.device), objective=objective),
        )
    return list(ce_T.cpu().split(lengths))


def evaluate(
    student: Student, samples: Sequence[TokenizedSample], chunk_tokens: int, ranks: Ranks = Ranks()
) -> list[Evaluation]:
    """Evaluate each sample over its supervised tokens. Bytes of a first token that is not predicted do not count.

    All processes must call this with the same samples. Each computes its shard and returns the results of all samples.
    """
    evaluations: list[Evaluation] = []
    for begin in range(0, len(samples), SAMPLES_PER_PASS * ranks.size):
        shard = ranks.shard(samples[begin : begin + SAMPLES_PER_PASS * ranks.size])
        nats = token_nats(student, [tokenized.tokens for tokenized in shard], chunk_tokens)
        own = [_evaluation(one, nats_T, student.first_position) for one, nats_T in zip(shard, nats, strict=True)]
        evaluations += [evaluation for shards in ranks.all_gather(own) for evaluation in shards]
    return evaluations


def _evaluation(tokenized: TokenizedSample, nats_T: torch.Tensor, first: int) -> Evaluation:
    supervised = tokenized.supervised_T[first:]
    nats = float(nats_T.double()[torch.from_numpy(supervised)].sum())
    return Evaluation(nats, int(supervised.sum()), int(tokenized.num_bytes_T[first:][supervised].sum()))


def held_out_domains(corpus: Corpus, tokenizer: SampleTokenizer, data: DataConfig) -> Domains:
    """Tokenize the held-out samples, by domain. Raises DataError if none of them can be tokenized."""
    domains: Domains = {}
    for sample in corpus.held_out:
        for tokenized in tokenize_samples([sample], tokenizer, data):
            domains.setdefault(sample.domain, []).append(tokenized)
    if corpus.held_out and not domains:
        raise DataError(f"none of the {len(corpus.held_out)} held-out chats can be rendered: see data.invalid_chats")
    return domains


def evaluate_domains(
    student: Student, domains: Domains, chunk_tokens: int, ranks: Ranks = Ranks()
) -> dict[str, Evaluation]:
    """Evaluate each domain. All processes must call this with the same samples."""
    names = [name for name, samples in domains.items() for _ in samples]
    evaluations = evaluate(student, [one for samples in domains.values() for one in samples], chunk_tokens, ranks)
    totals = dict.fromkeys(domains, Evaluation())
    for name, evaluation in zip(names, evaluations, strict=True):
        totals[name] += evaluation
    return totals


def figures(domains: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return the values of an eval event: over all domains, and per domain if there are several.

    The value of a domain without a predicted byte is None. Raises DataError if no domain has one, and NonFiniteLoss if
    the student has diverged.
    """
    for name, evaluation in domains.items():
        if not math.isfinite(evaluation.nats):
            raise NonFiniteLoss(
                f"the loss on held-out text of {name} is {evaluation.nats} nats: the student has diverged; lower "
                "optim.lr and continue from the last checkpoint with --resume"
            )
    total = sum(domains.values(), Evaluation())
    if not total.num_bytes:
        raise DataError("no held-out sample has a token that the student predicts: hold out longer documents")
    values: dict[str, Any] = {"held_out_bpb": total.bpb, "held_out_nats_per_token": total.nats / total.num_tokens}
    if len(domains) > 1:
        values["held_out_domains"] = {name: one.bpb if one.num_bytes else None for name, one in domains.items()}
    return values


def evaluate_folder(folder: Path, config: RunConfig) -> dict[str, Evaluation]:
    """Evaluate an exported model, by domain, on the held-out text of a run file, with its precision and device.

    Raises DataError if there is no held-out text.
    """
    student = load_student(StudentConfig(model=str(folder), **config.student.model_dump(include=SCORING_KEYS)))
    corpus = load_corpus(config.data, config.eval, student.vocabulary, config.train.seed)
    if not corpus.held_out:
        raise DataError("there is no held-out text to measure on; set eval.held_out_documents")
    tokenizer = student_tokenizer(folder, student.vocabulary, config.student, config.data, corpus.has_chats)
    return evaluate_domains(student, held_out_domains(corpus, tokenizer, config.data), config.loss.chunk_tokens)
