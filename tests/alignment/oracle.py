"""A toy world where the truth is known: what does byte-chain alignment say at each position, and what is right?

A language is a finite list of texts with their exact probabilities, from a seeded Markov chain of order 2 that must
end at LONGEST letters, so nothing is left out. Tokenizers are real byte-level BPEs of a few merges, and every text is
closed by EOS. The teacher is exact: P(next token | prefix) is the probability that its tokenization of the whole text
goes on so. The truth for the student is the same quotient over the student's tokenization of the same texts.

`python -m tests.alignment.oracle` prints the tables of docs/alignment.md.

Legend: M positions of the student over all texts, V its vocabulary, W the teacher's, G distinct student prefixes.
"""

import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
from numpy.typing import NDArray

from alignment import Target, Tokens, Translation, Vocabulary, align, translate
from alignment.chain import EXACT_ABOVE, cuts_between
from teachers.rows import Rows

LONGEST = 6
SEED = 1
EM_STEPS = 300
BOUNDS = (0.0, 1e-4, 1e-3, 1e-2)

Prefix = tuple[int, ...]
Floats = NDArray[np.float64]
Follows = Callable[[str], str]


# --- the language ---


@dataclass(frozen=True, eq=False)
class Language:
    """Every text with its probability; they sum to 1."""

    texts: tuple[str, ...]
    probs: Floats


def free(before: str) -> str:
    """Any of three letters may follow anything, and the text may end anywhere ('.')."""
    return "abc."


def syllables(before: str) -> str:
    """A consonant, then a vowel; the text may end after a vowel ('.'). Where a syllable ends shows in its letters."""
    return "ae" if before[-1:] in ("b", "c") else "bc."


@cache
def language(follows: Follows, seed: int = SEED) -> Language:
    """Texts of 0 … LONGEST letters; the weights of what follows two letters are drawn from a flat Dirichlet."""
    rng = np.random.default_rng(seed)
    weights: dict[str, dict[str, float]] = {}
    for before in ("".join(letters) for n in range(3) for letters in itertools.product("abce", repeat=n)):
        drawn = rng.dirichlet(np.ones(len(follows(before))))
        weights[before] = dict(zip(follows(before), drawn.tolist(), strict=True))
    texts: dict[str, float] = {}
    growing = {"": 1.0}
    for length in range(LONGEST + 1):
        longer: dict[str, float] = {}
        for text, prob in growing.items():
            following = weights[text[-2:]] if length < LONGEST else {".": 1.0}
            if "." in following:
                texts[text] = prob * following["."]
            longer |= {text + letter: prob * p for letter, p in following.items() if letter != "."}
        growing = longer
    return Language(tuple(texts), np.array(list(texts.values())))


# --- the models ---


def bpe(letters: str, *merges: str) -> Vocabulary:
    """A byte-level BPE over a few letters; a merge is written "ab+c", earlier ones are made first."""
    pairs = [merge.split("+") for merge in merges]
    tokens = [*letters, *("".join(pair) for pair in pairs)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": len(tokens), "content": "<eos>", "special": True, **flags}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": pairs},
    }
    config = {"eos_token": "<eos>"}
    return Vocabulary.parse(json.dumps(spec).encode(), json.dumps(config).encode(), name=" ".join(tokens))


@dataclass(frozen=True, eq=False)
class Model:
    """The exact next-token model of one tokenizer over a language.

    tokens     the closed tokenization of every text
    begin      tokenization prefix -> the texts that begin so, as bits
    following  tokenization prefix -> [V] probability of the next token
    """

    vocabulary: Vocabulary
    tokens: tuple[Tokens, ...]
    begin: Mapping[Prefix, int]
    following: Mapping[Prefix, Floats]


def exact_model(vocabulary: Vocabulary, spoken: Language) -> Model:
    """Count every text, with its probability, at every prefix of its tokenization."""
    tokens = tuple(vocabulary.encode(text, close=True) for text in spoken.texts)
    begin: dict[Prefix, int] = defaultdict(int)
    weight: dict[Prefix, Floats] = defaultdict(lambda: np.zeros(len(vocabulary)))
    for n, (each, prob) in enumerate(zip(tokens, spoken.probs.tolist(), strict=True)):
        ids = prefix_of(each)
        for i, token in enumerate(ids):
            weight[ids[:i]][token] += prob
        for i in range(len(ids) + 1):
            begin[ids[:i]] |= 1 << n
    return Model(vocabulary, tokens, dict(begin), {prefix: row / row.sum() for prefix, row in weight.items()})


def prefix_of(tokens: Tokens, length: int | None = None) -> Prefix:
    return tuple(tokens.ids[:length].tolist())


def exact_rows(model: Model, tokens: Tokens, top_k: int) -> Rows:
    """The model's answer for every token of a text, as its first had a BOS before it, cut to the top k."""
    probs = np.array([model.following[prefix_of(tokens, i)] for i in range(len(tokens))])
    order = np.argsort(-probs, axis=1, kind="stable")[:, :top_k]
    listed = np.take_along_axis(probs, order, axis=1)
    with np.errstate(divide="ignore"):
        return Rows(
            start=0,
            ids=order.astype(np.uint32),
            logprobs=np.log(listed).astype(np.float32),
            actual=np.log(probs[np.arange(len(tokens)), tokens.ids]).astype(np.float32),
            tail=np.maximum(1 - listed.sum(axis=1), 0).astype(np.float32),
        )


# --- the comparison ---


@dataclass(frozen=True, eq=False)
class Pair:
    """A teacher and a student of one language."""

    spoken: Language
    teacher: Model
    student: Model
    translation: Translation


@cache
def pair(name: str) -> Pair:
    follows, teacher, student = PAIRS[name]
    spoken = language(follows)
    return Pair(spoken, exact_model(teacher, spoken), exact_model(student, spoken), translate(teacher, student))


@dataclass(frozen=True, eq=False)
class Aligned:
    """Every student position of every text, one after another.

    probs, tail   [M, V] and [M] what alignment says
    truth         [M, V] what is right
    weight        [M] probability of the text, scaled to sum to 1 over the positions
    group         [M] which student prefix the position has
    labels        [M] the token that stands there
    num_bytes     expected bytes of a text per expected position
    """

    probs: Floats
    tail: Floats
    truth: Floats
    weight: Floats
    group: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_bytes: float


@cache
def aligned(name: str, top_k: int, exact_above: float = EXACT_ABOVE) -> Aligned:
    """Align the exact teacher's rows for every text."""
    world = pair(name)
    targets = [
        align(
            exact_rows(world.teacher, teacher, top_k), 0, teacher, student, world.translation, exact_above=exact_above
        )
        for teacher, student in zip(world.teacher.tokens, world.student.tokens, strict=True)
    ]
    prefixes = [prefix_of(tokens, i) for tokens in world.student.tokens for i in range(len(tokens))]
    numbers = {prefix: n for n, prefix in enumerate(dict.fromkeys(prefixes))}
    lengths = [len(tokens) for tokens in world.student.tokens]
    num_positions = float(world.spoken.probs @ lengths)
    return Aligned(
        probs=np.concatenate([_dense(target, len(world.student.vocabulary)) for target in targets]),
        tail=np.concatenate([target.tail for target in targets]).astype(np.float64),
        truth=np.array([world.student.following[prefix] for prefix in prefixes]),
        weight=np.repeat(world.spoken.probs, lengths) / num_positions,
        group=np.array([numbers[prefix] for prefix in prefixes]),
        labels=np.concatenate([tokens.ids for tokens in world.student.tokens]),
        num_bytes=float(world.spoken.probs @ [len(text) for text in world.spoken.texts]) / num_positions,
    )


def _dense(target: Target, vocab_size: int) -> Floats:
    out = np.zeros((len(target), vocab_size))
    out[target.rows, target.ids] = target.probs
    return out


def listed_errors(positions: Aligned) -> Floats:
    """[M] total variation distance to the truth with all unlisted tokens as one bucket, as the losses take the tail."""
    listed = positions.probs > 0
    right = np.where(listed, positions.truth, 0)
    bucket = np.abs(positions.tail - (1 - right.sum(axis=1)))
    return np.asarray((np.abs(positions.probs - right).sum(axis=1) + bucket) / 2)


def forward_kl(positions: Aligned) -> Floats:
    """[M] nats, KL(target ‖ truth) with the tail as one bucket; inf where alignment says what cannot follow."""
    listed = positions.probs > 0
    unlisted = np.where(listed, 0, positions.truth).sum(axis=1)
    q = np.column_stack([positions.probs, np.where(positions.tail > 1e-6, positions.tail, 0)])
    p = np.column_stack([positions.truth, unlisted])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(q > 0, q * np.log(q / p), 0).sum(axis=1))


def learned(positions: Aligned) -> Floats:
    """[G, V] what an unlimited student learns: the minimum of the summed forward KL over all its positions, by
    EM_STEPS steps of EM from a uniform start. A tail is shared out as the student itself would.
    """
    num_groups = int(positions.group.max()) + 1
    shape = (num_groups, positions.probs.shape[1])
    cell = (positions.group[:, None] * shape[1] + np.arange(shape[1])).ravel()
    total = np.bincount(positions.group, weights=positions.weight)
    unlisted = positions.probs == 0
    student = np.full(shape, 1 / shape[1])
    for _ in range(EM_STEPS):
        share = student[positions.group] * unlisted
        share *= (positions.tail / np.maximum(share.sum(axis=1), 1e-300))[:, None]
        share += positions.probs
        summed = np.bincount(cell, weights=(share * positions.weight[:, None]).ravel(), minlength=cell.max() + 1)
        student = summed.reshape(shape) / total[:, None]
    return student


def settled(name: str) -> NDArray[np.bool_]:
    """[M] positions where what was read tells all that alignment takes for granted, at K = W and with no bound.

    Both tokenizations have a boundary at the block's beginning in every text that either cannot yet tell from this
    one; every branch of the block is written alike whatever follows it; and none ends where the student predicts.
    """
    world = pair(name)
    out: list[bool] = []
    for teacher, student in zip(world.teacher.tokens, world.student.tokens, strict=True):
        cuts = cuts_between(teacher, student, world.translation)
        ids, written_ids = prefix_of(teacher), prefix_of(student)
        for b in range(len(cuts.at) - 1):
            begin, stop = cuts.student[b : b + 2].tolist()
            branches = list(_branches(world, ids, cuts.teacher[b : b + 2].tolist()))
            read, rest = written_ids[:begin], written_ids[begin:stop]
            sure = world.teacher.begin[ids[: cuts.teacher[b]]] == world.student.begin[read]
            sure &= all(not texts & ~world.student.begin.get(read + branch, 0) for branch, texts in branches)
            out += [sure and all(branch != rest[:r] for branch, _ in branches) for r in range(len(rest))]
    return np.array(out)


def _branches(world: Pair, ids: Prefix, block: Sequence[int]) -> Iterator[tuple[Prefix, int]]:
    """What alignment makes of everything that the teacher could list in a block: student tokens, and the texts."""
    begin, stop = block
    for t in range(begin, stop):
        for x in range(len(world.teacher.vocabulary)):
            texts = world.teacher.begin.get((*ids[:t], x), 0)
            if texts and (x != ids[t] or t == stop - 1):
                pieces = [world.translation.pieces[i] or b"" for i in (*ids[begin:t], x)]
                special = t == begin and not pieces[-1]
                alone = [world.student.vocabulary.roles["eos"]]
                yield tuple(alone if special else world.student.vocabulary.write([b"".join(pieces)])[0]), texts


# --- the tables ---

LETTERS = bpe("abc")
TOKENS = bpe("abc", "a+b", "b+c", "ab+c", "c+a")
OTHERS = bpe("abc", "b+c", "a+a", "c+bc", "a+c", "a+b")
OPEN = bpe("abce")
SYLLABLES = bpe("abce", "b+a", "b+e", "c+a", "c+e")
PAIRS: dict[str, tuple[Follows, Vocabulary, Vocabulary]] = {
    "one tokenizer": (free, TOKENS, TOKENS),
    "syllables to letters": (syllables, SYLLABLES, OPEN),
    "letters to syllables": (syllables, OPEN, SYLLABLES),
    "tokens to letters": (free, TOKENS, LETTERS),
    "letters to tokens": (free, LETTERS, TOKENS),
    "tokens to other tokens": (free, TOKENS, OTHERS),
}


@dataclass(frozen=True)
class Figures:
    """Means over all positions, weighted by the probability of the text.

    mass        listed probability
    distance    total variation to the truth, the tail counted as lost
    error       total variation to the truth, the tail as one bucket
    forward_kl  nats, KL(target ‖ truth) with the tail as one bucket, over the positions where it is finite
    impossible  share of positions where it is not: the target lists a token that cannot follow
    learned     total variation between the truth and what an unlimited student learns
    gain        bits per byte by which the target predicts the text better than the truth does: what it knows of
                the text beyond the position
    """

    mass: float
    distance: float
    error: float
    forward_kl: float
    impossible: float
    learned: float
    gain: float


@cache
def figures(name: str, top_k: int, exact_above: float = 0.0) -> Figures:
    """One line of a table."""
    positions = aligned(name, top_k, exact_above)
    weight, labels = positions.weight, (np.arange(len(positions.labels)), positions.labels)
    divergence = forward_kl(positions)
    finite = np.isfinite(divergence)
    right = np.zeros_like(learned(positions))
    right[positions.group] = positions.truth
    away = np.abs(learned(positions) - right).sum(axis=1)[positions.group] / 2
    gained = np.log2(positions.probs[labels] / positions.truth[labels])
    return Figures(
        mass=float(weight @ positions.probs.sum(axis=1)),
        distance=float(weight @ (np.abs(positions.probs - positions.truth).sum(axis=1) + positions.tail)) / 2,
        error=float(weight @ listed_errors(positions)),
        forward_kl=float(weight[finite] @ divergence[finite] / weight[finite].sum()),
        impossible=float(weight[~finite].sum()),
        learned=float(weight @ away),
        gain=float(weight @ gained) / positions.num_bytes,
    )


def every_k(name: str) -> range:
    """From 1 to the teacher's whole vocabulary."""
    return range(1, len(PAIRS[name][1]) + 1)


def _print(columns: Iterable[str]) -> None:
    sys.stdout.write("".join(f"{column:>12}" for column in columns).rstrip() + "\n")


def main() -> None:
    names = [field.name for field in fields(Figures)]
    for name, (follows, teacher, student) in PAIRS.items():
        spoken = language(follows)
        sure = float(aligned(name, 1).weight @ settled(name))
        sys.stdout.write(
            f"\n{name}: [{teacher.name}] to [{student.name}], {len(spoken.texts):,} texts, {sure:.0%} settled\n"
        )
        _print(["K", "exact_above", *names])
        for top_k, bound in [(k, 0.0) for k in every_k(name)] + [(every_k(name)[-1], b) for b in BOUNDS[1:]]:
            values = [getattr(figures(name, top_k, bound), column) for column in names]
            _print(
                [str(top_k), f"{bound:g}", *(f"{abs(value) if abs(value) < 5e-7 else value:.4f}" for value in values)]
            )


if __name__ == "__main__":
    main()
