"""The card of a teacher that has none: what a plain vLLM server's model list and the tokenizer's folder say of it.

Nothing is asked here; stock.py does.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from teachers.errors import FingerprintMismatch, TeacherError
from teachers.models import bos_of
from teachers.protocol import PROBE, TOKENIZER_FILES, Card

PROBE_TEXT = PROBE + "\n\tdef f(x): return x ** 2  # 1,234.5 € – naïve 東京 🙂\n"
# Mean |Δ| per token of PROBE_TEXT, nats. SmolLM2-135M in bfloat16: one vLLM, asked alone or with 40 other texts, 0.000;
# vLLM and transformers 0.042; all weights shifted by 0.1, 0.3, 1 and 3%: 0.016, 0.047, 0.16, 0.48.
PROBE_TOLERANCE = 0.1


class Model(msgspec.Struct):
    """An entry of `/v1/models`; one with a parent is an adapter."""

    id: str
    max_model_len: int | None = None
    root: str | None = None
    parent: str | None = None

    @property
    def max_tokens(self) -> int:
        """The longest sequence that can be scored: vLLM insists on generating one token behind it."""
        return (self.max_model_len or 1) - 1

    def fingerprint(self, tokenizer_sha256: str) -> str:
        """Of all that can be known without asking the weights."""
        known = json.dumps([self.id, self.root, self.max_model_len, tokenizer_sha256])
        return hashlib.sha256(known.encode()).hexdigest()


class StockCard(Card):
    """A card that was found by asking. Two replicas of one teacher agree by `StockClient.check`, not by equality."""

    root: str | None
    """Where the server has its model from."""
    probe_ids: tuple[int, ...]
    """PROBE_TEXT as the server's tokenizer cuts it, without special tokens."""
    probe_logprobs: tuple[float, ...] = ()
    """What the model says of them, behind BOS where it expects it; nats. Without BOS nothing is said of the first."""


@dataclass(frozen=True)
class TokenizerFolder:
    """A folder with tokenizer.json and, maybe, the model's config.json."""

    path: Path

    @cached_property
    def files(self) -> dict[str, bytes]:
        """The tokenizer's files by allow-listed name."""
        return {n: (self.path / n).read_bytes() for n in TOKENIZER_FILES if (self.path / n).is_file()}

    def sha256(self, name: str) -> str | None:
        """Of one file, if it is there."""
        return hashlib.sha256(self.files[name]).hexdigest() if name in self.files else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the language model, if it is there."""
        path = self.path / "config.json"
        config = _parse(path, path.read_bytes()) if path.is_file() else {}
        return config.get("text_config", config)  # type: ignore[no-any-return]

    @cached_property
    def adds_bos(self) -> bool | None:
        """The tokenizer's word on BOS, if it has one."""
        said = self._said.get("add_bos_token")
        return said if isinstance(said, bool) else None

    def special_id(self, role: str) -> int | None:
        """The id of "bos" or "eos": the model's word, else the tokenizer's."""
        if f"{role}_token_id" in self.config:
            value = self.config[f"{role}_token_id"]
        else:
            token = self._said.get(f"{role}_token")
            value = self._tokenizer.token_to_id(token.get("content") if isinstance(token, dict) else token or "")
        first = value[0] if isinstance(value, list) else value
        return None if first is None else int(first)

    @property
    def bos_id(self) -> int | None:
        """As teachers.models.bos_of has it."""
        said = self.files.get("tokenizer_config.json", b"{}")
        return bos_of(self.files["tokenizer.json"], said, self.special_id("bos"))

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _said(self) -> dict[str, Any]:
        return _parse(self.path, self.files.get("tokenizer_config.json", b"{}"))

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer  # only here: whoever speaks the native dialect needs none

        try:
            tokenizer = Tokenizer.from_buffer(self.files["tokenizer.json"])
        except Exception as error:  # tokenizers raises bare Exception
            raise TeacherError(f"{self.path}/tokenizer.json is no tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError) as error:
        raise TeacherError(f"{path}: not the JSON of a tokenizer's folder: {error}") from error


def draft(model: Model, folder: TokenizerFolder, probe_ids: Sequence[int]) -> StockCard:
    """The card before the engine has been asked for its version, vocabulary, K, BOS and probe."""
    tokenizer_sha256 = folder.sha256("tokenizer.json")
    assert tokenizer_sha256 is not None
    return StockCard(
        model=model.id,
        fingerprint=model.fingerprint(tokenizer_sha256),
        engine="vllm",
        dtype="unknown",
        vocab_size=folder.config.get("vocab_size", 0),
        tokenizer_sha256=tokenizer_sha256,
        bos_id=folder.bos_id,
        eos_id=folder.special_id("eos"),
        expects_bos=False,
        chat_template_sha256=folder.sha256("chat_template.jinja"),
        max_tokens=model.max_tokens,
        max_top_k=0,
        root=model.root,
        probe_ids=tuple(probe_ids),
    )


def check_ids(expected: Sequence[int], received: Sequence[int], source: str) -> None:
    """Raises FingerprintMismatch naming the first token that differs."""
    if list(expected) == list(received):
        return
    pairs = zip(expected, received, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(received)))
    raise FingerprintMismatch(
        f"the server cuts a text otherwise than {source}: token {first} of {PROBE_TEXT[:20]!r}… should be "
        f"{_at(expected, first)} and is {_at(received, first)}"
    )


def _at(ids: Sequence[int], index: int) -> str:
    return str(ids[index]) if index < len(ids) else "missing"


def check_probe(expected: Sequence[float], received: Sequence[float]) -> None:
    """Raises FingerprintMismatch if other weights have spoken: see PROBE_TOLERANCE for what can be told apart."""
    gap = float(np.abs(np.subtract(expected, received)).mean())
    if not gap <= PROBE_TOLERANCE:
        bits = [-float(np.sum(nats)) / float(np.log(2)) for nats in (expected, received)]
        raise FingerprintMismatch(
            f"expected {bits[0]:.1f} bits for a known text, received {bits[1]:.1f}, and {gap:.3f} nats of difference a "
            f"token: over {PROBE_TOLERANCE}, so the teacher has other weights than before"
        )
