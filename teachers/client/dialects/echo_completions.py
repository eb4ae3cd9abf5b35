"""Score requests to `/v1/completions` with `echo` and `logprobs`, and their responses as Rows.

Format of OpenAI's API, as llama-cpp-python 0.3.36 implements it (tests/teachers/llama_cpp/ has recorded responses).
`logprobs` of a choice has four lists with one entry for each token of the prompt and of the completion:

- `tokens`: strings, which token_strings.py matches by their bytes;
- `text_offset`: characters before the token. They must not decrease, and are not used otherwise;
- `token_logprobs`: of the actual tokens, the first one null;
- `top_logprobs`: the K most probable tokens as an object from strings to log-probabilities, the first one null. Many
  servers add the actual token if it is not among the K. Two tokens with one string are one entry.

Some servers put BOS in front of a prompt, and list it or not. llama-cpp-python lists no BOS of a sequence. If a
sequence does not begin with BOS, its lists are shifted: the entry of a token is the distribution of the *next* token.

A position is masked, not guessed, if its entry is absent, or if it does not determine K candidates: a string that
stands for no token or for several, or fewer than K strings because two candidates have the same one. In a shifted
response the log-probability of an actual token outside the K candidates is unknown, and its position is masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from teachers.client.dialects.probability_zero import FLOOR
from teachers.client.dialects.token_strings import StringMatch, TokenStrings
from teachers.client.dialects.top_k_rows import RowPosition, tail_of
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import ProtocolError, RequestMismatch
from teachers.protocol.kernels import VALID, check_float_rows
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import LEAST_LOGPROB, Rows, actual_ids, masked_row, raise_for_fault

REMEDY = "expected the log-probabilities of an OpenAI-compatible server at temperature 1"
MAX_ENTRY_BYTES = 1024  # of one candidate; a token of 100 bytes takes 600 in JSON escapes
MAX_OTHER_BYTES = 1 << 20  # of the text and of fields that are not read

Entry = dict[str, float | None]


class Logprobs(msgspec.Struct):
    """The lists of a choice."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[Entry | None] | None = None
    text_offset: list[int] = []


class Choice(msgspec.Struct):
    """The completion of one prompt."""

    logprobs: Logprobs | None = None


class Usage(msgspec.Struct):
    """Number of tokens of the prompt, BOS included."""

    prompt_tokens: int


class Completion(msgspec.Struct):
    """The response to one prompt."""

    choices: list[Choice]
    usage: Usage | None = None


@dataclass(frozen=True)
class EchoFormat:
    """Properties of the requests and responses of one server. The client determines them by requests with PROBE_TEXT.

    takes_ids   the prompt may be a list of ids; otherwise it is a text
    adds_bos    the server puts BOS in front of every prompt
    is_shifted  the lists of a sequence without BOS in front are shifted by one token
    """

    takes_ids: bool
    adds_bos: bool
    is_shifted: bool


@dataclass(frozen=True)
class EchoReader:
    """Convert the responses of one server into Rows."""

    format: EchoFormat
    strings: TokenStrings
    bos_id: int | None

    def rows(self, logprobs: Logprobs, request: ScoreRequest, card: TeacherCard) -> Rows:
        """Return the rows of a request for one sequence. Raises RequestMismatch, InvalidRows or ProtocolError."""
        sequence, start, top_k = request.sequences[0], request.starts[0], request.top_k
        entry_of = self._entries(logprobs, sequence)
        parsed = [self._row(entry_of.get(p), sequence, p, top_k) for p in range(start, len(sequence))]
        return _to_rows(parsed, request, card)

    def _entries(self, logprobs: Logprobs, sequence: list[int]) -> dict[int, "_PositionEntry"]:
        """Return the entries by the position that they predict. Raises RequestMismatch for other tokens."""
        visible = self.visible_positions(logprobs.tokens, sequence)
        if visible is None:
            raise RequestMismatch(f"expected the {len(sequence)} tokens of the request, received other token strings")
        shift = int(self.format.is_shifted and visible[0] == 0)
        lists = zip(visible, logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs or (), strict=False)
        return {
            position + shift: _PositionEntry(string, None if shift else logprob, entry)
            for position, string, logprob, entry in lists
            if entry is not None
        }

    def visible_positions(self, strings: list[str], sequence: list[int]) -> list[int] | None:
        """Return the positions that the response lists: all, or all but BOS; None if it lists other tokens."""
        every = range(len(sequence))
        without_first = [p for p in every if p or sequence[p] != self.bos_id]
        without_any = [p for p in every if sequence[p] != self.bos_id]
        for visible in (list(every), without_first, without_any):
            num_generated = len(strings) - len(visible)
            if visible and num_generated in (0, 1):
                ids = [sequence[p] for p in visible]
                if self.strings.first_difference(ids, strings[: len(visible)]) is None:
                    return visible
        return None

    def _row(self, found: "_PositionEntry | None", sequence: list[int], position: int, top_k: int) -> "_Row | None":
        """Return the row of one position.

        Return None if the strings of its entry do not identify K candidates and the actual token.
        """
        candidates = None if found is None else _top_candidates(found, top_k, self.strings)
        if found is None or candidates is None:
            return None
        matches = {string: self.strings.match(string) for string in candidates}
        token = sequence[position]
        own = next((s for s, match in matches.items() if match and self._is_same(match, token)), None)
        actual = found.logprob if found.logprob is not None else None if own is None else candidates[own]
        ids = [token if string == own else match.id for string, match in matches.items() if match]
        if actual is None or len(set(ids)) < top_k:
            return None
        values = list(candidates.values())
        order = sorted(range(top_k), key=lambda k: -values[k])
        return _Row([ids[k] for k in order], [values[k] for k in order], actual)

    def _is_same(self, match: StringMatch, token: int) -> bool:
        data = self.strings.tokens[token].data
        return match.id == token or (data is not None and self.strings.tokens[match.id].data == data)


@dataclass(frozen=True)
class _PositionEntry:
    """The entry of `top_logprobs` that predicts a position.

    string   string of the token with the same index in the lists; the server adds it to the entry
    logprob  log-probability of the actual token; None in a shifted response
    entry    log-probabilities by string
    """

    string: str
    logprob: float | None
    entry: Entry


@dataclass(frozen=True)
class _Row:
    """The candidates of one position, in descending order, and the actual token's log-probability."""

    ids: list[int]
    logprobs: list[float]
    actual: float


def _top_candidates(found: _PositionEntry, top_k: int, strings: TokenStrings) -> dict[str, float] | None:
    """Return the K most likely candidates of an entry, or None if they cannot be determined.

    A server adds the actual token to the entry if it is not among the K candidates. An entry of K + 1 strings ends with
    this added token. An entry of K strings that ends with the actual token is ambiguous if one of its strings belongs
    to several tokens: two candidates may share a string, and the actual token may have been added.
    """
    entry = {string: FLOOR if logprob is None else logprob for string, logprob in found.entry.items()}
    last = next(reversed(entry), None)
    if len(entry) == top_k + 1 and last == found.string:
        del entry[last]
    elif len(entry) == top_k:
        matches = [strings.match(string) for string in entry]
        if last == found.string and any(match is None or not match.is_only for match in matches):
            return None
    else:
        return None
    return entry


def _to_rows(parsed: Sequence[_Row | None], request: ScoreRequest, card: TeacherCard) -> Rows:
    """Build Rows from one row per position. None becomes a masked position. Raises InvalidRows for invalid data."""
    top_k, start = request.top_k, request.starts[0]
    rows = [row or _Row(*masked_row(top_k)) for row in parsed]
    ids = np.array([row.ids for row in rows], dtype=np.uint32).reshape(-1, top_k)
    logprobs = np.array([row.logprobs for row in rows], dtype=np.float64).reshape(-1, top_k)
    actual = np.array([row.actual for row in rows], dtype=np.float64)
    logprobs[logprobs <= FLOOR], actual[actual <= FLOOR] = LEAST_LOGPROB, LEAST_LOGPROB
    valid = np.flatnonzero([row is not None for row in parsed])
    tail = np.ones(len(rows), dtype=np.float32)
    tail[valid] = tail_of(logprobs[valid], card.vocab_size, RowPosition(0, start), REMEDY)
    single = logprobs.astype(np.float32), actual.astype(np.float32)
    text, vocab_size = actual_ids(request, 0, card)
    exact = single[1][valid], tail[valid]
    fault, row = check_float_rows(single[0][valid], ids[valid], exact, (text[valid], vocab_size))
    raise_for_fault(fault, 0 if fault == VALID else int(valid[row]), (0, start), card)
    return Rows(start, ids, single[0], single[1], tail)


def masked_rows(request: ScoreRequest) -> Rows:
    """Return rows whose positions are all masked, for a sequence that no prompt of the server expresses."""
    num_rows = len(request.sequences[0]) - request.starts[0]
    ids, logprobs, actual = (np.array(values) for values in masked_row(request.top_k))
    shape = (num_rows, request.top_k)
    return Rows(
        request.starts[0],
        np.broadcast_to(ids, shape).astype(np.uint32),
        np.broadcast_to(logprobs, shape).astype(np.float32),
        np.full(num_rows, actual, dtype=np.float32),
        np.ones(num_rows, dtype=np.float32),
    )


def echo_request(model: str, prompt: str | list[int], top_k: int) -> bytes:
    """Return the body of a request for one prompt. It generates one token: for llama-cpp-python, 0 means no limit."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "echo": True, "logprobs": top_k, "max_tokens": 1}
    return msgspec.json.encode(body | {"temperature": 1.0})


def response_limit_bytes(num_tokens: int, top_k: int) -> int:
    """Return the largest size of a response that is accepted."""
    return (num_tokens + 2) * (top_k + 3) * MAX_ENTRY_BYTES + MAX_OTHER_BYTES


def read_completion(data: bytes) -> tuple[Logprobs, int | None]:
    """Decode a response. Return its lists, and the number of prompt tokens if it states one. Raises ProtocolError."""
    with decoding("completion"):
        completion = msgspec.json.decode(data, type=Completion)
    if len(completion.choices) != 1:
        raise ProtocolError(f"expected one completion, received {len(completion.choices)}")
    lists = completion.choices[0].logprobs
    if lists is None or lists.top_logprobs is None:
        raise ProtocolError("expected log-probabilities of the prompt: the server ignores `echo` or `logprobs`")
    lengths = {len(each) for each in (lists.tokens, lists.token_logprobs, lists.top_logprobs)}
    if len(lengths) > 1 or (lists.text_offset and lists.text_offset != sorted(lists.text_offset)):
        raise ProtocolError(f"expected lists of one length and ascending offsets, received lengths {sorted(lengths)}")
    return lists, completion.usage.prompt_tokens if completion.usage else None
