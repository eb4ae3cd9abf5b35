"""The interface of a tokenizer kind, and the bytes of every token of a vocabulary.

A kind describes how a family of tokenizers writes text as tokens. Each kind is one file that implements `TokenizerKind`
and one line of the registry `alignment.tokenizers.TOKENIZER_KINDS`.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

Spec = Mapping[str, Any]  # a parsed tokenizer.json, or one part of it

MAX_REASON_CHARS = 300
MAX_MESSAGE_CHARS = 1000


class TokenizerError(ValueError):
    """Raised if a tokenizer cannot be read or converted to bytes. The message names the file and the reason.

    The message can quote text from the file, so it is reduced to one line of printable characters of limited length.
    """

    def __init__(self, message: str) -> None:
        line = " ".join("".join(c if c.isprintable() else " " for c in message[:MAX_MESSAGE_CHARS]).split())
        super().__init__(line if len(message) <= MAX_MESSAGE_CHARS else f"{line}…")


@contextmanager
def tokenizer_errors(name: str, failed: str = "cannot be read") -> Iterator[None]:
    """Convert every error raised in the block into a TokenizerError.

    The files can contain arbitrary JSON. The library `tokenizers` raises plain Exception, and Rust panics, which do not
    derive from Exception.
    """
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = str(error)[:MAX_REASON_CHARS]
        kind = "" if type(error) in (Exception, ValueError) and reason else f"{type(error).__name__}: "
        raise TokenizerError(f"the tokenizer of {name} {failed}: {kind}{reason}") from error


class TokenizerKind(Protocol):
    """How a family of tokenizers writes bytes as token strings.

    name        key of the registry, used in messages and in the documentation
    space_mark  the string that stands for a leading space in a token
    """

    @property
    def name(self) -> str: ...

    @property
    def space_mark(self) -> str: ...

    def matches(self, spec: Spec) -> bool:
        """Return whether a parsed tokenizer.json is of this kind. Kinds are tested in the order of the registry."""
        ...

    def token_bytes(self, token: str, model: Spec) -> bytes:
        """Return the bytes that a token of the model's vocabulary writes; `model` is the part "model" of the file."""
        ...

    def added_token_bytes(self, content: str, model: Spec) -> bytes:
        """Return the bytes that an added token writes. It is not called for special tokens."""
        ...

    def as_continuation(self, spec: Spec) -> Spec:
        """Return the tokenizer.json changed such that the tokenizer adds no space in front of a text.

        The changed tokenizer writes text that continues other text, such as a branch. The input is not changed.
        """
        ...


def components(part: Any) -> Iterator[dict[str, Any]]:
    """Yield every component in a part of tokenizer.json, including those inside of sequences."""
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from components(value)
    elif isinstance(part, list):
        for value in part:
            yield from components(value)


def text_components(spec: Spec) -> list[dict[str, Any]]:
    """Return the components of the decoder, the pre-tokenizer and the normalizer."""
    return list(components([spec.get("decoder"), spec.get("pre_tokenizer"), spec.get("normalizer")]))


def with_component_fields(spec: Spec, changes: Mapping[str, Mapping[str, Any]]) -> Spec:
    """Return a copy with fields of normalizers and pre-tokenizers replaced: `changes` is {type: {field: value}}."""
    copied = {part: copy.deepcopy(spec[part]) for part in ("normalizer", "pre_tokenizer") if part in spec}
    for component in components(list(copied.values())):
        component.update(changes.get(component.get("type", ""), {}))
    return {**spec, **copied}


def token_bytes_of(spec: Spec, kind: TokenizerKind) -> tuple[bytes | None, ...]:
    """[V] Return the bytes of every id; None for special, unknown and unassigned ids, which have no text."""
    model = spec["model"]
    ids = _ids_by_token(model)
    added = {token["id"]: token for token in spec.get("added_tokens", [])}
    unknown = {model.get("unk_token"), model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None}
    table: list[bytes | None] = [None] * (max([*ids.values(), *added], default=-1) + 1)
    for token, i in ids.items():
        table[i] = None if token in unknown else kind.token_bytes(token, model)
    for i, token in added.items():
        table[i] = None if token["special"] else kind.added_token_bytes(token["content"], model)
    return tuple(table)


def _ids_by_token(model: Spec) -> dict[str, int]:
    """Return the vocabulary as {token: id}; Unigram models store it as a list of (token, score)."""
    vocab = model["vocab"]
    return {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
