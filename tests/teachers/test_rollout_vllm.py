"""Rollout servers with real vLLM on a CPU. Three starts: two models with a tied head, and one without."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment import Vocabulary
from teachers.client.rollout_completions import GeneratedTokens, GenerationRequest
from teachers.client.rollout_server import RolloutServer
from teachers.protocol.errors import Conflict, Rejected, Unauthorized
from teachers.sync_folder import write_sync_folder
from tests.needs import need
from tests.teachers.test_sync_folder import QUERY, cut, rewrite
from tests.tiny import TEXT, save_tiny_model
from tests.vllm_server import KEY, rollout_server

pytestmark = pytest.mark.slow

T = TypeVar("T")
Logprobs = NDArray[np.float32]
MAX_TOKENS = 480
EXACT = 1e-3  # nats: between equal weights
NOISE = 0.15  # nats: largest rounding of bfloat16 in these models, by kernels for other batches or in transformers


class Served(NamedTuple):
    """A server, the models with whose weights it can be synchronized, and what it returned before."""

    url: str
    sync_dir: Path
    models: list[Path]
    ids: list[int]
    fresh: Logprobs
    """Log-probabilities of `ids` with the weights of models[0], before any synchronization."""


def call(url: str, do: Callable[[RolloutServer], Awaitable[T]], key: str = KEY) -> T:
    async def run() -> T:
        server = RolloutServer(url, key)
        try:
            return await do(server)
        finally:
            await server.aclose()

    return asyncio.run(run())


def save_models(folder: Path, tied: bool) -> list[Path]:
    """Save three models with other weights, in bfloat16, and the folders sync/0, sync/1 and sync/2 of their weights."""
    models = []
    for n in range(3):
        model = save_tiny_model(folder / f"model-{n}", seed=n, head_dim=32, tied=tied, dtype=torch.bfloat16)
        write_sync_folder(load_file(model / "model.safetensors"), folder / "sync" / str(n))
        models.append(model)
    return models


def text_ids(model: Path, num: int) -> list[int]:
    return [int(token) for token in Vocabulary.load(model).encode(TEXT).ids[:num]]


def probe(url: str, ids: list[int]) -> Logprobs:
    """Return log-probabilities with the current weights, whatever they are."""

    async def run(server: RolloutServer) -> Logprobs:
        return await server.probe(ids, await server.version())

    return call(url, run)


def sync(served: Served, n: int, version: int) -> None:
    call(served.url, lambda server: server.sync(served.sync_dir / str(n), version))


def distance(one: Logprobs, other: Logprobs) -> float:
    return float(np.abs(one - other).max())


def with_transformers(model: Path, ids: list[int]) -> Logprobs:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logprobs_TV = loaded(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return np.asarray(logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy(), np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server on the tied model 0."""
    need("vllm")
    folder = tmp_path_factory.mktemp("tied")
    models = save_models(folder, tied=True)
    ids = text_ids(models[0], 240)
    with rollout_server(models[0], folder / "sync", MAX_TOKENS) as url:
        yield Served(url, folder / "sync", models, ids, probe(url, ids))


def test_a_started_server_has_no_version_and_writes_with_the_weights_of_its_directory(server: Served) -> None:
    request = GenerationRequest(server.ids[:20], max_new_tokens=5, seed=1)

    async def run(client: RolloutServer) -> None:
        await client.ping()
        assert await client.version() is None
        tokens = await client.generate(request, version=None)
        assert (tokens.version, tokens.last_version, len(tokens.ids)) == (None, None, 5)
        with pytest.raises(Conflict, match="expected the weights version 1, the server has base"):
            await client.generate(request, version=1)

    call(server.url, run)


def test_a_synchronized_tied_model_equals_a_fresh_server_on_the_same_weights(server: Served) -> None:
    with rollout_server(server.models[1], server.sync_dir, MAX_TOKENS) as url:
        fresh = probe(url, server.ids)
    assert distance(server.fresh, fresh) > 1
    for version, (n, expected) in enumerate([(1, fresh), (2, None), (1, fresh), (0, server.fresh)]):
        sync(server, n, version)
        received = probe(server.url, server.ids)
        assert call(server.url, lambda client: client.version()) == version
        assert distance(received, with_transformers(server.models[n], server.ids)) < NOISE
        if expected is not None:
            assert distance(received, expected) <= EXACT


def test_a_model_with_a_head_of_its_own_is_synchronized_twice_and_back(tmp_path: Path) -> None:
    need("vllm")
    models = save_models(tmp_path, tied=False)
    ids = text_ids(models[0], 240)
    with rollout_server(models[0], tmp_path / "sync", MAX_TOKENS) as url:
        server = Served(url, tmp_path / "sync", models, ids, probe(url, ids))
        for version, n in enumerate([1, 2, 0]):
            sync(server, n, version)
            received = probe(url, ids)
            assert distance(received, with_transformers(models[n], ids)) < NOISE
    assert distance(received, server.fresh) <= EXACT


def no_change(folder: Path) -> None:
    """Leave the folder as it is."""


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (cut, "broken", r"model\.safetensors is damaged"),
        (rewrite(lambda t: t.pop(QUERY)), "broken", f"{QUERY} is missing"),
        (rewrite(lambda t: t.update(extra=torch.ones(2))), "broken", "extra is unknown to the model"),
        (rewrite(lambda t: t.update({QUERY: t[QUERY][:7]})), "broken", f"{QUERY} has shape"),
        (rewrite(lambda t: t[QUERY].view(-1)[7].fill_(torch.nan)), "broken", f"{QUERY} has values that are NaN"),
        (no_change, "../outside", "expected a folder below"),
    ],
)
def test_a_broken_synchronization_is_refused_and_changes_nothing(
    server: Served, damage: Callable[[Path], object], name: str, message: str
) -> None:
    sync(server, 1, 41)
    before = probe(server.url, server.ids)
    folder = server.sync_dir / name
    write_sync_folder(load_file(server.models[2] / "model.safetensors"), folder)
    damage(folder)
    with pytest.raises(Rejected, match=message):
        call(server.url, lambda client: client.sync(folder, 42))
    assert call(server.url, lambda client: client.version()) == 41
    assert distance(probe(server.url, server.ids), before) == 0


def test_the_key_is_required_and_there_are_no_routes_of_the_development_mode(server: Served) -> None:
    assert httpx.get(f"{server.url}/v1/rollouts/version").status_code == 401
    assert httpx.post(f"{server.url}/v1/rollouts/weights", json={}).status_code == 401
    for do in (lambda c: c.version(), lambda c: c.sync(server.sync_dir / "1", 1), lambda c: c.probe([1, 2], None)):
        with pytest.raises(Unauthorized):
            call(server.url, do, key="another")
    headers = {"authorization": f"Bearer {KEY}"}
    for path in ("/collective_rpc", "/update_weights", "/pause", "/v1/score", "/v1/load_lora_adapter"):
        assert httpx.post(server.url + path, json={}, headers=headers).status_code == 404, path


# --- texts ---


def generate(server: Served, request: GenerationRequest, n: int = 1, version: int = 50) -> GeneratedTokens:
    async def run(client: RolloutServer) -> GeneratedTokens:
        await client.sync(server.sync_dir / str(n), version)
        return await client.generate(request, version=version)

    return call(server.url, run)


def only(server: Served, *allowed: int) -> list[int]:
    """Return all ids but these."""
    return sorted(set(range(len(Vocabulary.load(server.models[0])))) - set(allowed))


def test_log_probabilities_are_those_of_the_model_whatever_masks_and_temperature_are(server: Served) -> None:
    request = GenerationRequest(server.ids[:30], max_new_tokens=40, seed=3, num_top=16)
    banned = list(range(200))
    for changed in (request, replace(request, temperature=0.3, top_p=0.5), replace(request, banned_ids=banned)):
        tokens = generate(server, changed)
        received = probe(server.url, [*request.prompt_ids, *tokens.ids])[len(request.prompt_ids) - 1 :]
        assert distance(tokens.logprobs, received) < NOISE
        assert tokens.top_ids.shape == (len(tokens.ids), 16)
        assert (np.diff(tokens.top_logprobs, axis=1) <= 0).all()
        assert (tokens.top_ids < len(Vocabulary.load(server.models[0]))).all()
    assert min(tokens.ids) >= 200


def test_at_temperature_0_the_most_probable_ids_are_selected(server: Served) -> None:
    tokens = generate(server, GenerationRequest(server.ids[:30], max_new_tokens=30, temperature=0.0, num_top=1))
    np.testing.assert_array_equal(tokens.ids, tokens.top_ids[:, 0])
    np.testing.assert_array_equal(tokens.logprobs, tokens.top_logprobs[:, 0])


def test_the_seed_determines_a_text_that_is_written_alone(server: Served) -> None:
    request = GenerationRequest(server.ids[:30], max_new_tokens=20, seed=3)
    texts = [generate(server, changed).ids for changed in (request, request, replace(request, seed=4))]
    assert texts[0] == texts[1] != texts[2]


def test_eos_is_the_last_id_if_it_was_sampled_and_else_absent(server: Served) -> None:
    vocabulary = Vocabulary.load(server.models[0])
    eos = vocabulary.roles["eos"]
    assert eos is not None
    request = GenerationRequest(server.ids[:30], max_new_tokens=200, seed=1, banned_ids=only(server, 50, 51, eos))
    tokens = generate(server, request)
    assert tokens.finish == "eos"
    assert tokens.ids.index(eos) == len(tokens.ids) - 1
    tokens = generate(server, replace(request, banned_ids=only(server, 50, 51)))
    assert (tokens.finish, len(tokens.ids), set(tokens.ids)) == ("length", 200, {50, 51})


def test_stop_ids_and_stop_texts_end_a_text(server: Served) -> None:
    vocabulary = Vocabulary.load(server.models[0])
    a, b = (int(vocabulary.encode(letter).ids[0]) for letter in "ab")
    request = GenerationRequest(server.ids[:30], max_new_tokens=300, seed=1, banned_ids=only(server, a, b))
    tokens = generate(server, replace(request, stop_token_ids=[b]))
    assert (tokens.finish, tokens.ids.index(b)) == ("eos", len(tokens.ids) - 1)
    tokens = generate(server, replace(request, stop=["ab"]))
    assert tokens.finish == "stop"
    assert tokens.ids[-2:] == [a, b]
    assert "ab" not in "".join("ab"[token == b] for token in tokens.ids[:-1])


def test_a_prompt_that_leaves_no_room_is_rejected(server: Served) -> None:
    for num_prompt, max_new_tokens in ((MAX_TOKENS + 1, 1), (20, MAX_TOKENS + 1)):
        with pytest.raises(Rejected, match=str(MAX_TOKENS)):
            generate(server, GenerationRequest([5] * num_prompt, max_new_tokens=max_new_tokens))


def test_the_prefix_cache_of_earlier_weights_is_not_used(server: Served) -> None:
    """Blocks have 128 tokens on a CPU. A request with a constant salt shows that the cache would be used."""
    prompt = server.ids[:200]
    request = GenerationRequest(prompt, max_new_tokens=1, temperature=0.0)

    def first_logprob(n: int, version: int) -> tuple[float, float, float]:
        tokens = generate(server, request, n, version)
        constant = httpx.post(
            f"{server.url}/v1/completions",
            content=request.body("constant"),
            headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
            timeout=120,
        ).json()["choices"][0]
        expected = probe(server.url, [*prompt, *tokens.ids])[-1]
        stale = probe(server.url, [*prompt, *constant["token_ids"]])[-1]
        return (
            float(tokens.logprobs[0]),
            float(expected),
            abs(constant["logprobs"]["token_logprobs"][0] - float(stale)),
        )

    for version, n in enumerate([1, 2], 60):
        received, expected, difference = first_logprob(n, version)
        assert abs(received - expected) < NOISE
        assert version == 60 or difference > NOISE, "this test needs a prefix cache"


def write_texts(server: Served, client: RolloutServer, version: int) -> list["asyncio.Task[GeneratedTokens]"]:
    """Start to write 16 texts of 400 ids."""
    request = GenerationRequest(server.ids[:30], max_new_tokens=400, banned_ids=[1])
    return [asyncio.create_task(client.generate(request, version=version)) for _ in range(16)]


def test_texts_in_flight_end_normally_and_state_both_versions(server: Served) -> None:
    async def run(client: RolloutServer, delay_s: float) -> list[GeneratedTokens | BaseException]:
        await client.sync(server.sync_dir / "1", 70)
        writing = write_texts(server, client, 70)
        await asyncio.sleep(delay_s)
        await client.sync(server.sync_dir / "2", 71)
        return await asyncio.gather(*writing, return_exceptions=True)

    in_flight = list[GeneratedTokens]()
    for delay_s in (0.5, 0.2, 1.0, 2.0, 4.0):  # the time until the server has received the requests varies
        for text in call(server.url, partial(run, delay_s=delay_s)):
            assert isinstance(text, GeneratedTokens | Conflict)  # Conflict: the server received it after the weights
            if isinstance(text, GeneratedTokens):
                assert (text.version, len(text.ids), text.finish) == (70, 400, "length")
                in_flight += [text] if text.last_version == 71 else []
        if in_flight:
            break
    assert in_flight
    assert distance(probe(server.url, server.ids), with_transformers(server.models[2], server.ids)) < NOISE


def test_cancelled_requests_are_aborted_in_the_engine(server: Served) -> None:
    def num_finished() -> float:
        lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("vllm:request_success_total{"))

    async def run(client: RolloutServer) -> None:
        await client.sync(server.sync_dir / "1", 80)
        at_first, started = num_finished(), time.monotonic()
        await asyncio.gather(*write_texts(server, client, 80))
        whole_s = time.monotonic() - started
        assert num_finished() - at_first == 16
        writing = write_texts(server, client, 80)
        await asyncio.sleep(whole_s / 4)
        for task in writing:
            task.cancel()
        await asyncio.gather(*writing, return_exceptions=True)
        await asyncio.sleep(1.5 * whole_s)
        assert num_finished() - at_first < 16 + 8

    call(server.url, run)
