"""A toy world with known probabilities: languages with a finite list of texts, and exact models of any tokenizer.

A language lists all of its texts with their exact probabilities, from a seeded Markov chain of order 2 that ends at
LONGEST letters at the latest, so no probability is missing. Tokenizers are real byte-level BPEs with a few merges, and
every text is closed by EOS. An exact model computes P(next token | prefix) by counting the tokenizations of all texts.

Sizes: V the vocabulary of a model.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from alignment import Tokens, Translation, Vocabulary, translate
from teachers.protocol.rows import Rows

LONGEST = 6
SEED = 1

Prefix = tuple[int, ...]
Floats = NDArray[np.float64]
Grammar = Callable[[str], str]  # text so far -> the letters that may follow, "." for the end of the text


# --- languages ---


@dataclass(frozen=True, eq=False)
class Language:
    """All texts of a language and their probabilities, which sum to 1."""

    texts: tuple[str, ...]
    probs: Floats


def any_letters(before: str) -> str:
    """Allow any of three letters after any text, and the end of the text everywhere."""
    return "abc."


def syllables(before: str) -> str:
    """Alternate consonants and vowels; a text may end after a vowel. The letters show where a syllable ends."""
    return "ae" if before[-1:] in ("b", "c") else "bc."


@cache
def language(grammar: Grammar, seed: int = SEED) -> Language:
    """Build the texts of 0 … LONGEST letters; the probabilities after two letters are drawn from a flat Dirichlet."""
    rng = np.random.default_rng(seed)
    weights: dict[str, dict[str, float]] = {}
    for before in ("".join(letters) for n in range(3) for letters in itertools.product("abce", repeat=n)):
        drawn = rng.dirichlet(np.ones(len(grammar(before))))
        weights[before] = dict(zip(grammar(before), drawn.tolist(), strict=True))
    texts: dict[str, float] = {}
    unfinished = {"": 1.0}
    for length in range(LONGEST + 1):
        longer: dict[str, float] = {}
        for text, prob in unfinished.items():
            following = weights[text[-2:]] if length < LONGEST else {".": 1.0}
            if "." in following:
                texts[text] = prob * following["."]
            longer |= {text + letter: prob * p for letter, p in following.items() if letter != "."}
        unfinished = longer
    return Language(tuple(texts), np.array(list(texts.values())))


# --- exact models ---


def bpe(letters: str, *merges: str) -> Vocabulary:
    """Build a byte-level BPE over a few letters; merges are written "ab+c" and applied in this order."""
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
    """The exact next-token model of one tokenizer for a language.

    tokens      tokenization of every text, closed by EOS
    texts_with  tokenization prefix -> bit mask of the texts whose tokenization begins with it
    following   tokenization prefix -> [V] probability of the next token
    """

    vocabulary: Vocabulary
    tokens: tuple[Tokens, ...]
    texts_with: Mapping[Prefix, int]
    following: Mapping[Prefix, Floats]


def exact_model(vocabulary: Vocabulary, texts: Language) -> Model:
    """Sum the probability of every text at every prefix of its tokenization."""
    tokens = tuple(vocabulary.encode(text, close=True) for text in texts.texts)
    texts_with: dict[Prefix, int] = defaultdict(int)
    weight: dict[Prefix, Floats] = defaultdict(lambda: np.zeros(len(vocabulary)))
    for n, (each, prob) in enumerate(zip(tokens, texts.probs.tolist(), strict=True)):
        ids = prefix_of(each)
        for i, token in enumerate(ids):
            weight[ids[:i]][token] += prob
        for i in range(len(ids) + 1):
            texts_with[ids[:i]] |= 1 << n
    return Model(vocabulary, tokens, dict(texts_with), {prefix: row / row.sum() for prefix, row in weight.items()})


def prefix_of(tokens: Tokens, length: int | None = None) -> Prefix:
    """Return the first ids as a tuple; all of them by default."""
    return tuple(tokens.ids[:length].tolist())


def exact_rows(model: Model, tokens: Tokens, top_k: int) -> Rows:
    """Return the model's rows for every token of a text, cut to the top k, as from a teacher that saw a BOS."""
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


# --- pairs of teacher and student ---

LETTERS = bpe("abc")
TOKENS = bpe("abc", "a+b", "b+c", "ab+c", "c+a")
OTHER_TOKENS = bpe("abc", "b+c", "a+a", "c+bc", "a+c", "a+b")
SYLLABLE_LETTERS = bpe("abce")
SYLLABLES = bpe("abce", "b+a", "b+e", "c+a", "c+e")
PAIRS: dict[str, tuple[Grammar, Vocabulary, Vocabulary]] = {  # grammar, teacher, student
    "one tokenizer": (any_letters, TOKENS, TOKENS),
    "syllables to letters": (syllables, SYLLABLES, SYLLABLE_LETTERS),
    "letters to syllables": (syllables, SYLLABLE_LETTERS, SYLLABLES),
    "tokens to letters": (any_letters, TOKENS, LETTERS),
    "letters to tokens": (any_letters, LETTERS, TOKENS),
    "tokens to other tokens": (any_letters, TOKENS, OTHER_TOKENS),
}


@dataclass(frozen=True, eq=False)
class Pair:
    """The exact models of a teacher and a student of one language."""

    language: Language
    teacher: Model
    student: Model
    translation: Translation


@cache
def pair(name: str) -> Pair:
    """Build a pair of `PAIRS`."""
    grammar, teacher, student = PAIRS[name]
    texts = language(grammar)
    return Pair(texts, exact_model(teacher, texts), exact_model(student, texts), translate(teacher, student))
