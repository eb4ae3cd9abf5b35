"""A tokenizer in terms of bytes: the bytes of every token id, and the tokens of a text or of a byte string.

`Vocabulary` is built from the two files of every fast tokenizer, tokenizer.json and tokenizer_config.json; `folder`
returns them for a model directory as transformers loads it. A vocabulary contains the bytes of every id (`kinds`) and
the ids of the special tokens by role (`roles`). It tokenizes texts, rendered chats (`rendered`) and continuations of a
text (`continuation`).
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from alignment.offsets import Tokens
from alignment.placement import locate_tokens
from alignment.tokenizers import tokenizer_kind
from alignment.tokenizers.continuation import ContinuationWriter
from alignment.tokenizers.folder import tokenizer_files
from alignment.tokenizers.kinds import Spec, TokenizerError, TokenizerKind, token_bytes_of, tokenizer_errors
from alignment.tokenizers.limits import check_limits, parse_object
from alignment.tokenizers.rendered import RenderedEncoder
from alignment.tokenizers.roles import ROLES, expects_bos, roles_of
from alignment.tokenizers.trial import try_tokenizer
from alignment.tokenizers.trial_process import PROBE
from alignment.trie import Trie, build_trie


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokenizer of one model.

    kind         tokenizer kind, which defines how tokens represent bytes
    fingerprint  sha256 of tokenizer.json; equal fingerprints mean equal ids
    token_bytes  [V] bytes of each id; None for special tokens and unassigned ids, which have no text
    roles        ids of the special tokens by role: bos, eos, end_of_turn, pad, unk. A role without a token is missing
    expects_bos  whether the model was trained with BOS in front of every text
    """

    name: str
    kind: TokenizerKind
    fingerprint: str
    token_bytes: tuple[bytes | None, ...] = field(repr=False)
    roles: Mapping[str, int]
    expects_bos: bool
    _tokenizer: Tokenizer = field(repr=False)
    _continuing: Tokenizer = field(repr=False)  # the same without a leading space

    @classmethod
    def load(cls, folder: Path) -> "Vocabulary":
        """Load the tokenizer of a model directory as transformers does: see folder.py. Raises TokenizerError."""
        return cls.of_folder(tokenizer_files(folder), name=folder.name)

    @classmethod
    def of_folder(cls, files: Mapping[str, bytes], *, name: str) -> "Vocabulary":
        """Build from the files that `folder.tokenizer_files` returns. Raises TokenizerError."""
        return cls.parse(files["tokenizer.json"], files["tokenizer_config.json"], name=name)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], *, name: str) -> "Vocabulary":
        """Build from tokenizer files that were received from a server.

        The files are first loaded in a subprocess with limits of memory and time.

        files  contents by file name; tokenizer.json is required, tokenizer_config.json optional
        name   name of the model in error messages
        Raises TokenizerError if the files exceed a limit or cannot be loaded.
        """
        return cls.parse(files["tokenizer.json"], files.get("tokenizer_config.json", b"{}"), name=name, trial=True)

    @classmethod
    def parse(
        cls, tokenizer_json: bytes, config_json: bytes = b"{}", *, name: str, trial: bool = False
    ) -> "Vocabulary":
        """Build from the contents of the two files. With `trial`, a subprocess with limits loads them first.

        Raises TokenizerError if the files exceed a limit or no registered kind can read them.
        """
        spec = parse_object(tokenizer_json, "tokenizer.json", name)
        config = parse_object(config_json, "tokenizer_config.json", name)
        check_limits(spec, name)
        if trial:
            try_tokenizer(tokenizer_json, name)
        with tokenizer_errors(name):
            return cls._build(spec, config, tokenizer_json, name)

    @classmethod
    def _build(cls, spec: Spec, config: Spec, tokenizer_json: bytes, name: str) -> "Vocabulary":
        tokenizer = _load_tokenizer(tokenizer_json.decode())
        kind = tokenizer_kind(spec, name)
        continuation = kind.as_continuation(spec)
        unchanged = continuation == spec
        roles = roles_of(spec, config)
        return cls(
            name=name,
            kind=kind,
            fingerprint=hashlib.sha256(tokenizer_json).hexdigest(),
            token_bytes=token_bytes_of(spec, kind),
            roles=roles,
            expects_bos=expects_bos(spec, config, roles),
            _tokenizer=tokenizer,
            _continuing=tokenizer if unchanged else _load_tokenizer(json.dumps(continuation)),
        )

    def __len__(self) -> int:
        return len(self.token_bytes)

    def with_roles(self, token_by_role: Mapping[str, str]) -> "Vocabulary":
        """Return the vocabulary with some roles set to other tokens.

        Raises TokenizerError if a role does not exist or the tokenizer lacks the token.
        """
        roles = dict(self.roles)
        for role, token in token_by_role.items():
            token_id = self._tokenizer.token_to_id(token)
            if role not in ROLES:
                raise TokenizerError(f"{self.name}: unknown role {role!r}; the roles are {', '.join(ROLES)}")
            if token_id is None:
                raise TokenizerError(
                    f"{self.name}: role {role} is set to {token!r}, which is none of the tokenizer's tokens"
                )
            if token_id >= len(self):
                raise TokenizerError(
                    f"{self.name}: role {role} is set to {token!r} (id {token_id}), but the model has only the ids up "
                    f"to {len(self) - 1}"
                )
            roles[role] = token_id
        return replace(self, roles=roles)

    def within(self, num_ids: int) -> "Vocabulary":
        """Return the vocabulary for a model with `num_ids` ids, without the added tokens and the roles beyond them.

        Gemma 3 has a special token for images that its text models lack; transformers adds a pad token that only
        tokenizer_config.json names. Such a token is an error only if a text contains it. Raises TokenizerError if an
        ordinary token or an expected BOS is beyond the ids.
        """
        if num_ids >= len(self):
            return self
        added = self._tokenizer.get_added_tokens_decoder()
        expected = {self.roles["bos"]} if self.expects_bos else set()
        for i in range(num_ids, len(self)):
            if i in expected or (self.token_bytes[i] is not None and i not in added):
                raise TokenizerError(
                    f"the tokenizer of {self.name} has token {i} ({self._tokenizer.id_to_token(i)!r}), but its "
                    f"model has only the ids up to {num_ids - 1}"
                )
        roles = {role: i for role, i in self.roles.items() if i < num_ids}
        return replace(self, token_bytes=self.token_bytes[:num_ids], roles=roles)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """[V] string of each id in the tokenizer; empty for unassigned ids."""
        return tuple(self._tokenizer.id_to_token(i) or "" for i in range(len(self)))

    @cached_property
    def trie(self) -> Trie:
        """Prefix tree of all tokens that have bytes, for the longest token at the start of a byte string."""
        return build_trie(self.token_bytes)

    @property
    def space_mark(self) -> str:
        """The string that stands for a leading space in a token: "Ġ" or "▁"."""
        return self.kind.space_mark

    @property
    def prefix(self) -> list[int]:
        """Token ids in front of every text: BOS if the model expects it; empty otherwise."""
        return [self.roles["bos"]] if self.expects_bos else []

    def encode(self, text: str, *, close: bool = False) -> Tokens:
        """Tokenize a whole text, without BOS, and locate the tokens in it.

        The texts of special tokens are encoded as ordinary text. With `close`, EOS follows the text as a separate token
        without bytes; its end is one byte after the text, for teacher and student alike.
        """
        with self._errors():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = self._located(text, encoding)
        if close and "eos" not in self.roles:
            raise TokenizerError(
                f"{self.name} has no EOS token within the {len(self)} ids of the model, which is needed at the end of "
                "a text"
            )
        return tokens.with_end_token(self.roles["eos"]) if close else tokens

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenize each text like `encode`, on all cores."""
        with self._errors():
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [self._located(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text, on all cores and without their positions.

        Raises TokenizerError if a text has a token beyond the ids of the model.
        """
        with self._errors():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            if self._has_tokens_beyond:
                for encoding in encodings:
                    self._check_ids(encoding.ids)
            return [len(encoding) for encoding in encodings]

    def encode_rendered(self, text: str, literals: Sequence[tuple[int, int]] = ()) -> Tokens:
        """Tokenize a rendered chat, without adding BOS. Texts of special tokens are encoded as special tokens.

        literals  bytes [start, stop) of texts of special tokens that are encoded as ordinary text instead
        Raises TokenizerError if the tokens do not cover the text, if a token is beyond the ids of the model, or if the
        tokenizer has no ordinary tokens for a literal.
        """
        with self._errors():
            return self._rendered_encoder.encode(text, literals)

    def write(self, pieces: Sequence[bytes]) -> list[list[int]]:
        """Tokenize each byte string as a continuation: no BOS, no space in front.

        The tokens have the bytes of the string, or of the string after the normalizer. Strings that are not valid
        UTF-8, or that the tokenizer does not reproduce, are written with the longest token at each position. The list
        of tokens is empty if a string cannot be written.
        """
        with self._errors():
            return self._continuation_writer.write(pieces)

    def _errors(self) -> AbstractContextManager[None]:
        return tokenizer_errors(self.name, "cannot write a text")

    @cached_property
    def _has_tokens_beyond(self) -> bool:
        return max(self._tokenizer.get_vocab().values(), default=-1) >= len(self)

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        """Raise TokenizerError if a token is beyond the ids of the model."""
        if self._has_tokens_beyond and token_ids and (largest := max(token_ids)) >= len(self):
            raise TokenizerError(
                f"{self.name}: a text contains {self._tokenizer.id_to_token(largest)!r} (id {largest}), but the model "
                f"has only the ids up to {len(self) - 1}: remove it from the text"
            )

    def _located(self, text: str, encoding: Encoding) -> Tokens:
        token_ids = encoding.ids  # each access creates a new list
        self._check_ids(token_ids)
        pieces = [self.token_bytes[i] or b"" for i in token_ids]
        unwritable = self._continuation_writer.unwritable
        return locate_tokens(text, np.array(token_ids, dtype=np.int64), pieces, encoding.offsets, unwritable)

    @cached_property
    def _continuation_writer(self) -> ContinuationWriter:
        return ContinuationWriter(self._tokenizer, self._continuing, self.token_bytes)

    @cached_property
    def _rendered_encoder(self) -> RenderedEncoder:
        tokenizer = copy.deepcopy(self._tokenizer)
        tokenizer.encode_special_tokens = False  # recognize special tokens in a text
        return RenderedEncoder(
            name=self.name,
            tokenizer=tokenizer,
            tokens=self.tokens,
            token_bytes=self.token_bytes,
            unknown_id=self.roles.get("unk"),
            unwritable=self._continuation_writer.unwritable,
            plain=self._tokenizer,
            continuing=self._continuing,
        )


def _load_tokenizer(tokenizer_json: str) -> Tokenizer:
    """Load tokenizer.json without recognition of special tokens: the text "<eos>" is five ordinary characters."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    tokenizer.encode(PROBE, add_special_tokens=False)  # a regular expression or a charsmap fails only with a text
    return tokenizer
