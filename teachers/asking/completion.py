"""The stock dialect's one question and its answer: `/v1/completions` of a plain vLLM server, as the rows of rows.py.

Read in vLLM 0.32: an answer has one entry of `prompt_logprobs` per token of the prompt. The first is null; each other
holds the K likeliest tokens, with ranks 1 … K, and the actual token where it is not among them, so K or K + 1 entries,
keyed by token id. −inf is sent as −9999.0. The decoded tokens and the generated text are skipped by the parser.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from teachers.errors import InvalidRows, ProtocolError
from teachers.kernels import MASS_TOLERANCE
from teachers.protocol import Card, ScoreRequest
from teachers.rows import Rows, check_rows

MINUS_INFINITY = -9999.0  # as vLLM writes it; nothing that a model says is that small
ENTRY_BYTES = 512  # at most, of one candidate with its text; 72 at SmolLM2

Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Entry(msgspec.Struct, gc=False):
    """One candidate; without its text."""

    logprob: float
    rank: Id


class Choice(msgspec.Struct):
    """The answer to one prompt."""

    index: int
    prompt_logprobs: list[dict[Id, Entry] | None] | None = None


class Completion(msgspec.Struct):
    """The answer."""

    choices: list[Choice]


_DECODER = msgspec.json.Decoder(Completion)
_LOGPROB, _RANK = attrgetter("logprob"), attrgetter("rank")


def question(model: str, request: ScoreRequest, **more: Any) -> bytes:
    """The body of a request: all sequences at once, one greedy token behind each because none cannot be asked for."""
    body = {
        "model": model,
        "prompt": request.sequences,
        "prompt_logprobs": request.top_k,
        "max_tokens": 1,
        "temperature": 0.0,
        "add_special_tokens": False,
    }
    return msgspec.json.encode(body | more)


def answer_limit_bytes(request: ScoreRequest) -> int:
    """The longest answer that is read."""
    return (sum(map(len, request.sequences)) * (request.top_k + 1) + 128) * ENTRY_BYTES


def read_completion(data: bytes, request: ScoreRequest, card: Card) -> list[Rows]:
    """Decode and check a whole answer: one Rows per sequence of the request, in its order.

    Raises InvalidRows, or ProtocolError for what is no such answer.
    """
    try:
        choices = _DECODER.decode(data).choices
    except msgspec.DecodeError as error:
        raise ProtocolError(f"expected a completion with prompt_logprobs, received something else: {error}") from error
    by_index = {choice.index: choice for choice in choices}
    if len(choices) != len(request.sequences) or set(by_index) != set(range(len(choices))):
        received = sorted(choice.index for choice in choices)
        raise ProtocolError(f"expected answers 0 … {len(request.sequences) - 1}, received {received}")
    return [_rows(by_index[i], request, card) for i in range(len(choices))]


@dataclass(frozen=True)
class _Where:
    """Names positions in messages."""

    index: int
    start: int

    def refuse(self, row: int, fault: str) -> InvalidRows:
        return InvalidRows(f"sequence {self.index}, position {self.start + row}: {fault}")


def _rows(choice: Choice, request: ScoreRequest, card: Card) -> Rows:
    sequence, start, top_k = request.sequences[choice.index], request.starts[choice.index], request.top_k
    positions = choice.prompt_logprobs
    if positions is None or len(positions) != len(sequence):
        received = "none" if positions is None else str(len(positions))
        raise ProtocolError(
            f"sequence {choice.index}: expected prompt_logprobs of {len(sequence)} tokens, got {received}"
        )
    where = _Where(choice.index, start)
    ids, entries, actual = _listed(positions[start:], sequence[start:], top_k, where)
    shape = (len(actual), top_k)
    slots = _slots(entries, shape, where)
    logprobs = np.empty(shape)
    np.put_along_axis(logprobs, slots, np.fromiter(map(_LOGPROB, entries), np.float64, len(entries)).reshape(shape), 1)
    sorted_ids = np.empty(shape, dtype=np.uint32)
    np.put_along_axis(sorted_ids, slots, np.array(ids, dtype=np.uint32).reshape(shape), 1)
    impossible = (logprobs <= MINUS_INFINITY).any(axis=1) | (np.array(actual) <= MINUS_INFINITY)
    if impossible.any():
        raise where.refuse(int(np.argmax(impossible)), "a value that is not finite: −9999, as vLLM writes −inf")
    tail = _tail(logprobs, card.vocab_size, where)
    with np.errstate(over="ignore"):  # what a float32 cannot hold is refused as not finite
        own = np.array(actual).astype(np.float32)
    rows = Rows(start, sorted_ids, logprobs.astype(np.float32), own, tail)
    return check_rows(rows, request, choice.index, card)


def _listed(
    positions: list[dict[int, Entry] | None], tokens: list[int], top_k: int, where: _Where
) -> tuple[list[int], list[Entry], list[float]]:
    """Of all rows one after another: the K candidates' ids and entries; and the actual tokens' log-probabilities."""
    ids: list[int] = []
    entries: list[Entry] = []
    actual: list[float] = []
    for row, (position, token) in enumerate(zip(positions, tokens, strict=True)):
        if position is None:
            raise where.refuse(row, "no log-probabilities")
        own = position.get(token)
        if own is None:
            raise where.refuse(row, f"nothing is said about the actual token {token}")
        if len(position) == top_k + 1:  # it is not among the K likeliest
            del position[token]
        elif len(position) != top_k:
            raise where.refuse(row, f"expected {top_k} candidates and the actual token, received {len(position)}")
        ids.extend(position)
        entries.extend(position.values())
        actual.append(own.logprob)
    return ids, entries, actual


def _slots(entries: list[Entry], shape: tuple[int, int], where: _Where) -> NDArray[np.int64]:
    """Where each candidate stands in its row, [S, K]: its rank less one. Raises InvalidRows if two have one place."""
    slots = np.fromiter(map(_RANK, entries), np.int64, len(entries)).reshape(shape) - 1
    inside = (slots >= 0) & (slots < shape[1])
    taken = np.zeros(shape, dtype=np.bool_)
    np.put_along_axis(taken, np.where(inside, slots, 0), True, axis=1)
    wrong = ~(taken & inside).all(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        missing = np.setdiff1d(np.arange(shape[1]), slots[row])[0] + 1
        raise where.refuse(row, f"expected ranks 1 to {shape[1]} once each, and {missing} is missing")
    return slots


def _tail(logprobs: NDArray[np.float64], vocab_size: int, where: _Where) -> NDArray[np.float32]:
    """What the listed candidates leave. Refuses what is no log-probability, as a server in logits mode sends it.

    The whole vocabulary weighs 1: the listed no more, and they no less once each unlisted token is given as much as the
    last listed, which no unlisted one exceeds.
    """
    with np.errstate(over="ignore"):
        probs = np.exp(logprobs)
        mass = probs.sum(axis=1)
        most = mass + probs[:, -1] * (vocab_size - probs.shape[1])
    wrong = (mass > 1 + MASS_TOLERANCE) | (most < 1 - MASS_TOLERANCE)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise where.refuse(
            row,
            f"expected log-probabilities, but the {probs.shape[1]} listed weigh {mass[row]:.3g} and all tokens "
            f"together at most {most[row]:.3g}, not 1: start the server with --logprobs-mode raw_logprobs",
        )
    tail: NDArray[np.float64] = np.maximum(1.0 - mass, 0.0)
    return tail.astype(np.float32)
