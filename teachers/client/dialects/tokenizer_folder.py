"""The tokenizer of a server that provides no files: a local directory, named in the run file."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alignment.tokenizers.folder import has_tokenizer, tokenizer_files
from alignment.tokenizers.kinds import TokenizerError
from teachers.bos import bos_id_of, declared_bos
from teachers.client.dialects.probed_card import PROBE_TEXT
from teachers.protocol.errors import FingerprintMismatch, TeacherError


@dataclass(frozen=True)
class TokenizerFolder:
    """A directory with a tokenizer and, optionally, the model's config.json."""

    path: Path

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Contents of the tokenizer files by name, with the tokenizer as transformers loads it. Raises TeacherError."""
        try:
            return tokenizer_files(self.path)
        except TokenizerError as error:
            raise TeacherError(str(error)) from error

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Hash of tokenizer.json."""
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    @cached_property
    def probe_ids(self) -> tuple[int, ...]:
        """PROBE_TEXT in tokens of the tokenizer, without special tokens."""
        return tuple(self.encode(PROBE_TEXT))

    def load(self) -> "TokenizerFolder":
        """Load the tokenizer, and return this folder. Takes seconds: call it in a thread. Raises TeacherError."""
        _ = self.tokenizer_sha256, self.bos_id, self.probe_ids  # cached
        return self

    def sha256(self, name: str) -> str | None:
        """Return the hash of one file, None if it does not exist."""
        return hashlib.sha256(self.files[name]).hexdigest() if name in self.files else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the language model; empty if it does not exist."""
        path = self.path / "config.json"
        config = _parse_json(path, path.read_bytes()) if path.is_file() else {}
        text = config.get("text_config")
        return text if isinstance(text, dict) else config

    def declared_bos(self, bos_id: int | None) -> bool | None:
        """Return whether the files declare that BOS is expected; None if they declare nothing."""
        return declared_bos(bos_id, self._tokenizer_config_bytes)

    def special_id(self, role: str) -> int | None:
        """Return the id of "bos" or "eos" in config.json; the tokenizer's id if config.json has none.

        Raises TeacherError if the value in config.json is no integer.
        """
        if f"{role}_token_id" in self.config:
            value = self.config[f"{role}_token_id"]
        else:
            token = self._tokenizer_config.get(f"{role}_token")
            content = token.get("content") if isinstance(token, dict) else token
            value = self._tokenizer.token_to_id(content) if isinstance(content, str) else None
        first = next(iter(value), None) if isinstance(value, list) else value
        if first is not None and type(first) is not int:
            raise TeacherError(
                f"{self.path}/config.json: expected an id as {role}_token_id, received {str(first)[:40]!r}"
            )
        return first

    @property
    def vocab_size(self) -> int | None:
        """Size of the vocabulary in config.json; None if it states none.

        Raises TeacherError for anything but a positive int.
        """
        size = self.config.get("vocab_size")
        if size is not None and (type(size) is not int or size < 1):
            raise TeacherError(
                f"{self.path}/config.json: expected a positive integer as vocab_size, received {str(size)[:40]!r}"
            )
        return size

    @cached_property
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


def open_tokenizer_folder(path: Path | None, teacher: str, server: str) -> TokenizerFolder:
    """Return the directory that the run file names. Raises TeacherError if it has no tokenizer.

    server  kind of server with an article, for the message
    """
    if path is None or not _has_tokenizer(path):
        found = "the run file names none" if path is None else f"{path} has none"
        raise TeacherError(
            f"{server} provides no tokenizer, and {found}: set teachers.{teacher}.tokenizer to a directory with the "
            "tokenizer that the server uses"
        )
    return TokenizerFolder(path)


def _has_tokenizer(path: Path) -> bool:
    try:
        return has_tokenizer(path)
    except OSError:  # a server may state a name that is too long for the file system
        return False


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise TeacherError(f"{path}: expected a JSON object: {error}") from error


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
