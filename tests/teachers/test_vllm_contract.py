"""Everything that this project uses of vLLM: an incompatible upgrade fails here. No engine is started."""

import asyncio
import inspect
import pkgutil
import time
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.routing import APIRoute
from typer.testing import CliRunner

from teachers.client.rollout_completions import MAX_BANNED_IDS
from teachers.engines.rollout_worker import NOT_LOADED, RELOAD_LOGGER, RolloutWorker
from teachers.engines.vllm_options import VllmOptions
from teachers.protocol.errors import EngineDead, InvalidRows, TeacherError
from teachers.protocol.wire_format import as_received
from teachers.server.rollout_options import RolloutServerOptions, vllm_arguments
from teachers.server.vllm_plugin import TutelagePlugin
from tests.needs import need
from tests.teachers.test_protocol import CARD
from trainer.cli.__main__ import app

pytestmark = pytest.mark.slow

LENGTH, K = 5, 3


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    need("vllm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, and those of what it imports
        import teachers.engines.vllm  # noqa: F401


def tensors() -> Any:
    """Return prompt log-probabilities as the engine's process sends them: the actual token, then the top K."""
    from vllm.v1.outputs import LogprobsTensors

    logprobs = torch.randn(LENGTH - 1, 100, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    actual = torch.tensor([[7], [8], [9], [10]])
    top = logprobs.topk(K)
    return LogprobsTensors(
        logprob_token_ids=torch.cat([actual, top.indices], 1).int(),
        logprobs=torch.cat([logprobs.gather(1, actual), top.values], 1),
        selected_token_ranks=torch.ones(LENGTH - 1, dtype=torch.int32),
    )


def prompt_logprobs(collected: bool) -> Any:
    """Return RequestOutput.prompt_logprobs of vLLM's output processor, with _TensorCollector or vLLM's collector."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    from teachers.engines.vllm import _TensorCollector

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
    if collected:
        processor.request_states["one-1"].logprobs_processor = _TensorCollector(None, None, [], None, None, K)
    processor.process_outputs(
        [EngineCoreOutput("one-1", [42], new_prompt_logprobs_tensors=tensors(), finish_reason=FinishReason.LENGTH)]
    )
    assert not processor.request_states, "a finished request is removed at once"
    return queue.get_nowait().prompt_logprobs


def test_collected_tensors_and_flat_logprobs_are_the_same_rows() -> None:
    from vllm.logprobs import FlatLogprobs

    from teachers.engines.vllm import _entries

    tensors_form, flat = prompt_logprobs(collected=True), prompt_logprobs(collected=False)
    assert isinstance(flat, FlatLogprobs)
    assert (flat.start_indices[:3], flat.end_indices[:3]) == ([0, 0, K + 1], [0, K + 1, 2 * K + 2])
    for one, other in zip(_entries(tensors_form, K + 1), _entries(flat, K + 1), strict=True):
        assert one.shape == (LENGTH - 1, K + 1)
        np.testing.assert_array_equal(one, other)


def test_the_actual_token_is_the_first_entry() -> None:
    from teachers.engines.vllm import _entries, to_rows

    ids, logprobs = _entries(prompt_logprobs(collected=True), K + 1)
    rows = to_rows(ids, logprobs, 1)
    assert ids[:, 0].tolist() == [7, 8, 9, 10]
    np.testing.assert_array_equal(rows.actual, logprobs[:, 0])
    np.testing.assert_array_equal(rows.ids, ids[:, 1:])
    np.testing.assert_allclose(rows.tail, 1 - np.exp(rows.logprobs.astype(float)).sum(axis=1), atol=1e-7)


def test_a_probability_of_0_is_the_least_logprob_of_the_wire() -> None:
    from teachers.engines.vllm import to_rows

    entries = np.array([[-np.inf, -0.5, -1.0, -np.inf]], np.float32)
    rows = to_rows(np.array([[9, 1, 2, 3]], np.int32), entries, 1)
    assert rows.actual[0] == rows.logprobs[0, 2] == np.float32(np.float16(rows.actual[0])) == -65504
    assert rows.tail[0] == pytest.approx(1 - np.exp(-0.5) - np.exp(-1.0))


@pytest.mark.parametrize("wrong", [np.nan, 0.5, -0.1])
def test_invalid_mass_is_left_to_the_client_which_rejects_it(wrong: float) -> None:
    from teachers.engines.vllm import to_rows

    entries = np.array([[-2.0, -0.7, -1.2, -3.0], [-2.0, wrong, -1.0, -3.0]], np.float32)
    rows = to_rows(np.array([[9, 1, 2, 3]] * 2, np.int32), entries, 7)
    with pytest.raises(InvalidRows, match="position 8"):
        as_received(rows, [9] * 9, CARD)


def test_the_engine_client_accepts_the_arguments_of_the_engine() -> None:
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


def test_vllm_args_override_the_engine_arguments(tiny_byte_level: Path) -> None:
    from teachers.engines.vllm import engine_args

    args = engine_args(tiny_byte_level, VllmOptions(max_tokens=99, tensor_parallel=2))
    assert (args.max_model_len, args.max_logprobs, args.tensor_parallel_size) == (100, 128, 2)
    assert args.enable_prefix_caching is False
    args = engine_args(tiny_byte_level, VllmOptions(vllm_args={"max_logprobs": 7, "seed": 3}))
    assert (args.max_logprobs, args.seed, args.max_model_len) == (7, 3, None)


def test_an_unknown_vllm_argument_is_one_sentence(tiny_byte_level: Path) -> None:
    with pytest.raises(TeacherError, match="nonsense"):
        asyncio.run(VllmOptions(vllm_args={"nonsense": 1}).open(tiny_byte_level))


@pytest.mark.parametrize(
    ("mode", "most", "message"), [("raw_logits", 20, "logprobs-mode"), ("raw_logprobs", 0, "max-logprobs")]
)
def test_a_server_without_log_probabilities_is_rejected(mode: str, most: int, message: str) -> None:
    from teachers.engines.vllm import VllmEngine

    client: Any = SimpleNamespace(model_config=SimpleNamespace(logprobs_mode=mode, max_logprobs=most))
    with pytest.raises(TeacherError, match=message):
        asyncio.run(VllmEngine.wrap(client))


def test_a_model_name_outside_the_hub_cache_is_one_sentence() -> None:
    from teachers.engines.vllm import snapshot_dir

    for name in ("nobody/nothing", "no such name"):
        with pytest.raises(TeacherError, match="serve a directory"):
            snapshot_dir(name, None)


def test_the_plugin_implements_the_interface_of_vllm() -> None:
    from vllm.plugins import ENDPOINT_PLUGINS_GROUP
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    plugin = TutelagePlugin()
    assert isinstance(plugin, EndpointPlugin)
    for name in ("attach_router", "init_state"):
        ours, theirs = (list(inspect.signature(getattr(c, name)).parameters) for c in (TutelagePlugin, EndpointPlugin))
        assert ours == theirs
    found = {e.name: e for e in entry_points(group=ENDPOINT_PLUGINS_GROUP)}
    assert found["tutelage"].load() is TutelagePlugin


def test_a_server_without_an_engine_is_rejected() -> None:
    with pytest.raises(TeacherError, match="no engine"):
        asyncio.run(TutelagePlugin().init_state(None, None, SimpleNamespace()))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["[1]", "{", "seed=3"])
def test_vllm_args_that_are_no_json_object_are_one_sentence(text: str) -> None:
    done = CliRunner().invoke(app, ["serve", "nowhere", "--engine", "vllm", "--vllm-args", text])
    assert done.exit_code == 1
    assert "--vllm-args: expected a JSON object" in done.output


def test_a_server_without_a_logprobs_limit_returns_the_whole_vocabulary() -> None:
    from teachers.engines.vllm import largest_top_k

    assert [largest_top_k(n, 1000) for n in (-1, 64, 5000)] == [1000, 64, 1000]


def test_a_check_of_a_dead_engine_raises_engine_dead() -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    from teachers.engines.vllm import VllmEngine

    async def check_health() -> None:
        raise EngineDeadError

    client: Any = SimpleNamespace(check_health=check_health)
    with pytest.raises(EngineDead, match="restart this server"):
        asyncio.run(VllmEngine(client, CARD, {}, owned=False).check())


# --- rollout servers ---


def test_vllm_has_all_flags_of_a_rollout_server(tiny_byte_level: Path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = RolloutServerOptions(VllmOptions(max_tokens=99), Path("/sync"))
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(vllm_arguments(tiny_byte_level, options))
    assert (args.max_model_len, args.logprobs_mode, args.generation_config) == (99, "raw_logprobs", "vllm")
    assert args.enable_prefix_caching is True
    assert pkgutil.resolve_name(args.worker_extension_cls.replace(".RolloutWorker", ":RolloutWorker")) is RolloutWorker


def test_the_worker_of_vllm_has_what_the_rollout_worker_uses_and_none_of_its_names() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    inspect.signature(Worker.reload_weights).bind(None, weights_iterator=iter(()))
    inspect.signature(GPUModelRunner.reload_weights).bind(None, weights_iterator=iter(()))
    names = [name for name in dir(RolloutWorker) if not name.startswith("__")]
    assert sorted(names) == ["discard_rollout_weights", "load_rollout_weights", "read_rollout_weights"]
    assert not [name for name in names if hasattr(Worker, name)]


def test_vllm_warns_of_parameters_that_were_not_loaded_in_the_words_that_the_worker_looks_for() -> None:
    from vllm.model_executor.model_loader.reload import inplace

    assert inplace.logger.name == RELOAD_LOGGER
    assert f'logger.warning(\n                "{NOT_LOADED}' in inspect.getsource(inplace.reload_weights)


def test_the_gpu_runner_accepts_as_many_banned_ids_as_the_client_sends() -> None:
    from vllm.v1.worker.gpu.sample.logit_bias import MAX_NUM_LOGIT_BIAS_TOKENS

    assert MAX_BANNED_IDS <= MAX_NUM_LOGIT_BIAS_TOKENS


def test_a_rollout_server_has_other_routes_than_a_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def paths() -> set[str]:
        fastapi = FastAPI()
        TutelagePlugin().attach_router(fastapi)
        return {route.path for route in fastapi.routes if isinstance(route, APIRoute)}

    assert "/v1/score" in paths()
    monkeypatch.setenv("TUTELAGE_SYNC_DIR", str(tmp_path))
    assert paths() == {"/v1/rollouts/version", "/v1/rollouts/weights"}
