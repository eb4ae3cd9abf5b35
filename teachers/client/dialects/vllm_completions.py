"""Score requests to `/v1/completions` of a plain vLLM server, and their responses as Rows.

Format of vLLM 0.32: a response has one entry of `prompt_logprobs` per token of the prompt. The first entry is null.
Each other entry has the K most probable tokens, with ranks 1 … K, and the actual token if it is not among them, so K or
K + 1 tokens, keyed by id. −∞ is sent as −9999.0: see probability_zero.py. The parser skips decoded tokens and generated
text.

A response has no digest of its request. The parser compares the fields that repeat the request: model name, prompt ids,
number of positions, and the actual token of every position. It cannot detect a response to the same prompt that was
computed with other weights under the same model name.
"""

from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from teachers.client.dialects.probability_zero import finite_logprobs, infinity_as_null, zeros_last
from teachers.client.dialects.top_k_rows import RowPosition, tail_of
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import ProtocolError, RequestMismatch
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows, check_rows
from teachers.protocol.untrusted_text import clean

REMEDY = "start the server with --logprobs-mode raw_logprobs"
MAX_ENTRY_BYTES = 512  # of one candidate with its text; 72 for SmolLM2

Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Entry(msgspec.Struct, gc=False):
    """Log-probability and rank of one candidate. A logprob of null is −∞."""

    logprob: float | None
    rank: Id


class Choice(msgspec.Struct):
    """The completion of one prompt."""

    index: int
    prompt_token_ids: list[Id] | None = None
    prompt_logprobs: list[dict[Id, Entry] | None] | None = None


class Completion(msgspec.Struct):
    """The response."""

    model: str
    choices: list[Choice]


_DECODER = msgspec.json.Decoder(Completion)
_LOGPROB, _RANK = attrgetter("logprob"), attrgetter("rank")


def completion_request(model: str, request: ScoreRequest, **extra_fields: Any) -> bytes:
    """Return the body of a request for all sequences. It generates one token, the least number that vLLM accepts."""
    body = {
        "model": model,
        "prompt": request.sequences,
        "prompt_logprobs": request.top_k,
        "max_tokens": 1,
        "temperature": 0.0,
        "add_special_tokens": False,
        "return_token_ids": True,
    }
    return msgspec.json.encode(body | extra_fields)


def response_limit_bytes(request: ScoreRequest) -> int:
    """Return the largest size of a response that is accepted."""
    return (sum(map(len, request.sequences)) * (request.top_k + 1) + 128) * MAX_ENTRY_BYTES


def read_completion(data: bytes, request: ScoreRequest, card: TeacherCard) -> list[Rows]:
    """Convert a response into one Rows per sequence, in the order of the request.

    Raises RequestMismatch if model or tokens are not those of the request, InvalidRows for values that no model
    returns, and ProtocolError for a malformed response.
    """
    with decoding("completion"):
        completion = _DECODER.decode(infinity_as_null(data))
    if completion.model != card.model:
        raise RequestMismatch(f"expected a completion of {card.model}, received one of {clean(completion.model, 100)}")
    choices = completion.choices
    by_index = {choice.index: choice for choice in choices}
    if len(choices) != len(request.sequences) or set(by_index) != set(range(len(choices))):
        received = clean(sorted(choice.index for choice in choices), 100)
        raise ProtocolError(f"expected completions 0 … {len(request.sequences) - 1}, received {received}")
    return [_rows(by_index[i], request, card) for i in range(len(choices))]


def _rows(choice: Choice, request: ScoreRequest, card: TeacherCard) -> Rows:
    sequence, start, top_k = request.sequences[choice.index], request.starts[choice.index], request.top_k
    _check_prompt(choice, sequence)
    positions = choice.prompt_logprobs
    if positions is None or len(positions) != len(sequence):
        received = "none" if positions is None else str(len(positions))
        raise ProtocolError(
            f"sequence {choice.index}: expected prompt_logprobs of {len(sequence)} tokens, received {received}"
        )
    first = RowPosition(choice.index, start)
    ids, entries, actual = _flatten(positions[start:], sequence[start:], top_k, first)
    shape = (len(actual), top_k)
    columns = _columns(entries, shape, first)
    values = finite_logprobs(list(map(_LOGPROB, entries))).reshape(shape)
    logprobs, sorted_ids = np.empty(shape), np.empty(shape, dtype=np.uint32)
    np.put_along_axis(logprobs, columns, values, 1)
    np.put_along_axis(sorted_ids, columns, np.array(ids, dtype=np.uint32).reshape(shape), 1)
    logprobs, sorted_ids = zeros_last(logprobs, sorted_ids)
    tail = tail_of(logprobs, card.vocab_size, first, REMEDY)
    with np.errstate(over="ignore"):  # check_rows rejects a value that overflows to infinity
        actual_logprobs = finite_logprobs(actual).astype(np.float32)
    rows = Rows(start, sorted_ids, logprobs.astype(np.float32), actual_logprobs, tail)
    return check_rows(rows, request, choice.index, card)


def _check_prompt(choice: Choice, sequence: list[int]) -> None:
    """Raise RequestMismatch if the prompt ids in a completion differ from those of the request."""
    received = choice.prompt_token_ids
    if received is None:
        raise ProtocolError(
            f"sequence {choice.index}: expected prompt_token_ids, received none: vLLM 0.32 returns them"
        )
    if received != sequence:
        pairs = enumerate(zip(sequence, received, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(sequence), len(received)))
        raise RequestMismatch(
            f"sequence {choice.index}: expected a completion of its {len(sequence)} ids, received one of "
            f"{len(received)} other ids, different from position {first} on"
        )


def _flatten(
    positions: list[dict[int, Entry] | None], tokens: list[int], top_k: int, first: RowPosition
) -> tuple[list[int], list[Entry], list[float | None]]:
    """Return ids and entries of all candidates, row by row, and the log-probabilities of the actual tokens."""
    ids: list[int] = []
    entries: list[Entry] = []
    actual: list[float | None] = []
    for row, (position, token) in enumerate(zip(positions, tokens, strict=True)):
        if position is None:
            raise first.error(row, "no log-probabilities")
        own = position.get(token)
        if own is None:
            raise first.error(row, f"no log-probability of the actual token {token}")
        if len(position) == top_k + 1:  # the actual token is not among the top K
            del position[token]
        elif len(position) != top_k:
            raise first.error(row, f"expected {top_k} candidates and the actual token, received {len(position)}")
        ids.extend(position)
        entries.extend(position.values())
        actual.append(own.logprob)
    return ids, entries, actual


def _columns(entries: list[Entry], shape: tuple[int, int], first: RowPosition) -> NDArray[np.int64]:
    """Return the column of each candidate in its row [S, K]: its rank − 1. Raises InvalidRows for a duplicate rank."""
    columns = np.fromiter(map(_RANK, entries), np.int64, len(entries)).reshape(shape) - 1
    in_range = (columns >= 0) & (columns < shape[1])
    used = np.zeros(shape, dtype=np.bool_)
    np.put_along_axis(used, np.where(in_range, columns, 0), True, axis=1)
    wrong = ~(used & in_range).all(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        missing = np.setdiff1d(np.arange(shape[1]), columns[row])[0] + 1
        raise first.error(row, f"expected each rank from 1 to {shape[1]} once, and {missing} is missing")
    return columns
