"""Decoding and checks of prompt_logprobs in responses of a plain vLLM server."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

import teachers.protocol.errors as errors
from teachers.client.dialects.probability_zero import infinity_as_null
from teachers.client.dialects.vllm_completions import read_completion
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import LEAST_LOGPROB, Rows
from tests.fake_vllm import choice, completion, prompt_logprobs
from tests.rows import random_rows

VOCAB_SIZE = 300
CARD = TeacherCard(
    model="org/model", fingerprint="a" * 64, engine="e", dtype="float32", vocab_size=VOCAB_SIZE,
    tokenizer_sha256="b" * 64, bos_id=None, eos_id=None, expects_bos=False, max_tokens=100, max_top_k=64,
)  # fmt: skip


def make_choices(rows: list[Rows], sequences: list[list[int]]) -> list[dict[str, Any]]:
    pairs = enumerate(zip(rows, sequences, strict=True))
    return [choice(i, s, prompt_logprobs(s, r, VOCAB_SIZE)) for i, (r, s) in pairs]


def make_request(*lengths: int, top_k: int = 8, start: int = 1) -> tuple[ScoreRequest, list[Rows]]:
    sequences = [list(range(20, 20 + n)) for n in lengths]
    request = ScoreRequest(sequences=sequences, starts=[start] * len(lengths), top_k=top_k)
    return request, [random_rows(np.array(s), VOCAB_SIZE, top_k, seed=i, start=1) for i, s in enumerate(sequences)]


@pytest.mark.parametrize("top_k", [1, 8, 64, VOCAB_SIZE])
def test_rows_are_decoded_for_any_order_of_the_choices(top_k: int) -> None:
    request, rows = make_request(5, 30, 12, top_k=top_k)
    choices = make_choices(rows, request.sequences)
    listed = [len(p) for c in choices for p in c["prompt_logprobs"][1:]]
    assert set(listed) <= {top_k, top_k + 1}
    got = read_completion(msgspec.json.encode(completion(choices[::-1])), request, CARD)
    for received, sent in zip(got, rows, strict=True):
        for name in ("ids", "logprobs", "actual"):
            np.testing.assert_array_equal(getattr(received, name), getattr(sent, name))
            assert getattr(received, name).dtype == getattr(sent, name).dtype
        np.testing.assert_allclose(received.tail, sent.tail, atol=1e-6)
        mass = np.exp(received.logprobs.astype(np.float64)).sum(axis=1)
        np.testing.assert_allclose(mass + received.tail, 1, atol=1e-6)


def test_only_requested_positions_are_decoded() -> None:
    request, rows = make_request(30, top_k=8, start=17)
    got = read_completion(msgspec.json.encode(completion(make_choices(rows, request.sequences))), request, CARD)
    assert got[0].start == 17
    np.testing.assert_array_equal(got[0].ids, rows[0].ids[16:])


Position = dict[str, Any]


def most_probable(position: Position) -> Position:
    return next(e for e in position.values() if e["rank"] == 1)


def in_logits(shift: float) -> Callable[[Position], None]:
    def change(position: Position) -> None:
        for each in position.values():
            each["logprob"] += shift

    return change


def drop_the_least(position: Position) -> None:
    del position[next(t for t, e in position.items() if e["rank"] == 64)]


FAULTS: dict[str, tuple[str, Callable[[Position], object]]] = {
    "all of probability 0": ("have mass 0 and all tokens together at most 0, not 1", in_logits(-9999.0)),
    "two too many": ("expected 64 candidates .* received 6[67]", lambda p: p.update({"301": last(p), "302": last(p)})),
    "more than a float32 can hold": (
        "not finite",
        lambda p: p.update({"22": last(p) | {"logprob": 1e300, "rank": 300}}),
    ),
    "logits above": ("raw_logprobs", in_logits(5.0)),
    "logits below": ("have mass .* together at most .*raw_logprobs", in_logits(-5.0)),
    "a mass of 1.002": ("raw_logprobs", lambda p: most_probable(p).update(logprob=float(np.log(1.002)))),
    "unsorted": ("descending order", lambda p: swap_ranks(p)),
    "two of one rank": ("expected each rank from 1 to 64 once", lambda p: most_probable(p).update(rank=2)),
    "rank 0": ("expected each rank from 1 to 64 once", lambda p: most_probable(p).update(rank=0)),
    "rank out of all bounds": (
        "expected each rank from 1 to 64 once",
        lambda p: most_probable(p).update(rank=(1 << 32) - 1),
    ),
    "too few": ("expected (64 candidates|each rank from 1 to 64 once)", drop_the_least),
    "none": ("no log-probability of the actual token 22", lambda p: p.clear()),
    "without the actual": ("no log-probability of the actual token 22", lambda p: p.pop("22")),
    "outside": ("outside the vocabulary of 300", lambda p: rename(p, "300")),
}


def last(position: Position) -> Position:
    return next(e for e in position.values() if e["rank"] == 64)


def swap_ranks(position: Position) -> None:
    top, bottom = most_probable(position), last(position)
    top["rank"], bottom["rank"] = 64, 1


def rename(position: Position, token: str) -> None:
    old = next(t for t, e in position.items() if e["rank"] == 64 and t != "22")
    position[token] = position.pop(old)


@pytest.mark.parametrize("fault", FAULTS)
def test_invalid_rows_are_rejected_with_their_position(fault: str) -> None:
    name, change = FAULTS[fault]
    request, rows = make_request(4, 6, top_k=64)
    choices = make_choices(rows, request.sequences)
    read_completion(msgspec.json.encode(completion(choices)), request, CARD)
    change(choices[1]["prompt_logprobs"][2])
    with pytest.raises(errors.InvalidRows, match=f"sequence 1, position 2: .*{name}"):
        read_completion(msgspec.json.encode(completion(choices)), request, CARD)


@pytest.mark.parametrize("value", ["-9999.0", "-1e4", "-3.4028234663852886e+38", "-1e300", "null", "-Infinity"])
def test_every_form_of_minus_infinity_is_probability_0(value: str) -> None:
    request, rows = make_request(6, top_k=64)
    choices = make_choices(rows, request.sequences)
    positions = choices[0]["prompt_logprobs"]
    assert positions[2]["22"]["rank"] == 300  # the actual token of position 2 is not among the candidates
    positions[2]["22"]["logprob"] = last(positions[3])["logprob"] = -7777.0
    data = json.dumps(completion(choices)).replace("-7777.0", value).encode()
    (got,) = read_completion(data, request, CARD)
    assert got.actual[1] == got.logprobs[2, 63] == LEAST_LOGPROB
    assert np.exp(got.logprobs[2, 63], dtype=np.float64) == 0
    assert np.isfinite(got.tail).all()
    np.testing.assert_array_equal(got.logprobs[[0, 1, 3, 4]], rows[0].logprobs[[0, 1, 3, 4]])
    np.testing.assert_array_equal(got.actual[[0, 2, 3, 4]], rows[0].actual[[0, 2, 3, 4]])


def test_candidates_of_probability_0_are_behind_the_others() -> None:
    request, rows = make_request(6, top_k=64)
    choices = make_choices(rows, request.sequences)
    third, last_id = int(rows[0].ids[2, 2]), int(rows[0].ids[2, 63])
    choices[0]["prompt_logprobs"][3][str(third)]["logprob"] = -9999.0
    choices[0]["prompt_logprobs"][3][str(last_id)]["logprob"] = None
    (got,) = read_completion(msgspec.json.encode(completion(choices)), request, CARD)
    assert got.ids[2, 62:].tolist() == [third, last_id]
    assert got.logprobs[2, 62:].tolist() == [LEAST_LOGPROB] * 2
    np.testing.assert_array_equal(got.ids[2, :62], np.delete(rows[0].ids[2], [2, 63]))


def test_a_name_with_infinity_is_kept() -> None:
    assert (
        infinity_as_null(b'{"model": "x-Infinity", "logprob": -Infinity}')
        == b'{"model": "x-Infinity", "logprob": null}'
    )


def test_a_missing_position_is_rejected_and_never_read_as_0() -> None:
    request, rows = make_request(6)
    choices = make_choices(rows, request.sequences)
    choices[0]["prompt_logprobs"][3] = None
    with pytest.raises(errors.InvalidRows, match="sequence 0, position 3: no log-probabilities"):
        read_completion(msgspec.json.encode(completion(choices)), request, CARD)


def test_a_duplicate_candidate_in_the_json_is_rejected() -> None:
    request, rows = make_request(6)
    data = json.dumps(completion(make_choices(rows, request.sequences))).encode()
    first, second = (f'"{t}": {{"logprob"'.encode() for t in rows[0].ids[1, :2])
    assert first in data
    with pytest.raises(errors.InvalidRows, match="sequence 0, position"):
        read_completion(data.replace(second, first), request, CARD)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda c: c[:1],
        lambda c: [c[0], c[0] | {"index": 1}, c[1]],
        lambda c: [c[0], c[1] | {"index": 2}],
        lambda c: [c[0], c[0]],
        lambda c: [c[0], c[1] | {"prompt_logprobs": None}],
        lambda c: [c[0], c[1] | {"prompt_logprobs": c[0]["prompt_logprobs"]}],
        lambda c: [c[0], c[1] | {"prompt_logprobs": [None, {"x": {"logprob": -1.0, "rank": 1}}]}],
        lambda c: [c[0], c[1] | {"prompt_logprobs": [None, {"-1": {"logprob": -1.0, "rank": 1}}]}],
        lambda c: [c[0], c[1] | {"prompt_logprobs": [None, {"1": {"logprob": None, "rank": 1}}]}],
        lambda c: [c[0], c[1] | {"prompt_logprobs": [None, {"1": {"rank": 1}}]}],
        lambda c: [c[0], c[1] | {"prompt_logprobs": [None, {"1": {"logprob": -1.0, "rank": 1 << 70}}]}],
        lambda c: [c[0], c[1] | {"prompt_logprobs": [None, {"1": {"logprob": float("nan"), "rank": 1}}]}],
    ],
)
def test_a_response_that_does_not_match_the_request_is_rejected(wrong: Callable[[list[Any]], list[Any]]) -> None:
    request, rows = make_request(4, 6)
    data = json.dumps(completion(wrong(make_choices(rows, request.sequences)))).encode()
    with pytest.raises(errors.ProtocolError, match="expected|malformed completion"):
        read_completion(data, request, CARD)
