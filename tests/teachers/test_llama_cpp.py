"""llama-cpp-python with SmolLM2: recorded responses in every run, the server itself in `make test-llama-cpp`."""

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from teachers.client.dialects.tokenizer_folder import TokenizerFolder
from teachers.protocol.rows import Rows
from tests.serve import free_port, serving_app
from tests.teachers.llama_cpp.record import RECORDING, TEXT, TOP_K, exchange

START_S = 60.0


def replaying() -> FastAPI:
    """Return a server that responds with the recording to the recorded requests."""
    recorded: list[dict[str, Any]] = json.loads(RECORDING.read_text(encoding="utf-8"))
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def respond(request: Request) -> JSONResponse:
        body = json.loads(await request.body() or b"null")
        if body and len(str(body["prompt"])) > 10_000:
            body["prompt"] = "too long"
        found = next((e for e in recorded if (e["path"], e["body"]) == (request.url.path, body)), None)
        return JSONResponse(found["response"], found["status"]) if found else JSONResponse({}, 404)

    return app


def check_scores(card: Any, rows: Rows, folder: Path) -> None:
    ids = np.array(TokenizerFolder(folder).encode(TEXT))
    assert (card.expects_bos, card.max_tokens, card.max_top_k) == (False, 511, 64)
    assert rows.ids.shape == (len(ids) - 1, TOP_K)
    known = ~np.isnan(rows.actual)
    assert 0 < rows.num_masked < len(rows), "tokens of incomplete characters are masked"
    # The lists of this server are shifted. Read without the shift, a token has a probability of about e^−9.
    assert rows.actual[known].mean() > -4
    assert (rows.ids[known] == ids[1:][known, None]).any(axis=1).all(), "an unlisted actual token is masked"


def test_recorded_responses_are_read(smollm2: Path) -> None:
    with serving_app(replaying()) as url:
        card, rows = asyncio.run(exchange(url, smollm2))
    check_scores(card, rows, smollm2)


@pytest.fixture
def llama_cpp_server() -> Iterator[str]:
    """Start the server with the Python and the model that the environment names, and end it after the test."""
    python, model, port = os.environ["LLAMA_CPP_PYTHON"], os.environ["LLAMA_CPP_MODEL"], free_port()
    command = [python, "-m", "llama_cpp.server", "--model", model, "--logits_all", "true", "--n_ctx", "512"]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not _responds(url):
            assert process.poll() is None, f"the server ended with {process.returncode}"
            assert time.monotonic() < deadline, "the server does not respond"
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def _responds(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.llama_cpp
def test_the_server_itself_is_read(llama_cpp_server: str, smollm2: Path) -> None:
    card, rows = asyncio.run(exchange(llama_cpp_server, smollm2))
    check_scores(card, rows, smollm2)
