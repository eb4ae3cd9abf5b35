"""Requests to `/v1/completions` of a rollout server, and their responses: sampled token ids and log-probabilities.

Format of vLLM 0.32. All settings that influence sampling are sent, so that no default of the server applies. Token ids
come from `token_ids`; the strings of `logprobs` are requested as `token_id:N`, so that the candidates have ids too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from teachers.protocol.decoding import decoding
from teachers.protocol.errors import ProtocolError, RequestMismatch, Unavailable
from teachers.protocol.messages import ResponseMessage, TokenId
from teachers.protocol.untrusted_text import clean

Finish = Literal["eos", "stop", "length"]
BANNED_BIAS = -100.0  # the least that vLLM accepts; at temperature 1 it divides a probability by 2.7e43
MAX_BANNED_IDS = 1024  # in vLLM's GPU runner
LEAST_LOGPROB = -1000.0  # vLLM writes −9999 for a probability of 0, with which no token is sampled
TOLERANCE = 1e-3  # of log-probabilities above 0, by rounding
MAX_TOKEN_BYTES = 1024  # of one token in JSON, with its text
MAX_CANDIDATE_BYTES = 64  # "token_id:262143": -12.345678901234567


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt as token ids, BOS included, and how to sample its continuation.

    temperature     at least 0; 0 selects the most probable token
    top_p           above 0, at most 1
    seed            None: another continuation for every request
    stop            texts that end the continuation
    stop_token_ids  ids that end it, besides the EOS of the tokenizer
    banned_ids      ids that are never sampled, for example of padding rows of the vocabulary; at most MAX_BANNED_IDS
    num_top         number of most probable ids to return at every position
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    banned_ids: Sequence[int] = ()
    num_top: int = 0

    def __post_init__(self) -> None:
        if len(self.banned_ids) > MAX_BANNED_IDS:
            raise ValueError(f"expected at most {MAX_BANNED_IDS} banned ids, received {len(self.banned_ids)}")
        if not 0 <= self.temperature < math.inf:  # NaN compares as false
            raise ValueError(f"expected a finite temperature of at least 0, received {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"expected top_p above 0 and at most 1, received {self.top_p}")

    @property
    def limit_bytes(self) -> int:
        """Largest size of a response that is accepted."""
        per_token = MAX_TOKEN_BYTES + (self.num_top + 2) * MAX_CANDIDATE_BYTES
        return (len(self.prompt_ids) + self.max_new_tokens + 16) * per_token

    def body(self, cache_salt: str) -> bytes:
        """Return the JSON body."""
        sampling: dict[str, Any] = {
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "seed": self.seed,
            "stop": list(self.stop),
            "stop_token_ids": list(self.stop_token_ids),
            "logprobs": self.num_top,
        }
        if self.banned_ids:
            sampling["logit_bias"] = dict.fromkeys(map(str, self.banned_ids), BANNED_BIAS)
        return msgspec.json.encode(_fields(self.prompt_ids, cache_salt) | sampling)


def scoring_body(ids: Sequence[int], cache_salt: str) -> bytes:
    """Return the body of a request for the log-probabilities of a text. vLLM generates at least one token."""
    scoring = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    return msgspec.json.encode(_fields(ids, cache_salt) | scoring)


def _fields(prompt_ids: Sequence[int], cache_salt: str) -> dict[str, Any]:
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    tokens = {"add_special_tokens": False, "skip_special_tokens": False, "return_tokens_as_token_ids": True}
    return {"prompt": list(prompt_ids), "return_token_ids": True, "cache_salt": cache_salt} | neutral | tokens


@dataclass(frozen=True)
class GeneratedTokens:
    """A continuation, as the ids that were sampled.

    ids           token ids. EOS or a stop id is the last one if and only if it was sampled
    logprobs      their log-probabilities at temperature 1, before masks and top_p: float32 [T], in nats
    finish        "eos": EOS or a stop id was sampled; "stop": a stop text was written, and the ids contain it;
                  "length": max_new_tokens or the longest sequence of the server was reached
    version       version of the weights at the start; None: the weights with which the server was started
    last_version  version at the end. Another one means that the weights were replaced while the text was written
    top_ids       most probable ids of every position, in descending order: int64 [T, num_top]
    top_logprobs  their log-probabilities: float32 [T, num_top]
    """

    ids: list[int]
    logprobs: NDArray[np.float32]
    finish: Finish
    version: int | None
    last_version: int | None
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float32]


class _Entry(ResponseMessage):
    logprob: float


class _Logprobs(ResponseMessage):
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class _Choice(ResponseMessage):
    finish_reason: str | None
    stop_reason: int | str | None = None
    prompt_token_ids: list[TokenId]
    token_ids: list[TokenId]
    logprobs: _Logprobs | None = None
    prompt_logprobs: list[dict[str, _Entry] | None] | None = None


class _Completion(ResponseMessage):
    choices: list[_Choice]


def read_generated(data: bytes, request: GenerationRequest, versions: tuple[int | None, int | None]) -> GeneratedTokens:
    """Convert a response. `versions` are those at the start and at the end.

    Raises RequestMismatch for the response to another prompt, Unavailable if the server has aborted the request, and
    ProtocolError for values that no model can return.
    """
    choice = _choice(data, request.prompt_ids)
    ids, num = choice.token_ids, len(choice.token_ids)
    if choice.logprobs is None or len(choice.logprobs.token_logprobs) != num:
        raise ProtocolError(f"expected log-probabilities of {num} sampled ids")
    if not 1 <= num <= request.max_new_tokens:
        raise ProtocolError(f"expected 1 to {request.max_new_tokens} sampled ids, received {num}")
    if banned := set(ids) & set(request.banned_ids):
        raise ProtocolError(f"the banned id {min(banned)} was sampled: does the server support logit_bias?")
    logprobs = _checked(choice.logprobs.token_logprobs, LEAST_LOGPROB)
    top_ids, top_logprobs = _top(choice.logprobs.top_logprobs, num, request.num_top)
    return GeneratedTokens(ids, logprobs, _finish(choice, request), *versions, top_ids, top_logprobs)


def read_scored(data: bytes, ids: Sequence[int]) -> NDArray[np.float32]:
    """Return the log-probabilities of ids[1:], float32 [len(ids) − 1]. Raises as `read_generated` does."""
    positions = _choice(data, ids).prompt_logprobs
    if positions is None or len(positions) != len(ids):
        raise ProtocolError(f"expected prompt_logprobs of {len(ids)} tokens")
    entries = [(position or {}).get(str(token)) for position, token in zip(positions[1:], ids[1:], strict=True)]
    if None in entries:
        raise ProtocolError(f"position {entries.index(None) + 1}: expected the log-probability of the token")
    return _checked([entry.logprob for entry in entries if entry is not None], -np.inf)


def _choice(data: bytes, prompt_ids: Sequence[int]) -> _Choice:
    with decoding("completion"):
        completion = _Completion.model_validate_json(data)
    if len(completion.choices) != 1:
        raise ProtocolError(f"expected one completion, received {len(completion.choices)}")
    (choice,) = completion.choices
    if choice.prompt_token_ids != list(prompt_ids):
        raise RequestMismatch(
            f"expected a completion of {len(prompt_ids)} ids, received one of {len(choice.prompt_token_ids)} others"
        )
    return choice


def _finish(choice: _Choice, request: GenerationRequest) -> Finish:
    """Return the reason for which sampling ended.

    vLLM's stop_reason is null for EOS; otherwise it is the stop id or the stop string.
    """
    match choice.finish_reason, choice.stop_reason:
        case "length", _:
            return "length"
        case "stop", str(text) if text in request.stop:
            return "stop"
        case "stop", None:
            return "eos"
        case "stop", int(token) if token == choice.token_ids[-1] and token in request.stop_token_ids:
            return "eos"
        case "abort", _:
            raise Unavailable("it aborted the request")
    raise ProtocolError(f"unknown end of a completion: {clean(choice.finish_reason)}, {clean(choice.stop_reason)}")


def _checked(logprobs: Sequence[float], least: float) -> NDArray[np.float32]:
    """Return log-probabilities as float32. Raises ProtocolError if one is NaN, positive or below `least`."""
    values = np.array(logprobs, np.float64)
    wrong = ~((values >= least) & (values <= TOLERANCE))  # NaN compares as false
    if wrong.any():
        at = int(wrong.argmax())
        raise ProtocolError(f"position {at} of {len(values)}: {values[at]:g} is not a log-probability of a token")
    return np.minimum(values, 0.0).astype(np.float32)


def _top(
    positions: Sequence[Mapping[str, float]], num_tokens: int, num_top: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the most probable ids of every position and their log-probabilities, both [T, num_top].

    A position has num_top candidates, and the sampled id if it is not among them.
    """
    ids, logprobs = np.empty((num_tokens, num_top), np.int64), np.empty((num_tokens, num_top), np.float32)
    if num_top == 0:
        return ids, logprobs
    if len(positions) != num_tokens or any(not num_top <= len(p) <= num_top + 1 for p in positions):
        raise ProtocolError(f"expected {num_top} candidates and the sampled id at {num_tokens} positions")
    for row, position in enumerate(positions):
        candidates = sorted(position.items(), key=lambda item: -item[1])[:num_top]
        with decoding("candidate"):
            ids[row] = [int(name.removeprefix("token_id:")) for name, _ in candidates]
        logprobs[row] = _checked([value for _, value in candidates], -np.inf)
    return ids, logprobs
