"""What we use of vLLM, pinned: an upgrade that changes it fails here and not in a run. No engine is started."""

import asyncio
import inspect
import time
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from teachers.engine import EngineOptions
from teachers.engines import open_engine
from teachers.errors import EngineDead, InvalidRows, TeacherError
from teachers.rows import as_received
from teachers.serving.plugin import TutelagePlugin
from tests.needs import need
from tests.teachers.test_protocol import CARD
from trainer.cli import app

LENGTH, K = 5, 3


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    need("vllm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, and those of what it imports
        import teachers.engines.vllm  # noqa: F401


def tensors() -> Any:
    """An answer as it comes from the engine's process: the actual token, then the K likeliest."""
    from vllm.v1.outputs import LogprobsTensors

    logprobs = torch.randn(LENGTH - 1, 100, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    actual = torch.tensor([[7], [8], [9], [10]])
    top = logprobs.topk(K)
    return LogprobsTensors(
        logprob_token_ids=torch.cat([actual, top.indices], 1).int(),
        logprobs=torch.cat([logprobs.gather(1, actual), top.values], 1),
        selected_token_ranks=torch.ones(LENGTH - 1, dtype=torch.int32),
    )


def answered(whole: bool) -> Any:
    """RequestOutput.prompt_logprobs of vLLM's own output processor, with our collector or with vLLM's."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    from teachers.engines.vllm import _KeepTensors

    processor = OutputProcessor(None, log_stats=False)
    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=K, flat_logprobs=True, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True,
    )  # fmt: skip
    request = EngineCoreRequest(
        request_id="one-1", external_req_id="one", prompt_token_ids=list(range(6, 6 + LENGTH)), mm_features=None,
        sampling_params=params, pooling_params=None, arrival_time=time.time(), lora_request=None, cache_salt=None,
        data_parallel_rank=None,
    )  # fmt: skip
    queue = RequestOutputCollector(params.output_kind, request.request_id)
    processor.add_request(request, None, None, 0, queue)
    if whole:
        processor.request_states["one-1"].logprobs_processor = _KeepTensors(None, None, [], None, None, K)
    processor.process_outputs(
        [EngineCoreOutput("one-1", [42], new_prompt_logprobs_tensors=tensors(), finish_reason=FinishReason.LENGTH)]
    )
    assert not processor.request_states, "a request leaves the moment that it is answered"
    return queue.get_nowait().prompt_logprobs


def test_tensors_taken_whole_and_flat_logprobs_are_the_same_rows() -> None:
    from vllm.logprobs import FlatLogprobs

    from teachers.engines.vllm import _entries

    whole, flat = answered(whole=True), answered(whole=False)
    assert isinstance(flat, FlatLogprobs)
    assert (flat.start_indices[:3], flat.end_indices[:3]) == ([0, 0, K + 1], [0, K + 1, 2 * K + 2])
    for one, other in zip(_entries(whole, K + 1), _entries(flat, K + 1), strict=True):
        assert one.shape == (LENGTH - 1, K + 1)
        np.testing.assert_array_equal(one, other)


def test_the_actual_token_comes_first_and_is_listed_only_where_it_ranks() -> None:
    from teachers.engines.vllm import _entries, to_rows

    ids, logprobs = _entries(answered(whole=True), K + 1)
    rows = to_rows(ids, logprobs, 1)
    assert ids[:, 0].tolist() == [7, 8, 9, 10]
    np.testing.assert_array_equal(rows.actual, logprobs[:, 0])
    np.testing.assert_array_equal(rows.ids, ids[:, 1:])
    np.testing.assert_allclose(rows.tail, 1 - np.exp(rows.logprobs.astype(float)).sum(axis=1), atol=1e-7)


def test_no_probability_at_all_is_the_least_that_the_wire_can_say() -> None:
    from teachers.engines.vllm import to_rows

    entries = np.array([[-np.inf, -0.5, -1.0, -np.inf]], np.float32)
    rows = to_rows(np.array([[9, 1, 2, 3]], np.int32), entries, 1)
    assert rows.actual[0] == rows.logprobs[0, 2] == np.float32(np.float16(rows.actual[0])) == -65504
    assert rows.tail[0] == pytest.approx(1 - np.exp(-0.5) - np.exp(-1.0))


@pytest.mark.parametrize("wrong", [np.nan, 0.5, -0.1])
def test_more_than_all_probability_goes_to_the_client_which_refuses_it(wrong: float) -> None:
    from teachers.engines.vllm import to_rows

    entries = np.array([[-2.0, -0.7, -1.2, -3.0], [-2.0, wrong, -1.0, -3.0]], np.float32)
    rows = to_rows(np.array([[9, 1, 2, 3]] * 2, np.int32), entries, 7)
    with pytest.raises(InvalidRows, match="position 8"):
        as_received(rows, [9] * 9, CARD)


def test_the_engine_client_takes_what_we_give_it() -> None:
    from vllm.engine.protocol import EngineClient
    from vllm.inputs import tokens_input
    from vllm.v1.engine.async_llm import AsyncLLM

    assert issubclass(AsyncLLM, EngineClient)
    inspect.signature(AsyncLLM.add_request).bind(None, "id", tokens_input([1, 2]), None)
    inspect.signature(EngineClient.generate).bind(None, tokens_input([1, 2]), None, "id")
    inspect.signature(EngineClient.abort).bind(None, "id")
    inspect.signature(EngineClient.check_health).bind(None)
    inspect.signature(AsyncLLM.shutdown).bind(None, timeout=1.0)
    assert inspect.iscoroutinefunction(AsyncLLM.add_request)
    assert inspect.isasyncgenfunction(AsyncLLM.generate)


def test_engine_arguments_are_ours_then_the_users(tiny_byte_level: Path) -> None:
    from teachers.engines.vllm import engine_args

    args = engine_args(tiny_byte_level, EngineOptions(max_tokens=99, tensor_parallel=2))
    assert (args.max_model_len, args.max_logprobs, args.tensor_parallel_size) == (100, 128, 2)
    assert args.enable_prefix_caching is False
    args = engine_args(tiny_byte_level, EngineOptions(vllm_args={"max_logprobs": 7, "seed": 3}))
    assert (args.max_logprobs, args.seed, args.max_model_len) == (7, 3, None)


def test_an_argument_that_vllm_does_not_know_is_one_sentence(tiny_byte_level: Path) -> None:
    with pytest.raises(TeacherError, match="nonsense"):
        asyncio.run(open_engine("vllm", tiny_byte_level, EngineOptions(vllm_args={"nonsense": 1})))


@pytest.mark.parametrize(
    ("mode", "most", "says"), [("raw_logits", 20, "logprobs-mode"), ("raw_logprobs", 0, "max-logprobs")]
)
def test_a_server_whose_answers_are_no_log_probabilities_is_refused(mode: str, most: int, says: str) -> None:
    from teachers.engines.vllm import VllmEngine

    client: Any = SimpleNamespace(model_config=SimpleNamespace(logprobs_mode=mode, max_logprobs=most))
    with pytest.raises(TeacherError, match=says):
        asyncio.run(VllmEngine.over(client))


def test_a_name_that_no_cache_holds_is_one_sentence() -> None:
    from teachers.engines.vllm import model_folder

    for name in ("nobody/nothing", "no such name"):
        with pytest.raises(TeacherError, match="serve a directory"):
            model_folder(name, None)


def test_the_plugin_is_what_vllm_expects() -> None:
    from vllm.plugins import ENDPOINT_PLUGINS_GROUP
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    plugin = TutelagePlugin()
    assert isinstance(plugin, EndpointPlugin)
    for name in ("attach_router", "init_state"):
        ours, theirs = (list(inspect.signature(getattr(c, name)).parameters) for c in (TutelagePlugin, EndpointPlugin))
        assert ours == theirs
    found = {e.name: e for e in entry_points(group=ENDPOINT_PLUGINS_GROUP)}
    assert found["tutelage"].load() is TutelagePlugin


def test_a_server_without_an_engine_is_no_teacher() -> None:
    with pytest.raises(TeacherError, match="no engine"):
        asyncio.run(TutelagePlugin().init_state(None, None, SimpleNamespace()))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["[1]", "{", "seed=3"])
def test_arguments_for_vllm_that_are_no_json_object_are_one_sentence(text: str) -> None:
    done = CliRunner().invoke(app, ["teach", "nowhere", "--engine", "vllm", "--vllm-args", text])
    assert done.exit_code == 1
    assert "--vllm-args: expected a JSON object" in done.output


def test_a_server_without_a_limit_answers_the_whole_vocabulary() -> None:
    from teachers.engines.vllm import most_top_k

    assert [most_top_k(n, 1000) for n in (-1, 64, 5000)] == [1000, 64, 1000]


def test_a_dead_engine_is_dead_to_who_only_asks_whether_it_lives() -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    from teachers.engines.vllm import VllmEngine

    async def check_health() -> None:
        raise EngineDeadError

    client: Any = SimpleNamespace(check_health=check_health)
    with pytest.raises(EngineDead, match="restart this server"):
        asyncio.run(VllmEngine(client, CARD, {}, owned=False).check())
