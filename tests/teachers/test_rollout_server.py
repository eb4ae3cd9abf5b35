"""The client of a rollout server against its routes and its worker class, over HTTP."""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from safetensors.torch import load_file
from torch import Tensor

from teachers.client.rollout_completions import GenerationRequest
from teachers.client.rollout_server import RolloutServer
from teachers.protocol.errors import Conflict, ProtocolError, Rejected, TeacherError, Unauthorized, Unavailable
from teachers.protocol.rollouts import WEIGHTS_HEADER, SyncRequest, WeightsVersion
from teachers.server.rollouts import Weights, allowed_folder
from teachers.sync_folder import write_sync_folder
from tests.rollout_servers import LocalRolloutServer, completion
from tests.serve import serving_app
from tests.tiny import save_tiny_model

T = TypeVar("T")
PROMPT = GenerationRequest([5, 6, 7], max_new_tokens=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


@pytest.fixture
def local(model: Path, tmp_path: Path) -> LocalRolloutServer:
    (tmp_path / "sync").mkdir()
    return LocalRolloutServer(model, tmp_path / "sync", num_workers=2)


@pytest.fixture
def url(local: LocalRolloutServer) -> Iterator[str]:
    with local.serving() as url:
        yield url


@pytest.fixture
def folder(local: LocalRolloutServer, weights: dict[str, Tensor]) -> Path:
    """Weights below the allowed directory."""
    write_sync_folder(weights, local.weights.sync_dir / "v1")
    return local.weights.sync_dir / "v1"


def call(url: str, do: Callable[[RolloutServer], Awaitable[T]]) -> T:
    async def run() -> T:
        server = RolloutServer(url)
        try:
            return await do(server)
        finally:
            await server.aclose()

    return asyncio.run(run())


def test_a_new_server_has_no_version_and_a_synchronized_one_has_that_of_the_request(
    local: LocalRolloutServer, url: str, folder: Path, weights: dict[str, Tensor]
) -> None:
    async def sync(server: RolloutServer) -> list[int | None]:
        await server.ping()
        before = await server.version()
        await server.sync(folder, 7)
        return [before, await server.version()]

    assert call(url, sync) == [None, 7]
    for worker in local.workers:
        assert worker.loaded.keys() == weights.keys() | {"lm_head.weight"}
        assert torch.equal(worker.loaded["model.norm.weight"], weights["model.norm.weight"].bfloat16())
        assert worker.rollout_weights is None


def test_refused_weights_are_loaded_by_no_worker_and_released(
    local: LocalRolloutServer, url: str, folder: Path, model: Path, tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", head_dim=16)
    local.workers[1].vllm_config.model_config.model = str(other)  # the second worker refuses what the first accepts
    with pytest.raises(Rejected, match=r"rollout server of student at http.*k_proj.* has shape .* are unchanged"):
        call(url, lambda server: server.sync(folder, 1))
    assert [worker.loaded for worker in local.workers] == [{}, {}]
    assert [worker.rollout_weights for worker in local.workers] == [None, None]
    assert call(url, lambda server: server.version()) is None


def test_a_worker_that_fails_while_it_loads_leaves_damaged_weights_until_the_next_synchronization(
    local: LocalRolloutServer, url: str, folder: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    async def run(server: RolloutServer) -> None:
        await server.sync(folder, 1)
        local.workers[1].on_load = fail
        with pytest.raises(Unavailable, match=r"loading failed \(out of memory\)"):
            await server.sync(folder, 2)
        for version in (1, 2, None):
            with pytest.raises(Unavailable, match="its weights are damaged: synchronize it"):
                await server.generate(PROMPT, version=version)
            with pytest.raises(Unavailable, match="its weights are damaged: synchronize it"):
                await server.probe([5, 6], version=version)
        local.workers[1].on_load = lambda: None
        await server.sync(folder, 3)
        assert (await server.generate(PROMPT, version=3)).version == 3

    call(url, run)


def test_a_damaged_server_refuses_everything_that_could_use_its_weights(
    local: LocalRolloutServer, url: str, folder: Path
) -> None:
    tag = local.weights.current.tag
    local.weights.current = WeightsVersion(version=None, is_damaged=True)
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/models", "/invocations"):
        for headers in ({}, {WEIGHTS_HEADER: tag}, {WEIGHTS_HEADER: "damaged"}):
            received = httpx.post(url + path, json={"prompt": [1]}, headers=headers)
            assert (received.status_code, received.json()["title"]) == (503, "Weights damaged"), path
    assert [httpx.get(url + path).status_code for path in ("/health", "/v1/rollouts/version")] == [200, 200]

    async def run(server: RolloutServer) -> None:
        server._weights = WeightsVersion(version=None)  # of the time before the damage
        with pytest.raises(Unavailable, match="synchronize the server or restart it"):
            await server.generate(PROMPT, version=None)
        await server.sync(folder, 3)
        await server.generate(PROMPT, version=3)

    call(url, run)


def test_weights_that_are_damaged_while_a_text_is_written_make_the_server_unavailable(
    local: LocalRolloutServer, url: str
) -> None:
    def complete(body: dict[str, Any]) -> Any:
        local.weights.current = WeightsVersion(version=None, is_damaged=True)
        return completion(body, [3], [-1.0], prompt_logprobs=[None, {"6": {"logprob": -1.0}}])

    local.complete = complete
    for do in (lambda s: s.generate(PROMPT, version=None), lambda s: s.probe([5, 6], version=None)):
        local.weights.current = WeightsVersion(version=None)
        with pytest.raises(Unavailable, match="its weights are damaged"):
            call(url, do)


def test_an_interrupted_load_leaves_damaged_weights(local: LocalRolloutServer, folder: Path) -> None:
    async def interrupted(method: str, *arguments: Any) -> list[Any]:
        if method == "load_rollout_weights":
            raise asyncio.CancelledError
        return [None]

    local.weights.call = interrupted
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(local.weights.sync(SyncRequest(version=1, path=str(folder), digest=digest)))
    assert local.weights.current.is_damaged


def test_a_worker_that_raises_while_it_reads_leaves_the_weights_and_releases_what_was_read(
    local: LocalRolloutServer, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("connection lost")

    monkeypatch.setattr(local.workers[1], "read_rollout_weights", fail)
    local.workers[1].rollout_weights = None
    with pytest.raises(Unavailable, match=r"reading failed \(connection lost\); the weights are unchanged"):
        call(url, lambda server: server.sync(folder, 1))
    assert [worker.rollout_weights for worker in local.workers] == [None, None]
    assert call(url, lambda server: server.version()) is None
    assert not local.weights.current.is_damaged


def test_an_error_of_any_class_while_a_worker_reads_is_one_sentence(
    local: LocalRolloutServer, url: str, folder: Path
) -> None:
    local.workers[1].vllm_config = None
    with pytest.raises(Rejected, match=r"the weights cannot be read \(AttributeError: .*; the weights are unchanged"):
        call(url, lambda server: server.sync(folder, 1))
    assert [worker.rollout_weights for worker in local.workers] == [None, None]


def test_parameters_that_vllm_does_not_load_are_an_error(
    local: LocalRolloutServer, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.inplace")
    monkeypatch.setattr(logger, "level", logging.ERROR)  # like VLLM_LOGGING_LEVEL=ERROR
    local.workers[0].on_load = lambda: logger.warning("Following weights were not loaded from checkpoint: %s", {"a.b"})
    with pytest.raises(Unavailable, match=r"loading failed \(Following weights were not loaded from .*'a\.b'"):
        call(url, lambda server: server.sync(folder, 1))
    assert local.weights.current.is_damaged
    assert (logger.handlers, logger.level) == ([], logging.ERROR)
    local.workers[0].on_load = lambda: logger.warning("another message")
    call(url, lambda server: server.sync(folder, 2))


def test_two_synchronizations_at_once_follow_one_another(
    local: LocalRolloutServer, url: str, folder: Path, weights: dict[str, Tensor]
) -> None:
    other = folder.with_name("v2")
    write_sync_folder({name: weight + 1 for name, weight in weights.items()}, other)

    async def run(server: RolloutServer) -> int | None:
        await asyncio.gather(server.sync(folder, 1), server.sync(other, 2))
        return await server.version()

    version = call(url, run)
    first, second = (worker.loaded["model.norm.weight"] for worker in local.workers)
    assert torch.equal(first, second)
    assert torch.equal(first, weights["model.norm.weight"].bfloat16() + (version == 2))


# --- the folder ---


def test_folders_outside_of_the_allowed_directory_are_refused_whether_they_exist_or_not(
    local: LocalRolloutServer, url: str, folder: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    folder.rename(outside)
    (local.weights.sync_dir / "link").symlink_to(outside)
    (local.weights.sync_dir / "loop").symlink_to(local.weights.sync_dir / "loop")
    paths = [
        outside,
        tmp_path / "nothing",
        tmp_path / ("x" * 300),
        local.weights.sync_dir,
        local.weights.sync_dir / "link",
        Path("v1"),
    ]
    paths += [local.weights.sync_dir / ".." / "outside", local.weights.sync_dir / ".." / "sync" / "v1", Path("/")]
    paths += [local.weights.sync_dir / "loop", local.weights.sync_dir / ("x" * 300)]
    for path in paths:
        received = post(url, path=str(path))
        assert (received.status_code, received.json()["title"]) == (403, "Outside of --sync-dir"), path
    assert [worker.loaded for worker in local.workers] == [{}, {}]


def test_the_client_names_the_allowed_directory_and_not_the_key(url: str, folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "outside")
    with pytest.raises(Rejected, match=r"^rollout server of student at [^ ]+: expected a folder below") as raised:
        call(url, lambda server: server.sync(tmp_path / "outside", 1))
    assert not isinstance(raised.value, Unauthorized)


def test_a_missing_or_empty_folder_and_a_file_are_refused(local: LocalRolloutServer, url: str, folder: Path) -> None:
    (folder.parent / "empty").mkdir()
    for path, reason in [
        (folder.parent / "nothing", "not a folder"),
        (folder / "model.safetensors", "not a folder"),
        (folder.parent / "empty", "manifest.json cannot be read: No such file"),
    ]:
        received = post(url, path=str(path))
        assert received.status_code == 422
        assert reason in received.json()["detail"]
        assert received.headers["content-type"] == "application/problem+json"
    with pytest.raises(OSError, match=r"manifest\.json"):
        call(url, lambda server: server.sync(folder.parent / "empty", 1))


def post(url: str, **fields: Any) -> httpx.Response:
    body = {"version": 1, "path": "/nowhere", "digest": "0" * 64} | fields
    return httpx.post(f"{url}/v1/rollouts/weights", json=body, timeout=60)


@pytest.mark.parametrize(
    "fields",
    [{"version": -1}, {"version": "1"}, {"version": True}, {"path": ""}, {"digest": "abc"}, {"more": 1}],
)
def test_malformed_requests_are_problems(url: str, fields: dict[str, Any]) -> None:
    received = post(url, **fields)
    assert (received.status_code, received.json()["title"]) == (422, "Malformed")


def test_requests_that_are_no_json_or_too_large_are_problems(url: str) -> None:
    for content, media_type, status in [
        (b"{}", "text/plain", 415),
        (b"{", "application/json", 422),
        (b"[" * 20_000, "application/json", 413),
    ]:
        headers = {"content-type": media_type}
        assert httpx.post(f"{url}/v1/rollouts/weights", content=content, headers=headers).status_code == status


def test_a_path_with_a_null_byte_is_refused(url: str, folder: Path) -> None:
    assert post(url, path=f"{folder}\0").status_code == 403


# --- texts ---


def test_a_request_names_the_weights_and_uses_them_as_the_salt_of_the_prefix_cache(
    local: LocalRolloutServer, url: str, folder: Path
) -> None:
    bodies = list[dict[str, Any]]()

    def complete(body: dict[str, Any]) -> Any:
        bodies.append(body)
        return completion(body, [3, 1], [-1.5, -0.25])

    async def run(server: RolloutServer) -> None:
        first = await server.generate(PROMPT, version=None)
        await server.sync(folder, 4)
        second = await server.generate(PROMPT, version=4)
        assert [(t.version, t.last_version) for t in (first, second)] == [(None, None), (4, 4)]
        assert (second.ids, second.logprobs.tolist(), second.finish) == ([3, 1], [-1.5, -0.25], "eos")

    local.complete = complete
    call(url, run)
    base, salt = (body["cache_salt"] for body in bodies)
    assert base == "base"
    assert salt.startswith("4-")
    assert salt == local.weights.current.tag


def test_other_weights_of_the_same_version_have_another_salt(
    local: LocalRolloutServer, url: str, folder: Path, weights: dict[str, Tensor]
) -> None:
    async def run(server: RolloutServer) -> None:
        await server.sync(folder, 4)

    call(url, run)
    first = local.weights.current.tag
    write_sync_folder({name: weight + 1 for name, weight in weights.items()}, folder)
    call(url, run)
    assert local.weights.current.tag != first
    assert local.weights.current.version == 4


def test_a_restarted_server_writes_nothing_until_it_is_synchronized(
    model: Path, local: LocalRolloutServer, folder: Path
) -> None:
    async def run(server: RolloutServer) -> None:
        await server.sync(folder, 4)
        local.weights.current = local.weights.current.model_copy(update={"version": None, "digest": None})
        for _ in range(2):  # the first one is refused by the server, the second one by the client
            with pytest.raises(Conflict, match=r"expected the weights .*4.*, .*server has base"):
                await server.generate(PROMPT, version=4)
        await server.sync(folder, 4)
        await server.generate(PROMPT, version=4)

    with local.serving() as url:
        call(url, run)


def test_a_client_that_did_not_synchronize_learns_the_weights_from_the_server(
    local: LocalRolloutServer, url: str, folder: Path
) -> None:
    async def run(server: RolloutServer) -> None:
        other = RolloutServer(url)
        await other.sync(folder, 4)
        assert (await server.generate(PROMPT, version=4)).version == 4
        await other.sync(folder, 5)
        assert (await server.generate(PROMPT, version=5)).version == 5
        await other.aclose()

    call(url, run)


def test_a_client_learns_of_other_weights_of_the_same_version_by_one_conflict(
    local: LocalRolloutServer, url: str, folder: Path, weights: dict[str, Tensor]
) -> None:
    async def run(server: RolloutServer) -> None:
        other = RolloutServer(url)
        await server.sync(folder, 4)
        await asyncio.to_thread(write_sync_folder, {name: weight + 1 for name, weight in weights.items()}, folder)
        await other.sync(folder, 4)
        with pytest.raises(Conflict, match="expected the weights 4-"):
            await server.generate(PROMPT, version=4)
        assert (await server.generate(PROMPT, version=4)).version == 4
        await other.aclose()

    call(url, run)


def test_a_text_during_whose_generation_the_weights_change_has_two_versions(
    local: LocalRolloutServer, url: str, folder: Path
) -> None:
    def complete(body: dict[str, Any]) -> Any:
        local.weights.current = local.weights.current.model_copy(update={"version": 5})
        return completion(body, [3], [-1.0])

    async def run(server: RolloutServer) -> None:
        await server.sync(folder, 4)
        local.complete = complete
        tokens = await server.generate(PROMPT, version=4)
        assert (tokens.version, tokens.last_version) == (4, 5)

    call(url, run)


def test_a_probe_is_of_the_requested_weights_from_its_start_to_its_end(
    local: LocalRolloutServer, url: str, folder: Path
) -> None:
    def complete(body: dict[str, Any]) -> Any:
        if replaced:
            local.weights.current = local.weights.current.model_copy(update={"version": 5})
        return completion(body, [3], [-1.0], prompt_logprobs=[None, {"6": {"logprob": -1.5}}])

    async def run(server: RolloutServer) -> None:
        await server.sync(folder, 4)
        assert (await server.probe([5, 6], version=4)).tolist() == [-1.5]
        with pytest.raises(Conflict, match="expected the weights version 3, the server has 4-"):
            await server.probe([5, 6], version=3)
        replaced.append(True)
        with pytest.raises(Conflict, match="its weights 4-.* were replaced by 5-"):
            await server.probe([5, 6], version=4)
        local.weights.current = WeightsVersion(version=None)  # a restart that the client does not know of
        with pytest.raises(Conflict, match="the server has base"):
            await server.probe([5, 6], version=5)

    replaced = list[bool]()
    local.complete = complete
    call(url, run)


@pytest.mark.parametrize("tag", [None, "", "7", "-1-0123456789abcdef", "7-xyz"])
def test_a_response_without_a_valid_tag_is_an_error(tag: str | None) -> None:
    app = FastAPI()

    @app.get("/v1/rollouts/version")
    async def version() -> WeightsVersion:
        return WeightsVersion(version=None)

    @app.post("/v1/completions")
    async def completions(request: Request) -> JSONResponse:
        prompt_logprobs = [None, {"6": {"logprob": -1.0}}]
        body = completion(await request.json(), [3], [-1.0], prompt_logprobs=prompt_logprobs)
        return JSONResponse(body, headers={} if tag is None else {WEIGHTS_HEADER: tag})

    with serving_app(app) as url:
        for do in (lambda s: s.generate(PROMPT, version=None), lambda s: s.probe([5, 6], version=None)):
            with pytest.raises(ProtocolError, match="expected the tag of weights in tutelage-weights"):
                call(url, do)


def test_a_directory_that_is_reached_by_a_link_and_paths_with_dots_are_allowed(
    local: LocalRolloutServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(local.weights.sync_dir)
    for sync_dir in (Path("link"), Path("sync"), Path("sync/../sync")):
        weights = Weights(sync_dir)
        for path in (folder, tmp_path / "link" / "v1"):
            assert allowed_folder(str(path), weights.sync_dir) == folder.resolve()
    with local.serving() as url:
        call(url, lambda server: server.sync(Path("sync/../link/v1"), 3))


def test_requests_without_the_header_are_served_with_any_weights(url: str) -> None:
    received = httpx.post(f"{url}/v1/completions", json={"prompt": [1]})
    assert received.status_code == 200
    assert received.headers[WEIGHTS_HEADER] == "base"


def test_a_server_that_confirms_other_weights_is_an_error(
    local: LocalRolloutServer, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def confirm_other(_: object) -> object:
        return local.weights.current

    monkeypatch.setattr(local.weights, "sync", confirm_other)
    with pytest.raises(ProtocolError, match="expected the weights of version 4, received base"):
        call(url, lambda server: server.sync(folder, 4))


def test_an_address_that_is_none_names_the_rollout_server() -> None:
    with pytest.raises(TeacherError, match="rollout server of student: 'serve://x' is not an address"):
        RolloutServer("serve://x")
