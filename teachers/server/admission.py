"""Compare a score request with the card and the limits of the server, and reject it if it exceeds them."""

from teachers.protocol.messages import Problem, ScoreRequest, TeacherCard
from teachers.protocol.untrusted_text import clean
from teachers.server.limits import Limits

MAX_DETAIL_CHARS = 300


class Rejection(Exception):
    """Raised to reject a request. `problem` is the response (RFC 9457); `close` ends the connection after it.

    The detail can quote the request, so it is sanitized and truncated to MAX_DETAIL_CHARS.
    """

    def __init__(
        self, status: int, title: str, detail: str, retry_after_s: int | None = None, *, close: bool = False
    ) -> None:
        detail = clean(detail, MAX_DETAIL_CHARS)
        super().__init__(detail)
        self.problem = Problem(title=title, status=status, detail=detail)
        self.retry_after_s = retry_after_s
        self.close = close

    @property
    def reason(self) -> str:
        """The title as one word, for metrics and logs."""
        return self.problem.title.lower().replace(" ", "_")


def check_request(request: ScoreRequest, card: TeacherCard, limits: Limits) -> None:
    """Raise Rejection if this teacher cannot score the request."""
    sequences, starts = request.sequences, request.starts
    if len(sequences) != len(starts) or not sequences:
        raise Rejection(
            422, "Malformed", f"expected one start per sequence, received {len(starts)} for {len(sequences)}"
        )
    if len(sequences) > limits.max_sequences:
        raise Rejection(413, "Too large", f"{len(sequences)} sequences; send at most {limits.max_sequences}")
    tokens, max_tokens = sum(map(len, sequences)), min(limits.max_request_tokens, limits.max_queued_tokens)
    if tokens > max_tokens:
        raise Rejection(413, "Too large", f"{tokens} tokens; send at most {max_tokens}")
    if request.top_k > card.max_top_k:
        raise Rejection(
            422, "K too large", f"top_k is {request.top_k}; this teacher returns at most {card.max_top_k} candidates"
        )
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        _check_sequence(i, sequence, start, card)
    if request.chosen:
        _check_chosen(request, card)


def _check_sequence(i: int, sequence: list[int], start: int, card: TeacherCard) -> None:
    if len(sequence) > card.max_tokens:
        detail = f"sequence {i} has {len(sequence)} tokens; this teacher accepts at most {card.max_tokens}"
        raise Rejection(422, "Sequence too long", detail)
    if not 1 <= start < len(sequence):
        detail = f"sequence {i}: start {start} leaves no position of {len(sequence)} tokens to score"
        raise Rejection(422, "Nothing to score", detail)
    if max(sequence) >= card.vocab_size:
        detail = f"sequence {i} contains id {max(sequence)}; the largest id of the vocabulary is {card.vocab_size - 1}"
        raise Rejection(422, "Token id out of range", detail)


def _check_chosen(request: ScoreRequest, card: TeacherCard) -> None:
    """Check the chosen ids. Their total number is limited by max_body_bytes."""
    if not card.max_chosen:
        detail = f"{card.engine} scores no chosen ids: remove the field chosen"
        raise Rejection(422, "No chosen ids", detail)
    expected = [len(s) - start for s, start in zip(request.sequences, request.starts, strict=True)]
    received = [len(positions) for positions in request.chosen]
    if received != expected:
        detail = f"chosen: expected ids for {len(expected)} sequences, received {len(received)}"
        if len(received) == len(expected):
            wrong = next(i for i, number in enumerate(expected) if number != received[i])
            detail = f"chosen.{wrong}: expected ids for {expected[wrong]} scored positions, received {received[wrong]}"
        raise Rejection(422, "Malformed", detail)
    counts = {len(ids) for positions in request.chosen for ids in positions}
    if len(counts) > 1 or not 1 <= max(counts) <= card.max_chosen:
        detail = f"chosen: expected the same number of ids at every position, from 1 to {card.max_chosen}, received "
        raise Rejection(422, "Malformed", detail + ", ".join(map(str, sorted(counts))))  # cut if there are many
    largest = max(max(ids) for positions in request.chosen for ids in positions)
    if largest >= card.vocab_size:
        detail = f"chosen contains id {largest}; the largest id of the vocabulary is {card.vocab_size - 1}"
        raise Rejection(422, "Token id out of range", detail)
