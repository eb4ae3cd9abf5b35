"""Compare byte-chain alignment with the truth in a toy world (tests.alignment.toy_world).

The teacher is exact. The truth for the student is the exact next-token distribution of the student's tokenizer over the
same texts. `python -m tests.alignment.oracle` prints the tables of docs/alignment.md.

Sizes: M student positions over all texts, V the student's vocabulary, W the teacher's, G different student prefixes.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
from numpy.typing import NDArray

from alignment import Target, align
from alignment.byte_chain import EXACT_ABOVE, block_cuts
from tests.alignment.toy_world import PAIRS, Floats, Pair, Prefix, exact_rows, language, pair, prefix_of

EM_STEPS = 300
BOUNDS = (0.0, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True, eq=False)
class AlignedPositions:
    """All student positions of all texts, one after another.

    probs, tail   [M, V] and [M] target of the alignment
    truth         [M, V] exact next-token distribution of the student
    weight        [M] probability of the text, scaled so that the sum over positions is 1
    group         [M] index of the position's student prefix
    labels        [M] token of the text
    num_bytes     expected bytes of text per expected position
    """

    probs: Floats
    tail: Floats
    truth: Floats
    weight: Floats
    group: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_bytes: float


@cache
def aligned(name: str, top_k: int, exact_above: float = EXACT_ABOVE) -> AlignedPositions:
    """Align the exact teacher's rows for every text."""
    world = pair(name)
    targets = [
        align(
            exact_rows(world.teacher, teacher, top_k), 0, teacher, student, world.translation, exact_above=exact_above
        )
        for teacher, student in zip(world.teacher.tokens, world.student.tokens, strict=True)
    ]
    prefixes = [prefix_of(tokens, i) for tokens in world.student.tokens for i in range(len(tokens))]
    group_of = {prefix: n for n, prefix in enumerate(dict.fromkeys(prefixes))}
    lengths = [len(tokens) for tokens in world.student.tokens]
    num_positions = float(world.language.probs @ lengths)
    return AlignedPositions(
        probs=np.concatenate([_dense(target, len(world.student.vocabulary)) for target in targets]),
        tail=np.concatenate([target.tail for target in targets]).astype(np.float64),
        truth=np.array([world.student.following[prefix] for prefix in prefixes]),
        weight=np.repeat(world.language.probs, lengths) / num_positions,
        group=np.array([group_of[prefix] for prefix in prefixes]),
        labels=np.concatenate([tokens.ids for tokens in world.student.tokens]),
        num_bytes=float(world.language.probs @ [len(text) for text in world.language.texts]) / num_positions,
    )


def _dense(target: Target, vocab_size: int) -> Floats:
    out = np.zeros((len(target), vocab_size))
    out[target.rows, target.ids] = target.probs
    return out


def listed_errors(positions: AlignedPositions) -> Floats:
    """[M] Return the total variation to the truth with all unlisted tokens as one bucket, as in the losses."""
    listed = positions.probs > 0
    truth = np.where(listed, positions.truth, 0)
    bucket = np.abs(positions.tail - (1 - truth.sum(axis=1)))
    return np.asarray((np.abs(positions.probs - truth).sum(axis=1) + bucket) / 2)


def forward_kl(positions: AlignedPositions) -> Floats:
    """[M] Return KL(target ‖ truth) in nats, the tail as one bucket; inf if the target lists an impossible token."""
    listed = positions.probs > 0
    unlisted = np.where(listed, 0, positions.truth).sum(axis=1)
    q = np.column_stack([positions.probs, np.where(positions.tail > 1e-6, positions.tail, 0)])
    p = np.column_stack([positions.truth, unlisted])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(q > 0, q * np.log(q / p), 0).sum(axis=1))


def best_student(positions: AlignedPositions) -> Floats:
    """[G, V] Return the distributions that minimize the forward KL summed over the positions of each prefix.

    Computed by EM_STEPS steps of EM from a uniform start. A tail is distributed as the student itself would.
    """
    num_groups = int(positions.group.max()) + 1
    shape = (num_groups, positions.probs.shape[1])
    cell = (positions.group[:, None] * shape[1] + np.arange(shape[1])).ravel()
    total = np.bincount(positions.group, weights=positions.weight)
    unlisted = positions.probs == 0
    student = np.full(shape, 1 / shape[1])
    for _ in range(EM_STEPS):
        expected = student[positions.group] * unlisted
        expected *= (positions.tail / np.maximum(expected.sum(axis=1), 1e-300))[:, None]
        expected += positions.probs
        weights = (expected * positions.weight[:, None]).ravel()
        student = np.bincount(cell, weights=weights, minlength=cell.max() + 1).reshape(shape) / total[:, None]
    return student


def determined(name: str) -> NDArray[np.bool_]:
    """[M] Return the positions at which the text so far implies every assumption of the alignment (K = W, no bounds).

    At a determined position both tokenizations have a boundary at the start of the block in every text that begins like
    this one, every branch of the block is tokenized alike whatever follows it, and no branch ends at the position.
    """
    world = pair(name)
    out: list[bool] = []
    for teacher, student in zip(world.teacher.tokens, world.student.tokens, strict=True):
        cuts = block_cuts(teacher, student, world.translation)
        teacher_ids, student_ids = prefix_of(teacher), prefix_of(student)
        for b in range(len(cuts.at) - 1):
            begin, stop = cuts.student[b : b + 2].tolist()
            branches = list(_branches(world, teacher_ids, cuts.teacher[b : b + 2].tolist()))
            before, rest = student_ids[:begin], student_ids[begin:stop]
            certain = world.teacher.texts_with[teacher_ids[: cuts.teacher[b]]] == world.student.texts_with[before]
            certain &= all(not texts & ~world.student.texts_with.get(before + branch, 0) for branch, texts in branches)
            out += [certain and all(branch != rest[:r] for branch, _ in branches) for r in range(len(rest))]
    return np.array(out)


def _branches(world: Pair, ids: Prefix, block: Sequence[int]) -> Iterator[tuple[Prefix, int]]:
    """Yield the student tokens of every possible branch of a block, and the bit mask of its texts."""
    begin, stop = block
    for t in range(begin, stop):
        for x in range(len(world.teacher.vocabulary)):
            texts = world.teacher.texts_with.get((*ids[:t], x), 0)
            if texts and (x != ids[t] or t == stop - 1):
                pieces = [world.translation.pieces[i] or b"" for i in (*ids[begin:t], x)]
                is_eos = t == begin and not pieces[-1]
                eos = [world.student.vocabulary.roles["eos"]]
                yield tuple(eos if is_eos else world.student.vocabulary.write([b"".join(pieces)])[0]), texts


@dataclass(frozen=True)
class Figures:
    """Means over all positions, weighted by the probability of the text.

    mass           listed probability
    distance       total variation to the truth, the tail counted as lost
    error          total variation to the truth, the tail as one bucket
    forward_kl     nats, KL(target ‖ truth) with the tail as one bucket, over the positions at which it is finite
    impossible     share of the other positions: the target lists a token that cannot follow
    student_error  total variation between the truth and the best student (`best_student`)
    leak           bits per byte by which the target predicts the text better than the truth does: information about the
                   text after the position
    """

    mass: float
    distance: float
    error: float
    forward_kl: float
    impossible: float
    student_error: float
    leak: float


@cache
def figures(name: str, top_k: int, exact_above: float = 0.0) -> Figures:
    """Compute one line of a table."""
    positions = aligned(name, top_k, exact_above)
    weight, labels = positions.weight, (np.arange(len(positions.labels)), positions.labels)
    divergence, student = forward_kl(positions), best_student(positions)
    finite = np.isfinite(divergence)
    truth = np.zeros_like(student)
    truth[positions.group] = positions.truth
    student_errors = np.abs(student - truth).sum(axis=1)[positions.group] / 2
    leaks = np.log2(positions.probs[labels] / positions.truth[labels])
    return Figures(
        mass=float(weight @ positions.probs.sum(axis=1)),
        distance=float(weight @ (np.abs(positions.probs - positions.truth).sum(axis=1) + positions.tail)) / 2,
        error=float(weight @ listed_errors(positions)),
        forward_kl=float(weight[finite] @ divergence[finite] / weight[finite].sum()),
        impossible=float(weight[~finite].sum()),
        student_error=float(weight @ student_errors),
        leak=float(weight @ leaks) / positions.num_bytes,
    )


def every_k(name: str) -> range:
    """Return K from 1 to the size of the teacher's vocabulary."""
    return range(1, len(PAIRS[name][1]) + 1)


def _print(columns: Iterable[str]) -> None:
    sys.stdout.write("".join(f"{column:>15}" for column in columns).rstrip() + "\n")


def main() -> None:
    names = [field.name for field in fields(Figures)]
    for name, (grammar, teacher, student) in PAIRS.items():
        num_texts, share = len(language(grammar).texts), float(aligned(name, 1).weight @ determined(name))
        sys.stdout.write(
            f"\n{name}: [{teacher.name}] to [{student.name}], {num_texts:,} texts, {share:.0%} determined\n"
        )
        _print(["K", "exact_above", *names])
        for top_k, bound in [(k, 0.0) for k in every_k(name)] + [(every_k(name)[-1], b) for b in BOUNDS[1:]]:
            values = [getattr(figures(name, top_k, bound), column) for column in names]
            _print(
                [str(top_k), f"{bound:g}", *(f"{abs(value) if abs(value) < 5e-7 else value:.4f}" for value in values)]
            )


if __name__ == "__main__":
    main()
