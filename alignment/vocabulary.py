"""A tokenizer seen as bytes: what each token id writes, and how bytes are written in tokens.

`Vocabulary` reads the two files that every fast tokenizer has (tokenizer.json, tokenizer_config.json) and
knows three things: the bytes of every id (spelling.py), the ids of the special tokens by role, and how to tokenize
a text from its beginning or as a continuation.
"""

import copy
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from alignment.spans import Tokens, joined, place
from alignment.spelling import SPACE_MARK, Kind, TokenizerError, nodes, read_spelling
from alignment.trie import Trie, build_trie

ROLES = ("bos", "eos", "end_of_turn", "pad", "unk")
BYTE_SPACE = "Ġ"
# no config names the token that ends a turn; these are what the known families call it, and a run file may say more
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eot|>", "<|return|>")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """One model's tokenizer.

    token_bytes  [V] what each id writes; None for special tokens and unassigned ids, which have no text
    kind         how its tokens are spelled
    roles        special token ids by role: bos, eos, end_of_turn, pad, unk, as far as the tokenizer has them
    expects_bos  whether the model was trained with its BOS in front of every text
    fingerprint  sha256 of tokenizer.json; equal fingerprints mean equal ids
    """

    name: str
    kind: Kind
    fingerprint: str
    token_bytes: tuple[bytes | None, ...] = field(repr=False)
    roles: Mapping[str, int]
    expects_bos: bool
    _reader: Tokenizer = field(repr=False)
    _continuer: Tokenizer = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> "Vocabulary":
        """Read a Hugging Face model directory. Raises TokenizerError if it has no fast tokenizer."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder} has no tokenizer.json: give a directory with a fast tokenizer")
        config = folder / "tokenizer_config.json"
        return cls.parse(path.read_bytes(), config.read_bytes() if config.is_file() else b"{}", name=folder.name)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], *, name: str) -> "Vocabulary":
        """Build from a teacher's tokenizer files by name."""
        return cls.parse(files["tokenizer.json"], files.get("tokenizer_config.json", b"{}"), name=name)

    @classmethod
    def parse(cls, tokenizer_json: bytes, config_json: bytes = b"{}", *, name: str) -> "Vocabulary":
        """Build from the two files' contents. Raises TokenizerError if they cannot be read as bytes."""
        try:
            spec: dict[str, Any] = json.loads(tokenizer_json)
            config: dict[str, Any] = json.loads(config_json)
            reader = _tokenizer(tokenizer_json.decode())
            bare = _without_prefix(spec)
            continuer = reader if bare == spec else _tokenizer(json.dumps(bare))
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(f"the tokenizer of {name} cannot be read: {error}") from error
        spelling = read_spelling(spec, name)
        roles = _roles(spec, config)
        return cls(
            name=name,
            kind=spelling.kind,
            fingerprint=hashlib.sha256(tokenizer_json).hexdigest(),
            token_bytes=spelling.token_bytes,
            roles=roles,
            expects_bos=_expects_bos(spec, config, roles),
            _reader=reader,
            _continuer=continuer,
        )

    def __len__(self) -> int:
        return len(self.token_bytes)

    def with_roles(self, spelled: Mapping[str, str]) -> "Vocabulary":
        """The same, with roles given by how their tokens are spelled. Raises TokenizerError for a token it lacks."""
        roles = dict(self.roles)
        for role, token in spelled.items():
            found = self._reader.token_to_id(token)
            if role not in ROLES:
                raise TokenizerError(f"{self.name}: there is no role {role!r}; the roles are {', '.join(ROLES)}")
            if found is None:
                raise TokenizerError(f"{self.name}: role {role} is to be {token!r}, which is none of its tokens")
            roles[role] = found
        return replace(self, roles=roles)

    def within(self, num_ids: int) -> "Vocabulary":
        """The same for a model of so many ids: it cannot take the special tokens beyond, which are left out.

        Gemma 3 has one for images that its text models lack. Raises TokenizerError if a text could need one of them.
        """
        needed = set(self.roles.values())
        for i in range(num_ids, len(self)):
            if self.token_bytes[i] is not None or i in needed:
                raise TokenizerError(
                    f"the tokenizer of {self.name} has token {i} ({self._reader.id_to_token(i)!r}), its model only ids "
                    f"up to {num_ids - 1}"
                )
        return replace(self, token_bytes=self.token_bytes[:num_ids]) if num_ids < len(self) else self

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """[V] each id as the tokenizer spells it; empty for unassigned ids."""
        return tuple(self._reader.id_to_token(i) or "" for i in range(len(self)))

    @cached_property
    def trie(self) -> Trie:
        """All tokens that write bytes, for finding the longest one that a string begins with."""
        return build_trie(self.token_bytes)

    @property
    def space_mark(self) -> str:
        """How a leading space is spelled: 'Ġ' or '▁'."""
        return BYTE_SPACE if self.kind is Kind.BYTE_LEVEL else SPACE_MARK

    @property
    def prefix(self) -> list[int]:
        """The ids that stand in front of every text: BOS where the model expects it, else nothing."""
        return [self.roles["bos"]] if self.expects_bos else []

    def encode(self, text: str, *, close: bool = False) -> Tokens:
        """Tokenize a text from its beginning, with byte ends and without BOS.

        Text that looks like a special token is ordinary text. With `close`, EOS follows the text as a token
        of its own; it has no bytes and is given one byte of room after the text, on every side alike.
        """
        tokens = self._placed(text, self._reader.encode(text, add_special_tokens=False))
        if close and "eos" not in self.roles:
            raise TokenizerError(f"{self.name} has no EOS token to close a text with")
        return tokens.closed(self.roles["eos"]) if close else tokens

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """What `encode` makes of each text, on all cores."""
        encodings = self._reader.encode_batch(list(texts), add_special_tokens=False)
        return [self._placed(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens `encode` makes of each text, on all cores and without placing them."""
        return [len(e) for e in self._reader.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _placed(self, text: str, encoding: Encoding) -> Tokens:
        token_ids = encoding.ids  # each access makes a list
        pieces = [self.token_bytes[i] or b"" for i in token_ids]
        return place(text, np.array(token_ids, dtype=np.int64), pieces, encoding.offsets, self._unwritable)

    def encode_rendered(self, text: str) -> Tokens:
        """Tokenize a rendered chat: the spelling of a special token is that token here. No BOS is added.

        Special tokens end at the last byte of their spelling (and of the white space that some of them swallow);
        what stands between two of them is placed as `encode` places a text. Raises TokenizerError where tokens and
        text contradict each other: a shifted end would supervise other bytes.
        """
        encoding = self._parser.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if ids and max(ids) >= len(self):
            spelling = self._reader.id_to_token(max(ids))
            raise TokenizerError(f"{self.name}: a rendered chat has {spelling!r}, which its model does not know")
        parts: list[Tokens] = []
        char = byte = first = 0  # where the stretch of ordinary tokens begins: in characters, bytes and tokens
        special = [i for i, token in enumerate(ids) if self._is_spelled(token, text[slice(*offsets[i])])]
        for i in [*special, len(ids)]:
            start, stop = offsets[i] if i < len(ids) else (len(text), len(text))
            inside = [(begin - char, end - char) for begin, end in offsets[first:i]]
            parts.append(self._place_stretch(text[char:start], ids[first:i], inside).part(slice(None), -byte, 0))
            byte += len(text[char:start].encode())
            if i < len(ids):
                seen, spelling = text[start:stop], self.tokens[ids[i]]
                if start < char or seen.strip() != spelling.strip():
                    raise TokenizerError(f"{self.name}: expected {spelling!r} at character {start}, received {seen!r}")
                parts.append(Tokens(b"", np.array(ids[i : i + 1]), np.array([byte + len(seen.encode())])))
                byte += len(seen.encode())
            char, first = stop, i + 1
        return joined(text.encode(), parts)

    def _is_spelled(self, token: int, seen: str) -> bool:
        """Whether a special token is one that the text spells; the unknown token stands for any text."""
        return self.token_bytes[token] is None and (token != self.roles.get("unk") or seen == self.tokens[token])

    def _place_stretch(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
        """The ordinary tokens of one stretch of a rendered chat."""
        sound = all(0 <= begin <= end <= len(text) for begin, end in offsets)
        if sound:
            pieces = [self.token_bytes[i] or b"" for i in ids]
            tokens = place(text, np.array(ids, dtype=np.int64), pieces, offsets, self._unwritable)
            if ids and _is_one_character(text[offsets[-1][1] - 1 :]):  # composed, it stands where its first part was
                tokens = replace(tokens, ends=np.append(tokens.ends[:-1], len(text.encode())))
            known = tokens.ends[tokens.ends >= 0]
            whole = not text or (len(ids) > 0 and tokens.ends[-1] == len(text.encode()))
            sound = bool(whole) and not (np.diff(known) < 0).any()
        if not sound:
            raise TokenizerError(
                f"{self.name}: its tokens do not cover a stretch of a rendered chat: expected {text[:60]!r}, "
                f"received {[self.tokens[i] for i in ids[:12]]}"
            )
        return tokens

    @cached_property
    def _parser(self) -> Tokenizer:
        """The tokenizer as the model's server has it, which reads special tokens in a text."""
        parser = copy.deepcopy(self._reader)
        parser.encode_special_tokens = False
        return parser

    def write(self, pieces: Sequence[bytes]) -> list[list[int]]:
        """Tokenize each byte string as a continuation: no BOS, no space of its own in front.

        What a normalizer makes of a string counts as the string. Bytes that are not valid UTF-8, or that the
        tokenizer would not give back, are covered greedily with the longest tokens; a string that no tokens can
        write gives an empty list.
        """
        texts = [_utf8(piece) for piece in pieces]
        encodings = iter(
            self._continuer.encode_batch_fast([t for t in texts if t is not None], add_special_tokens=False)
        )
        return [
            self._cover(piece) if text is None else self._faithful(text, piece, next(encodings).ids)
            for piece, text in zip(pieces, texts, strict=True)
        ]

    def _faithful(self, text: str, piece: bytes, ids: list[int]) -> list[int]:
        if self._spell(ids) == piece:
            return ids
        plain = self._plain(text)
        for tried in (ids, self._reader.encode(text, add_special_tokens=False).ids):
            if tried and self._spell(tried) in (piece, plain):
                return tried
        return self._cover(piece) or self._cover(plain)

    def _spell(self, ids: list[int]) -> bytes:
        return b"".join(self.token_bytes[i] or b"" for i in ids)

    def _plain(self, text: str) -> bytes:
        """What a normalizer leaves of a text; where no token writes a space alone, a run of blanks is one space."""
        if self._continuer.normalizer is not None:
            text = self._continuer.normalizer.normalize_str(text).replace(SPACE_MARK, " ")
        if ord(" ") in self._unwritable:
            text = re.sub(r"\s+", " ", text.rstrip())
        return text.encode()

    def _cover(self, piece: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(piece):
            for end in range(min(len(piece), start + self._longest), start, -1):
                token = self._by_bytes.get(piece[start:end])
                if token is not None:
                    ids.append(token)
                    start = end
                    break
            else:
                return []
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        """Lowest id of each byte string."""
        return {data: i for i, data in reversed(list(enumerate(self.token_bytes))) if data}

    @cached_property
    def _unwritable(self) -> frozenset[int]:
        """Bytes that no token writes alone."""
        return frozenset(byte for byte in range(256) if bytes([byte]) not in self._by_bytes)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._by_bytes), default=0)


def _is_one_character(text: str) -> bool:
    """Whether it is a letter with marks of its own that a normalizer composes: e and U+0301."""
    return 1 < len(text) < 8 and len(unicodedata.normalize("NFC", text)) == 1


def _utf8(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _tokenizer(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<eos>" in a text is five characters, never the end of it
    return tokenizer


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, putting no space in front: branches continue a text, they do not begin one."""
    spec = copy.deepcopy(spec | {"model": None}) | {"model": spec["model"]}
    for node in nodes([spec.get("normalizer"), spec.get("pre_tokenizer")]):
        if node.get("type") == "Prepend":
            node["prepend"] = ""
        if node.get("type") == "ByteLevel":
            node["add_prefix_space"] = False
        if node.get("type") == "Metaspace":
            node["prepend_scheme"] = "never"
    return spec


def _roles(spec: dict[str, Any], config: dict[str, Any]) -> dict[str, int]:
    ids = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    roles = {}
    for role in ROLES:
        token = config.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in ids:
            roles[role] = ids[content]
    turn_ends = [ids[content] for content in END_OF_TURN if content in ids]
    return {"end_of_turn": turn_ends[0], **roles} if turn_ends else roles


def _added_by(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The special tokens that a TemplateProcessing puts around a text."""
    return list(node.get("special_tokens", {}).values()) if node.get("type") == "TemplateProcessing" else []


def _expects_bos(spec: dict[str, Any], config: dict[str, Any], roles: dict[str, int]) -> bool:
    """The config's word first; then the template of the tokenizer; then the family that is known to need it."""
    if "bos" not in roles:
        return False
    if isinstance(config.get("add_bos_token"), bool):
        return bool(config["add_bos_token"])
    added = [token.get("ids", []) for node in nodes(spec.get("post_processor")) for token in _added_by(node)]
    if any(roles["bos"] in ids for ids in added):
        return True
    return str(config.get("tokenizer_class", "")).startswith("Gemma")
