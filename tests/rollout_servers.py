"""Rollout servers on loopback: the routes and the worker class of Tutelage, without vLLM."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from teachers.engines.rollout_worker import RolloutWorker
from teachers.server.rollouts import Weights, attach_rollout_routes
from tests.serve import serving_app


class LocalWorker(RolloutWorker):
    """A worker whose model is a dictionary of tensors."""

    def __init__(self, model: Path) -> None:
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(model=str(model)))
        self.loaded: dict[str, Tensor] = {}
        self.on_load: Callable[[], object] = lambda: None

    def reload_weights(self, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        self.on_load()
        self.loaded = dict(weights_iterator)


class LocalRolloutServer:
    """A server with the routes of a rollout server, whose completions are `complete`."""

    def __init__(self, model: Path, sync_dir: Path, num_workers: int = 1) -> None:
        self.workers = [LocalWorker(model) for _ in range(num_workers)]
        self.weights = Weights(sync_dir)
        self.weights.call = self._call
        self.complete: Callable[[dict[str, Any]], Any] = lambda body: completion(body, [3], [-1.0])

    async def _call(self, method: str, *arguments: Any) -> list[Any]:
        return await asyncio.to_thread(lambda: [getattr(worker, method)(*arguments) for worker in self.workers])

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Run the server within the block. Yields its address."""
        app = FastAPI()
        attach_rollout_routes(app, self.weights)

        @app.get("/health")
        async def health() -> Response:
            return Response()

        @app.post("/v1/completions")
        async def completions(request: Request) -> JSONResponse:
            return JSONResponse(self.complete(await request.json()))

        with serving_app(app) as url:
            yield url


def completion(
    body: dict[str, Any],
    ids: list[int],
    logprobs: list[float],
    /,
    finish_reason: str = "stop",
    stop_reason: int | str | None = None,
    **choice: Any,
) -> dict[str, Any]:
    """Return a completion in the JSON of vLLM 0.32 (tests/teachers/test_rollout_vllm.py uses the original)."""
    top = [{f"token_id:{token}": value} for token, value in zip(ids, logprobs, strict=False)]
    fields = {
        "index": 0,
        "text": "",
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
        "prompt_token_ids": body["prompt"],
        "token_ids": ids,
        "logprobs": {"token_logprobs": logprobs, "tokens": [], "top_logprobs": top, "text_offset": []},
        "prompt_logprobs": None,
    }
    return {"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [fields | choice]}
