"""Score requests to `/generate` of an SGLang server, and their responses as Rows.

Format of SGLang 0.5.23 (read in its source: tokenizer_manager.py, logprob_result_processor.py, logprob_processor.py).
A request for several prompts has a list of results, in the order of the prompts. `meta_info` of a result has

- `prompt_tokens`, the number of tokens of the prompt;
- `input_token_logprobs`: [log-probability, id, text] of each prompt token from `logprob_start_len` on. The first one is
  null, although it may have a predecessor. The log-probability of position `start` therefore needs
  logprob_start_len = start − 1. An id of at least vocabulary size − 1 is written as 0;
- `input_top_logprobs`: one list per token, the first one null, of [log-probability, id, text] of the K most probable
  tokens, in descending order. The actual token is in it only if it is among the K;
- the same candidates as two arrays in base64 instead, `input_top_logprobs_val_flat_b64` (float32) and
  `…_idx_flat_b64` (int32), with the number of leading nulls, if the server knows `return_flat_raw_top_logprobs`. Older
  versions ignore the key and send the lists.

The JSON has no infinity: the server writes null for −∞ and for NaN. A null after a finite candidate is −∞, and a
probability of 0. A first candidate of null is NaN, and the row is invalid.

The text of a token is null (`return_text_in_logprobs` is false) and not read. A response has no digest of its request:
the parser compares the number of results, their lengths, and the id of every actual token. It cannot detect a response
to the same prompt that was computed with other weights.
"""

from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from teachers.client.dialects.probability_zero import finite_logprobs, zeros_last
from teachers.client.dialects.top_k_rows import RowPosition, tail_of
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import ProtocolError, RequestMismatch
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows, check_rows, clip_logprobs

REMEDY = "expected the log-probabilities of an SGLang server without a custom logit processor"
MAX_ENTRY_BYTES = 64  # of [log-probability, id, null]; 38 as measured
MAX_RESULT_BYTES = 64 * 1024  # of the fields of one result that are not read

Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Entry = tuple[float | None, Id, object]


class _MetaInfo(msgspec.Struct):
    prompt_tokens: int
    input_token_logprobs: list[Entry]
    input_top_logprobs: list[list[Entry] | None] | None = None
    values_base64: str | None = msgspec.field(default=None, name="input_top_logprobs_val_flat_b64")
    ids_base64: str | None = msgspec.field(default=None, name="input_top_logprobs_idx_flat_b64")
    shape: tuple[int, int] | None = msgspec.field(default=None, name="input_top_logprobs_shape")
    num_nulls: int = msgspec.field(default=0, name="input_top_logprobs_null_prefix")


class _Result(msgspec.Struct):
    meta_info: _MetaInfo


_DECODER = msgspec.json.Decoder(list[_Result])


def generate_request(request: ScoreRequest) -> bytes:
    """Return the body of a request for all sequences. It generates one token, which every version supports."""
    body = {
        "input_ids": request.sequences,
        "return_logprob": True,
        "logprob_start_len": [start - 1 for start in request.starts],
        "top_logprobs_num": [request.top_k] * len(request.sequences),
        "return_text_in_logprobs": False,
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},  # log-probabilities at temperature 1
    }
    return msgspec.json.encode(body)


def response_limit_bytes(request: ScoreRequest) -> int:
    """Return the largest size of a response that is accepted."""
    positions = sum(len(s) - start + 1 for s, start in zip(request.sequences, request.starts, strict=True))
    return positions * (request.top_k + 1) * MAX_ENTRY_BYTES + len(request.sequences) * MAX_RESULT_BYTES


def read_results(data: bytes, request: ScoreRequest, card: TeacherCard) -> list[Rows]:
    """Convert a response into one Rows per sequence, in the order of the request.

    Raises RequestMismatch if the tokens are not those of the request, InvalidRows for values that no model returns, and
    ProtocolError for a malformed response.
    """
    with decoding("results of /generate"):
        results = _DECODER.decode(data)
    if len(results) != len(request.sequences):
        raise ProtocolError(f"expected {len(request.sequences)} results, received {len(results)}")
    return [_rows(result.meta_info, index, request, card) for index, result in enumerate(results)]


def _rows(meta: _MetaInfo, index: int, request: ScoreRequest, card: TeacherCard) -> Rows:
    start, first = request.starts[index], RowPosition(index, request.starts[index])
    actual = _actual_logprobs(meta, index, request, card.vocab_size)
    shape = (len(actual), request.top_k)
    ids, logprobs = _flat_candidates(meta, shape, index) or _nested_candidates(meta, shape, index)
    if (not_a_number := np.isnan(logprobs).any(axis=1)).any():
        raise first.error(int(np.argmax(not_a_number)), "a log-probability that is not a number")
    values, ids = zeros_last(finite_logprobs(logprobs.ravel()).reshape(shape), ids)
    tail = tail_of(values, card.vocab_size, first, REMEDY)
    logprobs, actual = (clip_logprobs(each.astype(np.float32)) for each in (values, finite_logprobs(actual)))
    return check_rows(Rows(start, ids, logprobs, actual, tail), request, index, card)


def _actual_logprobs(meta: _MetaInfo, index: int, request: ScoreRequest, vocab_size: int) -> NDArray[np.float32]:
    """Return the log-probabilities of the actual tokens [S], −∞ for null. Raises RequestMismatch for other tokens."""
    sequence, start = request.sequences[index], request.starts[index]
    expected = sequence[start - 1 :]
    if meta.prompt_tokens != len(sequence) or len(meta.input_token_logprobs) != len(expected):
        raise RequestMismatch(
            f"sequence {index}: expected the scores of {len(expected)} of {len(sequence)} tokens, received "
            f"{len(meta.input_token_logprobs)} of {meta.prompt_tokens}"
        )
    pairs = zip(expected, meta.input_token_logprobs, strict=True)
    for position, (token, (_, received, _)) in enumerate(pairs, start - 1):
        if received != (token if token < vocab_size - 1 else 0):
            raise RequestMismatch(
                f"sequence {index}, position {position}: expected the score of token {token}, received {received}"
            )
    return np.array([_logprob_of(entry) for entry in meta.input_token_logprobs[1:]], dtype=np.float32)


def _flat_candidates(
    meta: _MetaInfo, shape: tuple[int, int], index: int
) -> tuple[NDArray[np.uint32], NDArray[np.float32]] | None:
    """Return ids and log-probabilities [S, K] from the two arrays in base64; None if the response has none."""
    if meta.values_base64 is None or meta.ids_base64 is None:
        return None
    with decoding("arrays of candidates"):
        values, ids = (msgspec.convert(text, bytes) for text in (meta.values_base64, meta.ids_base64))
    expected_bytes = shape[0] * shape[1] * 4
    if meta.num_nulls != 1 or meta.shape != shape or not len(values) == len(ids) == expected_bytes:
        raise ProtocolError(
            f"sequence {index}: expected candidates {list(shape)} after one null, received {meta.shape} after "
            f"{meta.num_nulls}, in {len(values)} and {len(ids)} bytes"
        )
    return np.frombuffer(ids, "<u4").reshape(shape), np.frombuffer(values, "<f4").reshape(shape)


def _nested_candidates(
    meta: _MetaInfo, shape: tuple[int, int], index: int
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return ids and log-probabilities [S, K] from the nested lists: −∞ for null, but NaN in the first column."""
    lists = meta.input_top_logprobs
    received = None if lists is None else len(lists) - 1
    if lists is None or received != shape[0] or lists[0] is not None:
        raise ProtocolError(f"sequence {index}: expected null and {shape[0]} lists of candidates, received {received}")
    for row, candidates in enumerate(lists[1:]):
        if candidates is None or len(candidates) != shape[1]:
            received = 0 if candidates is None else len(candidates)
            raise ProtocolError(f"sequence {index}, row {row}: expected {shape[1]} candidates, received {received}")
    entries = [entry for candidates in lists[1:] for entry in candidates or ()]
    ids = np.array([entry[1] for entry in entries], dtype=np.uint32).reshape(shape)
    logprobs = np.array([_logprob_of(entry) for entry in entries], dtype=np.float32).reshape(shape)
    logprobs[np.isinf(logprobs[:, 0]), 0] = np.nan
    return ids, logprobs


def _logprob_of(entry: Entry) -> float:
    """Return the log-probability of an entry, −∞ for null."""
    return -np.inf if entry[0] is None else entry[0]
