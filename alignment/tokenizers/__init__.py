"""Tokenizer kinds: the registry, and the kind of a parsed tokenizer.json.

To add a kind, write one file with a class that implements `alignment.tokenizers.kinds.TokenizerKind`, add one line to
`TOKENIZER_KINDS`, and add one test.
"""

import pkgutil
from functools import cache

from alignment.tokenizers.kinds import Spec, TokenizerError, TokenizerKind

# Name → "module:class". The first kind that matches a tokenizer is used. A module is imported when it is first tested.
TOKENIZER_KINDS: dict[str, str] = {
    "wordpiece": "alignment.tokenizers.wordpiece:WordPiece",
    "byte-level": "alignment.tokenizers.byte_level:ByteLevel",
    "sentencepiece": "alignment.tokenizers.sentencepiece:SentencePiece",
}


def tokenizer_kind(spec: Spec, name: str) -> TokenizerKind:
    """Return the first registered kind that matches a parsed tokenizer.json.

    Raises TokenizerError, with the reason, if the tokenizer `name` is of no registered kind.
    """
    for target in TOKENIZER_KINDS.values():
        kind = _resolve(target)
        if kind.matches(spec):
            return kind
    raise TokenizerError(
        f"the tokenizer of {name} {_reason(spec)}: expected one of the kinds {', '.join(TOKENIZER_KINDS)}"
    )


@cache
def _resolve(target: str) -> TokenizerKind:
    kind: TokenizerKind = pkgutil.resolve_name(target)()
    return kind


def _reason(spec: Spec) -> str:
    """Return why no kind matches, as the predicate of a sentence."""
    model = spec["model"]
    if model.get("type") not in ("BPE", "Unigram", "WordPiece"):
        return f"is {model.get('type')}, not BPE, Unigram or WordPiece"
    if model.get("end_of_word_suffix"):
        return f"marks the ends of words with {model['end_of_word_suffix']!r}, its tokens contain no spaces"
    return "is neither byte-level nor SentencePiece, its tokens mark no spaces"
