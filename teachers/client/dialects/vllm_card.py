"""The card of a plain vLLM server, which has none: built from its model list and the tokenizer's directory.

This module sends no requests; vllm_openai.py does.
"""

import hashlib
import json
from collections.abc import Sequence

import msgspec

from teachers.client.dialects.probed_card import ProbedCard
from teachers.client.dialects.tokenizer_folder import TokenizerFolder
from teachers.protocol.decoding import decoding
from teachers.protocol.untrusted_text import clean

MAX_NAME_CHARS = 300  # of a model, which requests and messages repeat, and of its source


class Model(msgspec.Struct):
    """Entry of `/v1/models`. An entry with a parent is an adapter. Names with unprintable characters are rejected."""

    id: str
    max_model_len: int | None = None
    root: str | None = None
    parent: str | None = None

    def __post_init__(self) -> None:
        for name in (self.id, self.root or ""):
            if clean(name, MAX_NAME_CHARS) != name:
                raise ValueError(f"expected a name of at most {MAX_NAME_CHARS} printable characters")

    @property
    def max_tokens(self) -> int:
        """Longest sequence that can be scored: vLLM must generate one token after it."""
        return (self.max_model_len or 1) - 1

    def fingerprint(self, tokenizer_sha256: str) -> str:
        """Return a hash of all properties that are known without the weights."""
        properties = json.dumps([self.id, self.root, self.max_model_len, tokenizer_sha256])
        return hashlib.sha256(properties.encode()).hexdigest()


class VllmCard(ProbedCard):
    """The card of a plain vLLM server."""


def draft_card(
    model: Model, folder: TokenizerFolder, vocab_size: int, version: str, probe_ids: Sequence[int]
) -> VllmCard:
    """Build the card without the fields that need further requests: K, BOS and probe. Raises TeacherError."""
    tokenizer_sha256 = folder.sha256("tokenizer.json")
    assert tokenizer_sha256 is not None
    with decoding(f"card (from /v1/models and {folder.path})"):
        return VllmCard(
            model=model.id,
            fingerprint=model.fingerprint(tokenizer_sha256),
            engine=f"vllm {version}",
            dtype="unknown",
            vocab_size=vocab_size,
            tokenizer_sha256=tokenizer_sha256,
            bos_id=folder.bos_id,
            eos_id=folder.special_id("eos"),
            expects_bos=False,
            chat_template_sha256=folder.sha256("chat_template.jinja"),
            max_tokens=model.max_tokens,
            max_top_k=1,
            root=model.root,
            probe_ids=tuple(probe_ids),
        )
