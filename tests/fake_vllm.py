"""A fake vLLM server: the routes and the JSON of vLLM 0.32 with the engine of tests/serve.py.

The JSON was copied from vllm.entrypoints; tests/teachers/test_vllm_openai.py compares it with vLLM's own classes.
"""

import asyncio
from typing import Any, ClassVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response

from teachers.client.dialects.vllm_openai import VllmOpenAIClient
from teachers.protocol.rows import Rows
from tests.fake_stock import FakeStockServer
from tests.serve import FormulaEngine


class FakeVllmServer(FakeStockServer):
    """The rows of an engine as vLLM's JSON."""

    client_type = VllmOpenAIClient
    score_path = "/v1/completions"
    error_fields: ClassVar[dict[str, Any]] = {"type": "BadRequestError", "param": None, "code": 400}

    def __init__(self, engine: FormulaEngine, root: str = "org/model", max_logprobs: int = 20) -> None:
        super().__init__(engine)
        self.model = {"id": "org/model", "root": root, "parent": None, "max_model_len": 129, "object": "model"}
        self.max_logprobs = max_logprobs
        self.vocab_size = engine.card.vocab_size

    def models(self) -> list[dict[str, Any]]:
        return [self.model]

    async def score(self, body: dict[str, Any]) -> Any:
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
        app = super().app()

        @app.get("/health")
        async def health() -> Response:
            return Response()

        @app.get("/version")
        async def version() -> dict[str, str]:
            return {"version": "0.32.0"}

        @app.post("/tokenize")
        async def tokenize(request: Request) -> dict[str, Any]:
            body = await request.json()
            ids = [*(self.special if body["add_special_tokens"] else []), *self.encode(body["prompt"])]
            return {"count": len(ids), "max_model_len": self.model["max_model_len"], "tokens": ids, "token_strs": None}

        return app


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
