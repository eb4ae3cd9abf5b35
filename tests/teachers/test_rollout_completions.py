"""Completion requests of rollouts, and what is refused in their responses."""

import json
from typing import Any

import numpy as np
import pytest

from teachers.client.rollout_completions import (
    GenerationRequest,
    read_generated,
    read_scored,
    scoring_body,
)
from teachers.protocol.errors import ProtocolError, RequestMismatch, Unavailable
from tests.rollout_servers import completion

REQUEST = GenerationRequest(
    [5, 6], max_new_tokens=3, temperature=0.7, top_p=0.9, seed=11, stop=["\n\n"], stop_token_ids=[8], banned_ids=[9]
)
BODY: dict[str, Any] = json.loads(REQUEST.body("4-abc"))


def read(ids: list[int], logprobs: list[Any], request: GenerationRequest = REQUEST, /, **fields: Any) -> Any:
    data = json.dumps(completion(json.loads(request.body("s")), ids, logprobs, **fields))
    return read_generated(data.encode(), request, (4, 5))


def test_everything_that_influences_sampling_is_sent() -> None:
    expected = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 11, "stop": ["\n\n"], "stop_token_ids": [8],
        "logit_bias": {"9": -100.0}, "max_tokens": 3, "prompt": [5, 6], "cache_salt": "4-abc", "logprobs": 0,
        "return_token_ids": True, "skip_special_tokens": False, "add_special_tokens": False,
    }  # fmt: skip
    assert BODY.items() >= expected.items()
    assert "logit_bias" not in json.loads(GenerationRequest([5], 3).body("s"))


def test_more_banned_ids_than_a_server_takes_are_refused() -> None:
    GenerationRequest([5], 3, banned_ids=range(1024))
    with pytest.raises(ValueError, match="at most 1024 banned ids, received 1025"):
        GenerationRequest([5], 3, banned_ids=range(1025))


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"temperature": 2.5}, {"top_p": 1e-3}, {"top_p": 1.0}])
def test_valid_settings_of_sampling_are_accepted(values: dict[str, float]) -> None:
    GenerationRequest([5], 3, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (float("nan"), float("inf"), -0.1)),
        *(("top_p", value) for value in (float("nan"), float("inf"), 0.0, -1.0, 1.1)),
    ],
)
def test_invalid_settings_of_sampling_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}.*received {value}"):
        GenerationRequest([5], 3, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason", "finish"),
    [("stop", None, "eos"), ("stop", 8, "eos"), ("stop", "\n\n", "stop"), ("length", None, "length")],
)
def test_the_end_of_a_text(finish_reason: str, stop_reason: int | str | None, finish: str) -> None:
    tokens = read([3, 8], [-0.5, -2.0], finish_reason=finish_reason, stop_reason=stop_reason)
    assert (tokens.ids, tokens.finish, tokens.version, tokens.last_version) == ([3, 8], finish, 4, 5)
    assert tokens.logprobs.dtype == np.float32
    assert tokens.logprobs.tolist() == [-0.5, -2.0]
    assert tokens.top_ids.shape == tokens.top_logprobs.shape == (2, 0)


def test_an_aborted_request_may_be_sent_again() -> None:
    with pytest.raises(Unavailable, match="aborted"):
        read([3], [-1.0], finish_reason="abort")


def test_rounding_above_0_is_0() -> None:
    assert read([3], [1e-4]).logprobs.tolist() == [0.0]


@pytest.mark.parametrize(
    ("ids", "logprobs", "fields", "message"),
    [
        ([], [], {}, "expected 1 to 3 sampled ids, received 0"),
        ([1, 2, 3, 4], [-1.0] * 4, {}, "expected 1 to 3 sampled ids, received 4"),
        ([3, 4], [-1.0], {}, "log-probabilities of 2 sampled ids"),
        ([3], [-1.0], {"logprobs": None}, "log-probabilities of 1 sampled ids"),
        ([3], [0.5], {}, "position 0 of 1: 0.5 is not a log-probability"),
        ([3, 4], [-1.0, float("nan")], {}, "position 1 of 2: nan"),
        ([3], [-9999.0], {}, "-9999 is not a log-probability"),
        ([9], [-1.0], {}, "the banned id 9 was sampled"),
        ([3], [None], {}, "malformed completion"),
        ([-3], [-1.0], {}, "malformed completion"),
        ([3], [-1.0], {"token_ids": None}, "malformed completion"),
        ([3], [-1.0], {"token_ids": [3.0]}, "malformed completion"),
        ([3], [-1.0], {"finish_reason": "error"}, "unknown end of a completion: error"),
        ([3], [-1.0], {"finish_reason": None}, "unknown end"),
        ([3], [-1.0], {"stop_reason": 3}, "unknown end"),
        ([3], [-1.0], {"stop_reason": 8}, "unknown end"),
        ([3], [-1.0], {"stop_reason": "other"}, "unknown end"),
    ],
)
def test_responses_that_no_model_can_give_are_refused(
    ids: list[int], logprobs: list[Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        read(ids, logprobs, **fields)


def test_the_response_to_another_prompt_is_refused() -> None:
    with pytest.raises(RequestMismatch, match="of 2 ids, received one of 1"):
        read([3], [-1.0], prompt_token_ids=[5])


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"choices": []}', b"[" * 100_000, b"\xff"])
def test_bytes_that_are_no_completion_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_generated(data, REQUEST, (1, 1))


# --- candidates ---


TOP_2 = GenerationRequest([5, 6], 3, num_top=2)


def candidates(*positions: dict[int, float]) -> dict[str, Any]:
    top = [{f"token_id:{token}": value for token, value in position.items()} for position in positions]
    return {"logprobs": {"token_logprobs": [-3.0] * len(positions), "top_logprobs": top}}


def test_candidates_are_in_descending_order_without_a_sampled_id_below_them() -> None:
    fields = candidates({7: -3.0, 1: -1.0, 2: -0.5}, {4: -3.0, 6: -0.1})
    tokens = read([7, 4], [-3.0, -3.0], TOP_2, **fields)
    assert tokens.top_ids.tolist() == [[2, 1], [6, 4]]
    np.testing.assert_allclose(tokens.top_logprobs, [[-0.5, -1.0], [-0.1, -3.0]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (candidates({7: -3.0}), "expected 2 candidates"),
        (candidates({7: -3.0, 1: -1.0, 2: -0.5, 3: -0.7}), "expected 2 candidates"),
        (candidates({7: -3.0, 1: 2.0}), "not a log-probability"),
        ({"logprobs": {"token_logprobs": [-3.0], "top_logprobs": []}}, "expected 2 candidates"),
        ({"logprobs": {"token_logprobs": [-3.0], "top_logprobs": [{"a": -3.0, "b": -1.0}]}}, "malformed candidate"),
    ],
)
def test_malformed_candidates_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        read([7], [-3.0], TOP_2, **fields)


# --- scores of a text ---


def scored(positions: Any) -> Any:
    body = json.loads(scoring_body([5, 6, 7], "probe"))
    return read_scored(json.dumps(completion(body, [1], [-1.0], prompt_logprobs=positions)).encode(), [5, 6, 7])


def test_a_text_of_three_ids_has_two_log_probabilities() -> None:
    received = scored([None, {"6": {"logprob": -0.5, "rank": 1}}, {"7": {"logprob": -9999.0}, "1": {"logprob": -1.0}}])
    assert received.dtype == np.float32
    assert received.tolist() == [-0.5, -9999.0]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (None, "prompt_logprobs of 3 tokens"),
        ([None, {"6": {"logprob": -0.5}}], "prompt_logprobs of 3 tokens"),
        ([None, {"6": {"logprob": -0.5}}, {"8": {"logprob": -0.5}}], "position 2: expected the log-probability"),
        ([None, {"6": {"logprob": -0.5}}, None], "position 2"),
        ([None, {"6": {"logprob": 3.0}}, {"7": {"logprob": -0.5}}], "3 is not a log-probability"),
    ],
)
def test_malformed_scores_are_refused(positions: Any, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        scored(positions)
