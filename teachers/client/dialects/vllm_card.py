"""The card of a plain vLLM server, which has none: built from its model list and the tokenizer's directory.

This module sends no requests; vllm_openai.py does.
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

from alignment.tokenizers.folder import tokenizer_files
from alignment.tokenizers.kinds import TokenizerError
from teachers.bos import bos_id_of, declared_bos
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import FingerprintMismatch, TeacherError
from teachers.protocol.messages import PROBE, TeacherCard
from teachers.protocol.untrusted_text import clean

PROBE_TEXT = PROBE + "\n\tdef f(x): return x ** 2  # 1,234.5 € – naïve 東京 🙂\n"
# Mean |Δ| in nats per token of PROBE_TEXT, measured with SmolLM2-135M in bfloat16. One vLLM, alone and with 40 other
# texts: 0.000. vLLM and transformers: 0.042. All weights changed by 0.1, 0.3, 1 and 3 %: 0.016, 0.047, 0.16, 0.48.
PROBE_TOLERANCE = 0.1


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


class VllmCard(TeacherCard):
    """The card of a plain vLLM server. Replicas are compared by `VllmOpenAIClient.check`, not by equality of cards."""

    root: str | None
    """Source of the server's model."""
    probe_ids: tuple[int, ...]
    """PROBE_TEXT in tokens of the server's tokenizer, without special tokens."""
    probe_logprobs: tuple[float, ...] = ()
    """Log-probabilities (nats) of probe_ids after BOS if the model expects it; else without the first id."""


@dataclass(frozen=True)
class TokenizerFolder:
    """A directory with a tokenizer and, optionally, the model's config.json."""

    path: Path

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Contents of the tokenizer's files by name, as transformers loads the tokenizer. Raises TeacherError."""
        try:
            return tokenizer_files(self.path)
        except TokenizerError as error:
            raise TeacherError(str(error)) from error

    def sha256(self, name: str) -> str | None:
        """Return the hash of one file, None if it does not exist."""
        return hashlib.sha256(self.files[name]).hexdigest() if name in self.files else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the language model; empty if it does not exist."""
        path = self.path / "config.json"
        config = _parse_json(path, path.read_bytes()) if path.is_file() else {}
        return config.get("text_config", config)  # type: ignore[no-any-return]

    def declared_bos(self, bos_id: int | None) -> bool | None:
        """Return whether the files declare that BOS is expected; None if they declare nothing."""
        return declared_bos(bos_id, self._tokenizer_config_bytes)

    def special_id(self, role: str) -> int | None:
        """Return the id of "bos" or "eos" in config.json; the tokenizer's id if config.json has none."""
        if f"{role}_token_id" in self.config:
            value = self.config[f"{role}_token_id"]
        else:
            token = self._tokenizer_config.get(f"{role}_token")
            value = self._tokenizer.token_to_id(token.get("content") if isinstance(token, dict) else token or "")
        first = value[0] if isinstance(value, list) else value
        return None if first is None else int(first)

    @property
    def bos_id(self) -> int | None:
        """Id of BOS: see teachers.bos.bos_id_of."""
        return bos_id_of(self.files["tokenizer.json"], self._tokenizer_config_bytes, self.special_id("bos"))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @property
    def _tokenizer_config_bytes(self) -> bytes:
        return self.files.get("tokenizer_config.json", b"{}")

    @cached_property
    def _tokenizer_config(self) -> dict[str, Any]:
        return _parse_json(self.path / "tokenizer_config.json", self._tokenizer_config_bytes)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer  # the native dialect does not need it

        try:
            tokenizer = Tokenizer.from_buffer(self.files["tokenizer.json"])
        except Exception as error:  # tokenizers raises bare Exception
            raise TeacherError(f"cannot load {self.path}/tokenizer.json: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError) as error:
        raise TeacherError(f"{path}: expected a JSON object: {error}") from error


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


def check_ids(expected: Sequence[int], received: Sequence[int], source: str) -> None:
    """Compare two tokenizations of PROBE_TEXT. Raises FingerprintMismatch naming the first different token."""
    if list(expected) == list(received):
        return
    pairs = zip(expected, received, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(received)))
    raise FingerprintMismatch(
        f"the server's tokenizer differs from {source}: token {first} of {PROBE_TEXT[:20]!r}… should be "
        f"{_token_at(expected, first)} and is {_token_at(received, first)}"
    )


def _token_at(ids: Sequence[int], index: int) -> str:
    return str(ids[index]) if index < len(ids) else "missing"


def check_probe(expected: Sequence[float], received: Sequence[float]) -> None:
    """Compare log-probabilities of PROBE_TEXT. Raises FingerprintMismatch if they differ by over PROBE_TOLERANCE."""
    gap = float(np.abs(np.subtract(expected, received)).mean())
    if not gap <= PROBE_TOLERANCE:
        bits = [-float(np.sum(nats)) / float(np.log(2)) for nats in (expected, received)]
        raise FingerprintMismatch(
            f"expected {bits[0]:.1f} bits for the probe text, received {bits[1]:.1f}, a mean difference of {gap:.3f} "
            f"nats per token, over {PROBE_TOLERANCE}: the teacher was restarted with other weights"
        )
