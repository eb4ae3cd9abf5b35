"""The scores of one sequence by one teacher, and the checks that every response passes. wire_format.py encodes them.

Position i predicts token i of a sequence, so position 0 has no row. The scores of (sequence, start) are the rows of
positions start … len − 1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teachers.protocol.errors import InvalidRows, ProtocolError
from teachers.protocol.kernels import FAULTS, MASS_TOLERANCE, VALID, check_float_rows
from teachers.protocol.messages import ScoreRequest, TeacherCard, id_array

CHOSEN_TOLERANCE = 2.0**-8  # relative: a listed log-probability is a float16 and is rescaled to restore the mass
LEAST_LOGPROB = float(np.finfo(np.float16).min)  # −65504


@dataclass(frozen=True, eq=False)
class Rows:
    """The scores of positions start … start + S − 1 of one sequence.

    ids       [S, K] token ids, most probable first
    logprobs  [S, K] nats, descending
    actual    [S] nats, log-probability of the actual token at the position. NaN marks a masked position, at
              which a response without ids does not determine the candidates; their mass is 0. Not on the wire
    tail      [S] probability of all ids that are not listed
    chosen    [S, M] nats, log-probabilities of the chosen ids; None if the request has none
    """

    start: int
    ids: NDArray[np.uint32]
    logprobs: NDArray[np.float32]
    actual: NDArray[np.float32]
    tail: NDArray[np.float32]
    chosen: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.actual)

    @property
    def num_masked(self) -> int:
        """Number of masked positions."""
        return int(np.isnan(self.actual).sum())


def masked_row(top_k: int) -> tuple[list[int], list[float], float]:
    """Return ids, log-probabilities and the actual token's log-probability of a masked position. Its tail is 1."""
    return [0] * top_k, [LEAST_LOGPROB] * top_k, float("nan")


def clip_logprobs(logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Clip log-probabilities of an engine to [LEAST_LOGPROB, 0]; NaN stays NaN.

    The wire has no −∞: the least float16 stands for a probability of 0. Values above 0 are rounding errors of
    log-softmax. Every engine applies this function to all log-probabilities that it returns.
    """
    return np.clip(logprobs, np.float32(LEAST_LOGPROB), np.float32(0.0))


def check_rows(rows: Rows, request: ScoreRequest, index: int, card: TeacherCard) -> Rows:
    """Check float32 rows and return them unchanged. Raises InvalidRows or ProtocolError."""
    check_length(rows.start, len(rows), request, index)
    text = actual_ids(request, index, card)
    fault, row = check_float_rows(rows.logprobs, rows.ids, (rows.actual, rows.tail), text)
    raise_for_fault(fault, row, (index, rows.start), card)
    check_chosen(rows, request, index)
    return rows


def check_chosen(rows: Rows, request: ScoreRequest, index: int) -> None:
    """Check the log-probabilities of the chosen ids, alone and against the candidates and the tail of the row."""
    received = (0, 0) if rows.chosen is None else rows.chosen.shape
    if received != ((len(rows), request.num_chosen) if request.num_chosen else (0, 0)):
        raise ProtocolError(
            f"sequence {index}: expected {request.num_chosen} chosen ids per row, received {received[1]}"
        )
    if rows.chosen is None:
        return
    ids = np.asarray(request.chosen[index], dtype=np.uint32)
    matches = ids[:, :, None] == rows.ids[:, None, :]  # [S, M, K]
    listed = np.take_along_axis(rows.logprobs, matches.argmax(axis=2), axis=1)
    not_a_logprob = ~(rows.chosen <= 0) | np.isinf(rows.chosen)  # NaN <= 0 is false
    contradiction = matches.any(axis=2) & (np.abs(listed - rows.chosen) > CHOSEN_TOLERANCE * (1 + np.abs(listed)))
    with np.errstate(over="ignore"):
        too_probable = ~matches.any(axis=2) & (np.exp(rows.chosen) > rows.tail[:, None] + MASS_TOLERANCE)
    for fault, description in (
        (not_a_logprob, "which is not a log-probability"),
        (contradiction, "which contradicts its listed log-probability"),
        (too_probable, "which is unlisted and more probable than the whole tail"),
    ):
        if fault.any():
            row, m = np.argwhere(fault)[0].tolist()
            value = f"the chosen id {ids[row, m]} has {rows.chosen[row, m]:.6g}, {description}"
            raise InvalidRows(f"sequence {index}, position {rows.start + row}: {value}")


def check_length(start: int, num_rows: int, request: ScoreRequest, index: int) -> None:
    """Raise ProtocolError unless the rows cover the requested positions of sequence `index`."""
    expected_start = request.starts[index]
    expected = len(request.sequences[index]) - expected_start
    if start != expected_start or num_rows != expected:
        raise ProtocolError(
            f"sequence {index}: expected {expected} rows from position {expected_start}, "
            f"received {num_rows} from {start}"
        )


def actual_ids(request: ScoreRequest, index: int, card: TeacherCard) -> tuple[NDArray[np.uint32], int]:
    """Return the actual ids [S] of the scored positions and the vocabulary size."""
    return id_array(request.sequences[index])[request.starts[index] :], card.vocab_size


def raise_for_fault(fault: int, row: int, position: tuple[int, int], card: TeacherCard) -> None:
    """Raise InvalidRows for a fault that a kernel found in a row. `position` is (sequence, first position)."""
    if fault != VALID:
        description = FAULTS[fault].format(vocab_size=card.vocab_size)
        raise InvalidRows(f"sequence {position[0]}, position {position[1] + row}: {description}")
