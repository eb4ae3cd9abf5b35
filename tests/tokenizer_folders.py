"""Tiny tokenizers in the formats of model directories: SentencePiece, vocabulary with merges, Tekken and tiktoken."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import TEXT, tokenizer_json

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_config(folder: Path, **values: Any) -> None:
    """Write tokenizer_config.json."""
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")


def sentencepiece_model(folder: Path, name: str = "tokenizer.model", kind: str = "bpe", **config: Any) -> None:
    """Train a SentencePiece model with byte fallback on a page of text."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=400,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity" if kind == "bpe" else "nmt_nfkc",
        remove_extra_whitespaces=kind != "bpe",
        minloglevel=3,
    )
    (folder / name).write_bytes(model.getvalue())
    write_config(folder, **{"tokenizer_class": "LlamaTokenizer"} | config)


def vocabulary_and_merges(folder: Path, **config: Any) -> None:
    """Write the byte-level BPE of tests.tiny as vocab.json and merges.txt."""
    model = json.loads(tokenizer_json("byte_level"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "unk_token": "<|eos|>", "pad_token": "<|eos|>"}
    write_config(folder, **special | {"tokenizer_class": "GPT2Tokenizer"} | config)


def tekken(folder: Path, **config: Any) -> None:
    """Write a tekken.json with the 256 bytes and a few words."""
    tokens = _ranked_tokens()
    special = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(("<unk>", "<s>", "</s>", "<pad>"))]
    content = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) + len(special),
            "default_num_special_tokens": len(special),
            "version": "v7",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for i, token in enumerate(tokens)
        ],
        "special_tokens": special,
    }
    (folder / "tekken.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "mistral"}', encoding="utf-8")


def tiktoken(folder: Path, **config: Any) -> None:
    """Write tiktoken ranks with the 256 bytes and a few words."""
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(_ranked_tokens()))
    (folder / "tiktoken.model").write_text("".join(lines), encoding="utf-8")
    write_config(folder, **{"eos_token": "<|end|>", "extra_special_tokens": ["<|end|>"]} | config)


def _ranked_tokens() -> list[bytes]:
    return [*(bytes([i]) for i in range(256)), b"th", b"the", b"he", b" t", b" th", b" the", b"er", b"or", b"ar"]


def unigram_model(folder: Path, **config: Any) -> None:
    """Train a SentencePiece model of the kind that T5 uses."""
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    sentencepiece_model(folder, "spiece.model", "unigram", **special | {"tokenizer_class": "T5Tokenizer"} | config)


FORMATS: dict[str, Callable[..., None]] = {
    "sentencepiece": sentencepiece_model,
    "unigram": unigram_model,
    "vocabulary and merges": vocabulary_and_merges,
    "tekken": tekken,
    "tiktoken": tiktoken,
}
