"""How far the student agrees with its teachers, and with what they say together, on text that is never trained on.

At a position, of one target: is the student's likeliest token the likeliest that the target lists, and how many nats
is KL(target ‖ student) over the listed tokens and the tail. Averages over the positions at which the target lists
something; of a chat, over the supervised ones. A target is aligned to the student's tokenizer, as in training.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment import Target
from teachers.asking.pool import TeacherPool
from teachers.protocol import Card
from trainer.config import RunConfig
from trainer.data.reading import Reader, Reading
from trainer.data.samples import Sample
from trainer.learning.labels import Labels, labels_from
from trainer.learning.losses import Head, Objective, head_loss
from trainer.learning.student import Student
from trainer.results.evaluate import at_rest
from trainer.targets.asking import Asked, address_of, connected, together
from trainer.targets.fuser import Fuser

Values = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Agreement:
    """Sums over `positions`; add those of several samples."""

    agreeing: int = 0
    nats: float = 0.0
    positions: int = 0

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.agreeing + other.agreeing, self.nats + other.nats, self.positions + other.positions)

    @property
    def figures(self) -> dict[str, float | None]:
        """top1, a share, and kl in nats; None over no position."""
        if not self.positions:
            return {"top1": None, "kl": None}
        return {"top1": self.agreeing / self.positions, "kl": self.nats / self.positions}


@dataclass(frozen=True)
class Heard:
    """What teachers said at the start of a run: the card of each, by name, and their answers to some samples.

    A sample of 512 tokens at K = 64 takes about 0.3 MB for each teacher, in memory and nowhere else.
    """

    cards: dict[str, Card]
    asked: tuple[Asked, ...] = ()


def hear(config: RunConfig, reader: Reader, held_out: Sequence[Sample]) -> Heard:
    """Ask all teachers for their cards, and about `eval.agreement_samples` held-out samples, spread evenly.

    Chats that may be skipped are. Raises the errors of `connected` and `Teachers.ask`.
    """
    if not config.teachers:
        return Heard({})
    num_samples = min(config.eval.agreement_samples, len(held_out))
    chosen = np.linspace(0, len(held_out) - 1, num_samples, dtype=int).tolist()
    return asyncio.run(_hear(config, reader, [held_out[i] for i in chosen]) if chosen else _cards(config))


async def _hear(config: RunConfig, reader: Reader, samples: Sequence[Sample]) -> Heard:
    async with connected(config, reader) as teachers:
        answers = await together(teachers.ask(sample) for sample in samples)
        cards = {teacher.config.name: teacher.card for teacher in teachers.teachers}
    kept = [asked.without_rows() for asked in answers if asked is not None]
    return Heard(cards, tuple(kept))


async def _cards(config: RunConfig) -> Heard:
    """Without tokenizers and translations, which take their time."""
    async with TeacherPool([address_of(teacher) for teacher in config.teachers]) as pool:
        names = [teacher.name for teacher in config.teachers]
        answers = await together(pool.connect(name) for name in names)
    return Heard({name: card for name, (card, _) in zip(names, answers, strict=True)})


def agreement(config: RunConfig, student: Student, asked: Sequence[Asked], fused: Sequence[Target]) -> Values:
    """As the metrics file has it: with `teachers`, by name, and with `fused`; nothing where nobody was asked."""
    found = [
        compare(student, one.reading, [*(answer.target for answer in one.answers), target], config.loss.chunk_tokens)
        for one, target in zip(asked, fused, strict=True)
    ]
    if not found:
        return {}
    *each, of_fused = (sum(column, Agreement()).figures for column in zip(*found, strict=True))
    names = [teacher.name for teacher in config.teachers]
    return {"teachers": dict(zip(names, each, strict=True)), "fused": of_fused}


def fused_now(fuser: Callable[[], Fuser], asked: Sequence[Asked], batch_samples: int, step: int) -> list[Target]:
    """The targets that a step would fuse of these answers, in batches as a run has them.

    `fuser` makes one that has seen what the run's has; one for each batch, as nothing is to be learned from held-out
    text.
    """
    targets = []
    for begin in range(0, len(asked), batch_samples):
        lessons = fuser().fuse(asked[begin : begin + batch_samples], step)
        targets += [Target.nothing(len(le.tokens)) if le.target is None else le.target for le in lessons]
    return targets


def compare(student: Student, reading: Reading, targets: Sequence[Target], chunk_tokens: int) -> list[Agreement]:
    """Over the supervised positions of one sample, with each of several targets for it."""
    first = student.first_position
    wanted: NDArray[np.bool_] = reading.supervised_T[first:]
    tokens = reading.tokens.ids[first:][wanted]
    labels = [labels_from([tokens], [target.after(first).take(wanted)]).to(student.device) for target in targets]
    objective = Objective(ce_weight=0.0, chunk_tokens=chunk_tokens)

    def work(head: Head, hidden_TD: Tensor) -> tuple[Tensor, ...]:
        apart = [head_loss(head, hidden_TD, one, objective).divergence_T for one in labels]
        return likeliest(head, hidden_TD, chunk_tokens), *apart

    with at_rest(student):
        chosen_T, *divergences = student.compute([reading.tokens], [wanted], work)
    return [agreement_of(one, chosen_T, apart_T) for one, apart_T in zip(labels, divergences, strict=True)]


def likeliest(head: Head, hidden_TD: Tensor, chunk_tokens: int) -> Tensor:
    """[T] the token with the largest logit at each position; logits exist for one chunk at a time.

    Computed in float32: rounded to bf16, the largest two are equal at 4% of SmolLM2's positions.
    """
    with torch.autocast(hidden_TD.device.type, enabled=False):
        head = replace(head, weight_VD=head.weight_VD.float())
        return torch.cat([head.logits(chunk.float()).argmax(1) for chunk in hidden_TD.split(chunk_tokens)])


def agreement_of(labels: Labels, chosen_T: Tensor, divergence_T: Tensor) -> Agreement:
    """Over the positions where something is listed; a token that is listed no lower than any other agrees."""
    largest_T = labels.probs_TK.amax(1)
    given_T = (labels.probs_TK * (labels.ids_TK == chosen_T[:, None])).sum(1)
    listed_T = largest_T > 0
    agreeing_T = listed_T & (given_T >= largest_T)
    return Agreement(int(agreeing_T.sum()), float(divergence_T[listed_T].double().sum()), int(listed_T.sum()))
