"""The dialect of any OpenAI-compatible completions endpoint with `echo` and `logprobs`, for example llama-cpp-python.

Such a server returns token strings instead of ids, few candidates, and no card. Positions at which the strings do not
determine the candidates are masked (echo_completions.py), so that this dialect is for servers that have no other one.

| field of the card | source |
|---|---|
| name | `/v1/models`, or `model` of the run file if there are several |
| tokenizer | a local directory; the strings of a text must be those of its tokens |
| longest sequence | `/v1/models`; else the number in the error message about a prompt that is too long |
| largest K | the largest of TOP_KS for which the server returns as many candidates |
| prompts | ids if the server takes them, else a text, which the server must split into the same tokens |
| BOS | whether the server counts one token more than it was sent (`usage`); if it takes ids, see teachers/bos.py |
| shift | whether the lists of a text predict the next tokens rather than their own |
| fingerprint | name, largest K, prompts, BOS, shift, tokenizer. Weights cannot be hashed, so `check` compares the |
| | scores of a text, after it has examined the server again |

The client cannot check the weights beyond the scores of one text, tokens with the same strings as those of the request,
and the log-probabilities of masked positions.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from teachers.client.dialects.base import ReplicaAddress
from teachers.client.dialects.echo_completions import (
    EchoReader,
    Logprobs,
    echo_request,
    masked_rows,
    read_completion,
    response_limit_bytes,
)
from teachers.client.dialects.echo_probe import context_in, find_reader, text_of
from teachers.client.dialects.probed_card import PROBE_TEXT, ProbedCard, Properties, ServerKind
from teachers.client.dialects.stock_server import TIMEOUT_S, StockServerClient, StockServerDialect, remaining_s
from teachers.client.dialects.token_strings import read_tokens
from teachers.client.dialects.tokenizer_folder import TokenizerFolder
from teachers.protocol.errors import (
    NotFound,
    Overloaded,
    ProtocolError,
    Rejected,
    RequestMismatch,
    TeacherError,
    Unauthorized,
    Unavailable,
)
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows
from teachers.protocol.untrusted_text import clean

CARD_TIMEOUT_S = 600.0  # of all requests that examine a server and build its card
MAX_CONTEXT = 1 << 22  # a prompt of twice as many tokens is sent to find the limit of the server
MAX_LONG_RESPONSE_BYTES = 1 << 28  # of the response to this prompt; 100 bytes per token are usual
TOP_KS = (64, 50, 32, 20, 16, 10, 8, 5, 4, 3, 2, 1)
SHORT_TEXT = "The lighthouse"  # of few tokens, to try values of K


@dataclass(frozen=True)
class _Server:
    """Properties of a server, found by requests.

    model      name of the model in requests
    folder     directory of the tokenizer
    reader     reader of its responses
    max_top_k  largest K
    """

    model: str
    folder: TokenizerFolder
    reader: EchoReader
    max_top_k: int

    @property
    def properties(self) -> Properties:
        return {"model": self.model, "max_top_k": self.max_top_k, **asdict(self.reader.format)}


class OpenAIEchoClient(StockServerClient):
    """Client of an OpenAI-compatible endpoint. A ReplicaClient."""

    kind = ServerKind(
        name="an OpenAI-compatible endpoint",
        cost="it returns token strings instead of ids: few candidates (K), about 30 bytes for each, a larger tail, and "
        "positions with ambiguous strings are masked and counted; a server that returns ids (`tutelage serve`, vLLM, "
        "SGLang) has none of these limits",
        masks_positions=True,
    )
    card_top_k = check_top_k = 5  # with more candidates, more positions have an ambiguous string and are masked

    def __init__(self, address: ReplicaAddress) -> None:
        super().__init__(address)
        self._examined: _Server | None = None
        self._is_compared = False  # whether the result of the last examination was compared with a card
        self._lock = asyncio.Lock()

    async def identify(self, timeout_s: float) -> None:
        await self._models(timeout_s)

    async def _score(self, request: ScoreRequest, card: TeacherCard, timeout_s: float) -> list[Rows]:
        deadline = time.monotonic() + timeout_s
        server = await self._server(deadline)
        pairs = zip(request.sequences, request.starts, strict=True)
        single = [ScoreRequest(sequences=[s], starts=[start], top_k=request.top_k) for s, start in pairs]
        return [await self._score_one(server, each, card, deadline) for each in single]

    async def _properties(self, timeout_s: float) -> Properties:
        """Examine the server, unless it was examined after the last comparison: it may have been restarted."""
        deadline = time.monotonic() + timeout_s
        async with self._lock:
            if self._examined is None or self._is_compared:
                self._examined = await self._examine(deadline)
            self._is_compared = True
            return self._examined.properties

    async def _draft_card(self) -> ProbedCard:
        deadline = time.monotonic() + CARD_TIMEOUT_S
        server = await self._server(deadline)
        folder, form = server.folder, server.reader.format
        with self._http.named_errors():
            declares_bos = bool(folder.declared_bos(folder.bos_id))
            vocab_size = folder.vocab_size or max(server.reader.strings.tokens) + 1
        return self._new_card(
            server.properties,
            folder,
            model=server.model,
            engine="OpenAI-compatible endpoint",
            vocab_size=vocab_size,
            expects_bos=form.adds_bos or (form.takes_ids and declares_bos),
            max_tokens=await self._max_tokens(server, deadline),
            max_top_k=server.max_top_k,
        )

    # --- examination of the server ---

    async def _server(self, deadline: float) -> _Server:
        """Return the properties of the server. The first call determines them by requests; later calls reuse them."""
        async with self._lock:
            if self._examined is None:
                self._examined = await self._examine(deadline)
            return self._examined

    async def _examine(self, deadline: float) -> _Server:
        """Find the properties of the server by requests, which end at `deadline`, a time of time.monotonic()."""
        model = await self._model(deadline)
        folder = await self._folder()
        with self._http.named_errors():
            tokens = await asyncio.to_thread(read_tokens, folder.files["tokenizer.json"])
        short, ids = folder.encode(SHORT_TEXT), list(folder.probe_ids)
        takes_ids = await self._takes_ids(model, short, deadline)
        max_top_k = await self._max_top_k(model, short if takes_ids else SHORT_TEXT, deadline)
        prompt = ids if takes_ids else PROBE_TEXT
        lists, num_tokens = await self._complete(model, prompt, max_top_k, len(ids), _request_s(deadline))
        with self._http.named_errors():
            reader = find_reader(lists, num_tokens, takes_ids, (ids, folder.bos_id, tokens))
        return _Server(model, folder, reader, max_top_k)

    async def _model(self, deadline: float) -> str:
        if self._address.model is not None:
            return self._address.model
        names = [model.id for model in await self._models(_request_s(deadline))]
        with self._http.named_errors():
            if len(names) != 1:
                listed = clean(", ".join(names[:10]), 500)
                raise TeacherError(
                    f"the server has {len(names)} models: set teachers.{self._address.teacher}.model to one of {listed}"
                )
            return names[0]

    async def _takes_ids(self, model: str, ids: list[int], deadline: float) -> bool:
        """Return whether the prompt may be a list of ids. llama-cpp-python responds with 500 to one."""
        # A text first, so that an error about ids is not one of the server.
        await self._complete(model, SHORT_TEXT, 1, len(ids), _request_s(deadline))
        try:
            lists, _ = await self._complete(model, ids, 1, len(ids), _request_s(deadline))
        except (Unauthorized, NotFound, Overloaded):
            raise
        except (Rejected, ProtocolError, Unavailable):
            return False
        return len(lists.tokens) - len(ids) in (0, 1, 2)

    async def _max_top_k(self, model: str, prompt: str | list[int], deadline: float) -> int:
        """Return the largest accepted K of TOP_KS, or the number of candidates if the server returns fewer for it."""
        for top_k in TOP_KS:
            try:
                lists, _ = await self._complete(model, prompt, top_k, 8, _request_s(deadline))
            except (Unauthorized, NotFound, Overloaded):
                raise
            except Rejected:
                continue
            except Unavailable:  # some servers respond with 500 to a large K
                if top_k == 1:
                    raise
                continue
            received = max((len(entry) for entry in lists.top_logprobs or () if entry), default=0)
            if received:
                return top_k if received >= top_k // 2 else received
        with self._http.named_errors():
            raise TeacherError("the server returns no log-probabilities of the prompt (`echo` with `logprobs`)")

    async def _max_tokens(self, server: _Server, deadline: float) -> int:
        """Return the longest sequence: one token less than the context, because one is generated."""
        if (stated := await self._stated_context(server.model, deadline)) is not None:
            return stated - 1
        with self._http.named_errors():
            expected = server.folder.config.get("max_position_embeddings")
            if type(expected) is not int or not 0 < expected <= MAX_CONTEXT:
                raise TeacherError(
                    f"the server does not state the longest prompt: put the model's config.json into "
                    f"{server.folder.path}, with max_position_embeddings from 1 to {MAX_CONTEXT:,}"
                )
        repeated = server.folder.encode(" a")[:1] if server.reader.format.takes_ids else " a"
        body = echo_request(server.model, repeated * (2 * expected), 1)
        limit_bytes = min(response_limit_bytes(2 * expected, 1), MAX_LONG_RESPONSE_BYTES)
        try:
            await self._post("/v1/completions", body, _request_s(deadline), limit_bytes)
        except Rejected as error:
            return (context_in(str(error)) or expected) - 1
        return 2 * expected - 1

    async def _stated_context(self, name: str, deadline: float) -> int | None:
        """Return the context of a model in the list of models; None if the list does not state it."""
        try:
            models = await self._models(_request_s(deadline))
        except NotFound:  # a gateway may serve /v1/completions only
            return None
        return next((model.max_model_len or model.context_length for model in models if model.id == name), None)

    # --- requests ---

    async def _score_one(self, server: _Server, request: ScoreRequest, card: TeacherCard, deadline: float) -> Rows:
        reader, sequence = server.reader, request.sequences[0]
        with self._http.named_errors():
            if reader.format.adds_bos and sequence[0] != reader.bos_id:
                raise Rejected("the server puts BOS in front of every prompt: it cannot score a sequence without BOS")
        sent = sequence[reader.format.adds_bos :]
        prompt = sent if reader.format.takes_ids else text_of(sent, reader.strings, server.folder)
        if prompt is None:
            return masked_rows(request)
        lists, _ = await self._complete(server.model, prompt, request.top_k, len(sequence), remaining_s(deadline))
        with self._http.named_errors():
            try:
                return reader.rows(lists, request, card)
            except RequestMismatch:
                if isinstance(prompt, str) and "".join(lists.tokens).startswith(prompt):
                    return masked_rows(request)  # the same text, which the server splits into other tokens
                raise

    async def _complete(
        self, model: str, prompt: str | list[int], top_k: int, num_tokens: int, timeout_s: float
    ) -> tuple[Logprobs, int | None]:
        body, limit_bytes = echo_request(model, prompt, top_k), response_limit_bytes(num_tokens, top_k)
        data = await self._post("/v1/completions", body, timeout_s, limit_bytes)
        with self._http.named_errors():
            return read_completion(data)


def _request_s(deadline: float) -> float:
    """Return the time limit of one request of an examination."""
    return min(TIMEOUT_S, remaining_s(deadline))


class OpenAIEchoDialect(StockServerDialect):
    """OpenAI-compatible servers: those with the route /v1/models that no other dialect accepts."""

    client_type = OpenAIEchoClient
    unused_keys: ClassVar[Mapping[str, str]] = {}

    async def accepts(self, address: ReplicaAddress) -> bool:
        return (address.is_http and address.dialect == "openai_echo") or await super().accepts(address)
