"""Tiny tokenizers of every kind with a few hundred tokens, trained on a page of text; each imitates a real family."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from alignment import Vocabulary
from tests.tiny import TEXT, tiny_vocabulary, tokenizer_json

PAGE = f"{TEXT} 1904 (six) naïve café 日本語 Ünïcode x=1; a\n\n\tb\n" * 3


def _prefixed() -> Tokenizer:
    """Like Llama 2: SentencePiece that adds a space in front of every text."""
    spec = json.loads(tokenizer_json("sentencepiece"))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    return Tokenizer.from_str(json.dumps(spec))


def _composing() -> Tokenizer:
    """Like Qwen: byte-level BPE after a normalizer that composes characters (NFC)."""
    tokenizer = Tokenizer.from_str(tokenizer_json("byte_level"))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _wordpiece() -> Tokenizer:
    """Like BERT uncased: lower case, no accents, "##" before the continuation of a word, no tokens for blanks."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        [PAGE], trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    return tokenizer


def _unigram() -> Tokenizer:
    """Like T5: Unigram without byte fallback over NFKC text; runs of blanks are one space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([PAGE], trainer)
    return tokenizer


_CONFIGS = {
    "prefixed": {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True},
    "composing": {"bos_token": "<|bos|>", "eos_token": "<|eos|>"},
    "wordpiece": {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
    "unigram": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
}
_BUILDERS = {"prefixed": _prefixed, "composing": _composing, "wordpiece": _wordpiece, "unigram": _unigram}


@cache
def vocabulary_of(kind: str) -> Vocabulary:
    """Build a tiny tokenizer: byte_level, sentencepiece, prefixed, composing, wordpiece or unigram."""
    if kind in ("byte_level", "sentencepiece"):
        return tiny_vocabulary(kind)  # type: ignore[arg-type]
    return Vocabulary.parse(_BUILDERS[kind]().to_str().encode(), json.dumps(_CONFIGS[kind]).encode(), name=kind)


KINDS = ("byte_level", "sentencepiece", *_BUILDERS)
WRITES_BYTES = ("byte_level", "sentencepiece", "prefixed", "composing")  # have tokens for all bytes
