"""Helpers of the conversions in tests.zoo_build and tests.zoo_sentencepiece: merges, BOS, and the two output files."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer, processors

ReadMember = Callable[[str], bytes]  # name of a member of a package -> its content
Files = dict[str, bytes]
Merges = list[tuple[str, str]]

DIFFSYNTH = "diffsynth/tokenizer_configs"


def merges_of(tokens: Iterable[str], order: Mapping[str, float]) -> Merges:
    """Return all merges of two tokens into one, ordered by the merged token (lowest first)."""
    ranked = sorted(tokens, key=order.__getitem__)
    return [
        (token[:i], token[i:])
        for token in ranked
        for i in range(1, len(token))
        if token[:i] in order and token[i:] in order
    ]


def with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """Add a template that puts BOS in front of a text."""
    special = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, *, add_bos: bool = False, **roles: str) -> Files:
    """Return both files of a tokenizer; `roles` are the tokens of bos, eos, pad and unk."""
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": config_file(add_bos=add_bos, **roles),
    }


def config_file(*, add_bos: bool = False, **roles: str) -> bytes:
    """Return the content of tokenizer_config.json."""
    content: dict[str, Any] = {f"{role}_token": roles.get(role) for role in ("bos", "eos", "pad", "unk")}
    content |= {"add_bos_token": add_bos, "clean_up_tokenization_spaces": False}
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    return (json.dumps(content, indent=2) + "\n").encode()
