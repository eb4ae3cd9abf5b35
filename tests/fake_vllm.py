"""A fake vLLM server: the routes and the JSON of vLLM 0.32 with the engine of tests/serve.py.

The JSON was copied from vllm.entrypoints; tests/teachers/test_vllm_openai.py compares it with vLLM's own classes.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from tokenizers import Tokenizer

from teachers.protocol.rows import Rows
from tests.serve import FormulaEngine, serving_app


class FakeVllmServer:
    """The rows of an engine as vLLM's JSON. Tests set attributes, or replace `alter` to change the choices."""

    def __init__(self, engine: FormulaEngine, root: str = "org/model", max_logprobs: int = 20) -> None:
        self.engine = engine
        self.model = {"id": "org/model", "root": root, "parent": None, "max_model_len": 129, "object": "model"}
        self.max_logprobs = max_logprobs
        self.vocab_size = engine.card.vocab_size
        self.tokenizer = Tokenizer.from_buffer(engine.tokenizer_files["tokenizer.json"])
        self.special: list[int] = []
        self.requests: list[dict[str, Any]] = []

    def alter(self, choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return choices

    async def complete(self, body: dict[str, Any]) -> dict[str, Any] | str:
        """Return the response, or an error message."""
        self.requests.append(body)
        top_k = body["prompt_logprobs"]
        if top_k > self.max_logprobs:
            return f"Requested prompt logprobs of {top_k}, which is greater than max allowed: {self.max_logprobs}"
        if any(int(token) >= self.vocab_size for token in body.get("logit_bias", {})):
            return "contain out-of-vocab token ids"
        if max(map(len, body["prompt"])) + body["max_tokens"] > self.model["max_model_len"]:
            return "too long"
        rows = await asyncio.gather(*(self.engine.score(prompt, 1, top_k) for prompt in body["prompt"]))
        pairs = enumerate(zip(body["prompt"], rows, strict=True))
        choices = [choice(i, prompt, prompt_logprobs(prompt, r, self.vocab_size)) for i, (prompt, r) in pairs]
        return completion(self.alter(choices), self.model["id"])

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/health")
        async def health() -> Response:
            return Response()

        @app.get("/version")
        async def version() -> dict[str, str]:
            return {"version": "0.32.0"}

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [self.model]}

        @app.post("/tokenize")
        async def tokenize(request: Request) -> dict[str, Any]:
            body = await request.json()
            ids = self.tokenizer.encode(body["prompt"], add_special_tokens=False).ids
            ids = [*(self.special if body["add_special_tokens"] else []), *ids]
            return {"count": len(ids), "max_model_len": self.model["max_model_len"], "tokens": ids, "token_strs": None}

        @app.post("/v1/completions")
        async def completions(request: Request) -> JSONResponse:
            response = await self.complete(await request.json())
            if isinstance(response, str):
                error = {"message": response, "type": "BadRequestError", "param": None, "code": 400}
                return JSONResponse({"error": error}, 400)
            return JSONResponse(response)

        return app

    @contextmanager
    def serving(self) -> Iterator[str]:
        with serving_app(self.app()) as url:
            yield url


def prompt_logprobs(prompt: list[int], rows: Rows, vocab_size: int) -> list[dict[str, Any] | None]:
    """Return the actual token, then the top K; a token that is both occurs once, with its rank among the K."""
    positions: list[dict[str, Any] | None] = [None]
    for i, token in enumerate(prompt[1:]):
        entries = {str(token): entry(rows.actual[i], vocab_size)}
        entries |= {str(t): entry(rows.logprobs[i, k], k + 1) for k, t in enumerate(rows.ids[i].tolist())}
        positions.append(entries)
    return positions


def entry(logprob: np.float32, rank: int) -> dict[str, Any]:
    return {"logprob": max(float(logprob), -9999.0), "rank": rank, "decoded_token": 'a"\\é東'}


def choice(index: int, prompt: list[int], positions: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Return the choice of a request with return_token_ids."""
    nulls = dict.fromkeys(("logprobs", "stop_reason", "routed_experts"))
    ids = {"token_ids": [0], "prompt_token_ids": prompt}
    return {"index": index, "text": "!", "finish_reason": "length", "prompt_logprobs": positions, **ids, **nulls}


def completion(choices: list[dict[str, Any]], model: Any = "org/model") -> dict[str, Any]:
    usage = {"prompt_tokens": 2, "total_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": None}
    nulls = dict.fromkeys(("service_tier", "kv_transfer_params", "ec_transfer_params", "metrics"))
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": model,
        "choices": choices,
        "system_fingerprint": "vllm-0.32.0-ce573d38",
        "usage": usage | {"completion_tokens_details": None},
        **nulls,
    }
