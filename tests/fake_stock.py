"""Base class of the fake stock servers: routes, recorded requests and errors, with the engine of tests/serve.py."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from tokenizers import Tokenizer

from teachers.client.dialects.stock_server import StockServerClient
from tests.serve import FormulaEngine, serving_app


class FakeStockServer(ABC):
    """A server with the list of models and one route that scores.

    client_type   class of the client
    score_path    the route that scores
    error_fields  fields of an error besides its message
    special       ids that the tokenizer puts in front of a text
    requests      bodies of all requests to score
    alter         changes the scores before they are sent; tests replace it
    """

    client_type: ClassVar[type[StockServerClient]]
    score_path: ClassVar[str]
    error_fields: ClassVar[dict[str, Any]] = {}

    def __init__(self, engine: FormulaEngine) -> None:
        self.engine = engine
        self.tokenizer = Tokenizer.from_buffer(engine.tokenizer_files["tokenizer.json"])
        self.special: list[int] = []
        self.requests: list[dict[str, Any]] = []
        self.alter: Callable[[Any], Any] = lambda scores: scores

    @abstractmethod
    def models(self) -> list[dict[str, Any]]:
        """Return the list of models."""

    @abstractmethod
    async def score(self, body: dict[str, Any]) -> Any:
        """Return the response to a request, or an error message."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def app(self) -> FastAPI:
        """Return the server as an application. Subclasses add routes."""
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": self.models()}

        @app.post(self.score_path)
        async def score(request: Request) -> JSONResponse:
            body = await request.json()
            self.requests.append(body)
            response = await self.score(body)
            if isinstance(response, str):
                return JSONResponse({"error": {"message": response, **self.error_fields}}, 400)
            return JSONResponse(response)

        return app

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Run the server within the block. Yields its address."""
        with serving_app(self.app()) as url:
            yield url
