"""The card of an OpenAI-compatible endpoint, and what its response to the probe text shows.

This module sends no requests; openai_echo.py does.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import msgspec

from teachers.client.dialects.echo_completions import EchoFormat, EchoReader, Logprobs
from teachers.client.dialects.probed_card import PROBE_TEXT, ProbedCard
from teachers.client.dialects.token_strings import Token, TokenStrings
from teachers.client.dialects.tokenizer_folder import TokenizerFolder
from teachers.protocol.errors import TeacherError
from teachers.protocol.untrusted_text import clean

CONTEXT_ERROR = re.compile(r"context (?:length|window|size)\D{0,20}(\d{1,9})")


class Model(msgspec.Struct):
    """Entry of /v1/models."""

    id: str
    max_model_len: int | None = None
    context_length: int | None = None


class ModelList(msgspec.Struct):
    """Response of /v1/models."""

    data: list[Model]


class EchoCard(ProbedCard):
    """The card of an OpenAI-compatible endpoint."""

    @property
    def masks_positions(self) -> bool:
        return True


def draft_card(model: str, reader: EchoReader, folder: TokenizerFolder, limits: tuple[int, int]) -> EchoCard:
    """Build the card without the scores of the probe text. `limits` are the longest sequence and the largest K."""
    bos, form = folder.bos_id, reader.format
    return EchoCard(
        model=clean(model, 300),
        fingerprint=fingerprint(model, reader, limits[1], folder),
        engine="OpenAI-compatible endpoint",
        dtype="unknown",
        vocab_size=folder.config.get("vocab_size") or max(reader.strings.tokens) + 1,
        tokenizer_sha256=folder.sha256("tokenizer.json") or "",
        bos_id=bos,
        eos_id=folder.special_id("eos"),
        expects_bos=form.adds_bos or (form.takes_ids and bool(folder.declared_bos(bos))),
        chat_template_sha256=folder.sha256("chat_template.jinja"),
        max_tokens=limits[0],
        max_top_k=limits[1],
        root=None,
        probe_ids=tuple(folder.encode(PROBE_TEXT)),
    )


def fingerprint(model: str, reader: EchoReader, max_top_k: int, folder: TokenizerFolder) -> str:
    """Return a hash of all properties that are known without the weights."""
    properties: list[Any] = [model, max_top_k, *astuple(reader.format), folder.sha256("tokenizer.json")]
    return hashlib.sha256(json.dumps(properties).encode()).hexdigest()


def context_in(message: str) -> int | None:
    """Return the length of the context that an error about a long prompt states, None if it states none."""
    found = CONTEXT_ERROR.search(message)
    return int(found[1]) if found else None


def text_of(ids: list[int], strings: TokenStrings, folder: TokenizerFolder) -> str | None:
    """Return a text that the tokenizer splits into these ids; None if there is none."""
    tokens = [strings.tokens[i] for i in ids if i in strings.tokens]
    data = b"".join(token.piece.encode() if token.data is None else token.data for token in tokens)
    text = data.decode(errors="replace")
    return next((each for each in (text, text.removeprefix(" ")) if folder.encode(each) == ids), None)


ProbeText = tuple[list[int], int | None, Mapping[int, Token]]


def find_reader(lists: Logprobs, num_prompt_tokens: int | None, takes_ids: bool, text: ProbeText) -> EchoReader:
    """Build the reader of a server from its response to PROBE_TEXT. Raises TeacherError.

    text  ids of PROBE_TEXT, id of BOS, and all tokens of the tokenizer
    """
    ids, bos, tokens = text
    if num_prompt_tokens is None or num_prompt_tokens - len(ids) not in (0, 1):
        raise TeacherError(
            f"expected usage.prompt_tokens of {len(ids)} for the probe text, or one more for BOS, received "
            f"{num_prompt_tokens}: the server's tokenizer differs from tokenizer.json, or it does not count tokens"
        )
    adds_bos = num_prompt_tokens > len(ids)
    if adds_bos and bos is None:
        raise TeacherError("the server puts a token in front of the prompt, but the tokenizer has no BOS")
    first = int(adds_bos and lists.tokens[:1] == [tokens[bos].piece]) if bos is not None else 0  # BOS is listed
    strings = TokenStrings.observed(tokens, ids, lists.tokens[first : first + len(ids)])
    is_shifted = _num_predicted(lists, 1) > _num_predicted(lists, 0)
    return EchoReader(EchoFormat(takes_ids, adds_bos, is_shifted), strings, bos)


def _num_predicted(lists: Logprobs, shift: int) -> int:
    """Return how many tokens are among the candidates of the entry `shift` tokens earlier, the added one excluded."""
    tokens, entries = lists.tokens, lists.top_logprobs or []
    top_k = min((len(entry) for entry in entries if entry), default=0)
    pairs = zip(tokens[shift:], entries, strict=False)
    return sum(token in list(entry)[:top_k] for token, entry in pairs if entry)
