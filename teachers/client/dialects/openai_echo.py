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
| fingerprint | the fields above. Weights cannot be hashed, so `check` compares the scores of a text |

Unchecked: the weights, beyond the scores of one text; in a response whose tokens have the strings of the request,
whether they are other tokens with the same strings; the log-probabilities of masked positions.
"""

import asyncio
import logging
from functools import cache

import msgspec
import numpy as np

from teachers.client.dialects.base import ReplicaAddress, has_route
from teachers.client.dialects.echo_card import (
    EchoCard,
    Model,
    ModelList,
    context_in,
    draft_card,
    find_reader,
    fingerprint,
    text_of,
)
from teachers.client.dialects.echo_completions import (
    EchoFormat,
    EchoReader,
    Logprobs,
    echo_request,
    masked_rows,
    read_completion,
    response_limit_bytes,
)
from teachers.client.dialects.probed_card import PROBE_TEXT, check_probe
from teachers.client.dialects.token_strings import read_tokens
from teachers.client.dialects.tokenizer_folder import TokenizerFolder, open_tokenizer_folder
from teachers.client.http import Transport
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import (
    FingerprintMismatch,
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

log = logging.getLogger("tutelage.client")
JSON = "application/json"
TIMEOUT_S = 120.0
MAX_LIST_BYTES = 4 << 20
MAX_CONTEXT = 1 << 22  # a prompt of twice as many tokens is sent to find the limit of the server
TOP_KS = (64, 50, 32, 20, 16, 10, 8, 5, 4, 3, 2, 1)
PROBE_TOP_K = 5  # with more candidates, more positions have an ambiguous string and are masked
SHORT_TEXT = "The lighthouse"  # of few tokens, to try values of K


class OpenAIEchoDialect:
    """OpenAI-compatible servers: those with the route /v1/models that no other dialect accepts."""

    async def accepts(self, address: ReplicaAddress) -> bool:
        if address.scheme not in ("http", "https"):
            return False
        client = OpenAIEchoClient(address)
        return address.dialect == "openai_echo" or await has_route(client, client.models)

    def client(self, address: ReplicaAddress) -> "OpenAIEchoClient":
        _report_cost(address.teacher)
        return OpenAIEchoClient(address)


@cache  # once per teacher, not per replica
def _report_cost(name: str) -> None:
    log.warning(
        "teacher %s is an OpenAI-compatible endpoint that returns token strings instead of ids: few candidates (K), "
        "about 30 bytes for each, a larger tail, and positions with ambiguous strings are masked and counted; a server "
        "that returns ids (`tutelage serve`, vLLM, SGLang) has none of these limits",
        name,
    )


class OpenAIEchoClient:
    """Client of an OpenAI-compatible endpoint. A ReplicaClient."""

    def __init__(self, address: ReplicaAddress) -> None:
        self._http = Transport(address.teacher, address.url, address.key, address.ca_file)
        self._name, self._model_name, self._path = address.teacher, address.model, address.tokenizer
        self._found: tuple[str, EchoReader, int] | None = None  # model, reader, largest K
        self._lock = asyncio.Lock()

    @property
    def url(self) -> str:
        return self._http.url

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ping(self, timeout_s: float) -> None:
        await self._http.get("/v1/models", timeout_s, MAX_LIST_BYTES)

    async def score(self, request: ScoreRequest, card: TeacherCard, timeout_s: float) -> list[Rows]:
        with self._http.named_errors():
            if request.chosen:
                raise Rejected("an OpenAI-compatible endpoint scores no chosen ids: remove them from the request")
        model, reader, _ = await self._examine()
        pairs = zip(request.sequences, request.starts, strict=True)
        parts = [ScoreRequest(sequences=[s], starts=[start], top_k=request.top_k) for s, start in pairs]
        return [await self._score_one((model, reader), part, card, timeout_s) for part in parts]

    async def tokenizer_files(self, card: TeacherCard) -> dict[str, bytes]:
        with self._http.named_errors():
            folder = self._folder()
            if (received := folder.sha256("tokenizer.json")) != card.tokenizer_sha256:
                raise FingerprintMismatch(
                    f"expected {folder.path}/tokenizer.json with sha256 {card.tokenizer_sha256[:12]}, "
                    f"received {received}"
                )
            return folder.files

    async def check(self, card: TeacherCard, timeout_s: float) -> None:
        """Compare the form of the responses, and the scores of a text: see probed_card.PROBE_TOLERANCE."""
        model, reader, max_top_k = await self._examine()
        with self._http.named_errors():
            if not isinstance(card, EchoCard):
                raise FingerprintMismatch(
                    f"expected the teacher {card.model} ({card.engine}), received an OpenAI-compatible endpoint"
                )
            received = fingerprint(model, reader, max_top_k, self._folder())
            if received != card.fingerprint:
                raise FingerprintMismatch(f"expected {card.model}, received {model}, or responses of another form")
        logprobs = await self._probe(card, timeout_s)
        known = np.isfinite(card.probe_logprobs) & np.isfinite(logprobs)
        with self._http.named_errors():
            if not known.any():
                raise FingerprintMismatch("expected the scores of the probe text, and every position is masked")
            check_probe(np.array(card.probe_logprobs)[known].tolist(), np.array(logprobs)[known].tolist())

    async def card(self) -> EchoCard:
        """Build the card with the requests of the table above. Raises TeacherError naming the setting to change."""
        model, reader, max_top_k = await self._examine()
        max_tokens = await self._max_tokens(model, reader.format)
        with self._http.named_errors():
            folder = self._folder()
            with decoding(f"card (from /v1/models and {folder.path})"):
                card = draft_card(model, reader, folder, (max_tokens, max_top_k))
        return card.model_copy(update={"probe_logprobs": await self._probe(card, TIMEOUT_S)})

    async def models(self) -> list[Model]:
        """Return the served models. Raises NotFound if the server has no such list."""
        data = await self._http.get("/v1/models", TIMEOUT_S, MAX_LIST_BYTES)
        with self._http.named_errors():
            try:
                return msgspec.json.decode(data, type=ModelList).data
            except msgspec.MsgspecError as error:
                raise NotFound(f"/v1/models: {clean(error)}") from error

    # --- examination of the server ---

    async def _examine(self) -> tuple[str, EchoReader, int]:
        """Return the model, the reader of its responses and the largest K; the first call sends requests."""
        async with self._lock:
            if self._found is None:
                model = await self._model()
                with self._http.named_errors():
                    folder = self._folder()
                    tokens = await asyncio.to_thread(read_tokens, folder.files["tokenizer.json"])
                    short, ids = folder.encode(SHORT_TEXT), folder.encode(PROBE_TEXT)
                takes_ids = await self._takes_ids(model, short)
                max_top_k = await self._max_top_k(model, short if takes_ids else SHORT_TEXT)
                prompt = ids if takes_ids else PROBE_TEXT
                lists, num_tokens = await self._complete(model, prompt, max_top_k, len(ids))
                with self._http.named_errors():
                    reader = find_reader(lists, num_tokens, takes_ids, (ids, folder.bos_id, tokens))
                self._found = model, reader, max_top_k
        return self._found

    async def _model(self) -> str:
        if self._model_name is not None:
            return self._model_name
        names = [model.id for model in await self.models()]
        with self._http.named_errors():
            if len(names) != 1:
                listed = clean(", ".join(names[:10]), 500)
                raise TeacherError(
                    f"the server has {len(names)} models: set teachers.{self._name}.model to one of {listed}"
                )
            return names[0]

    async def _takes_ids(self, model: str, ids: list[int]) -> bool:
        """Return whether the prompt may be a list of ids. llama-cpp-python responds with 500 to one."""
        await self._complete(model, SHORT_TEXT, 1, len(ids))  # so that an error about ids is not one of the server
        try:
            lists, _ = await self._complete(model, ids, 1, len(ids))
        except (Unauthorized, NotFound, Overloaded):
            raise
        except (Rejected, ProtocolError, Unavailable):
            return False
        return len(lists.tokens) - len(ids) in (0, 1, 2)

    async def _max_top_k(self, model: str, prompt: str | list[int]) -> int:
        """Return the largest accepted K, or the number of candidates if the server returns fewer than requested."""
        for top_k in TOP_KS:
            try:
                lists, _ = await self._complete(model, prompt, top_k, 8)
            except (Unauthorized, NotFound, Overloaded):
                raise
            except (Rejected, Unavailable):
                continue
            received = max((len(entry) for entry in lists.top_logprobs or () if entry), default=0)
            if received:
                return top_k if received >= top_k // 2 else received
        with self._http.named_errors():
            raise TeacherError("the server returns no log-probabilities of the prompt (`echo` with `logprobs`)")

    async def _max_tokens(self, model: str, form: EchoFormat) -> int:
        """Return the longest sequence: one token less than the context, because one is generated."""
        if self._model_name is None:
            models = [m for m in await self.models() if m.id == model]  # the list may have changed
            stated = models[0].max_model_len or models[0].context_length if models else None
            if stated is not None:
                return stated - 1
        with self._http.named_errors():
            folder = self._folder()
            expected = folder.config.get("max_position_embeddings")
            if type(expected) is not int or not 0 < expected <= MAX_CONTEXT:
                raise TeacherError(
                    f"the server does not state the longest prompt: put the model's config.json into {folder.path}, "
                    f"with max_position_embeddings from 1 to {MAX_CONTEXT:,}"
                )
        token = folder.encode(" a")[:1]
        try:
            await self._complete(model, token * (2 * expected) if form.takes_ids else " a" * (2 * expected), 1, 8)
        except Rejected as error:
            return (context_in(str(error)) or expected) - 1
        return 2 * expected - 1

    async def _probe(self, card: EchoCard, timeout_s: float) -> tuple[float, ...]:
        request = ScoreRequest(
            sequences=[[*card.prefix, *card.probe_ids]], starts=[1], top_k=min(PROBE_TOP_K, card.max_top_k)
        )
        return tuple((await self.score(request, card, timeout_s))[0].actual.tolist())

    def _folder(self) -> TokenizerFolder:
        path = self._path.expanduser() if self._path else None
        return open_tokenizer_folder(path, self._name, "an OpenAI-compatible endpoint")

    # --- requests ---

    async def _score_one(
        self, server: tuple[str, EchoReader], request: ScoreRequest, card: TeacherCard, timeout_s: float
    ) -> Rows:
        (model, reader), sequence = server, request.sequences[0]
        with self._http.named_errors():
            if reader.format.adds_bos and sequence[0] != reader.bos_id:
                raise Rejected("the server puts BOS in front of every prompt: it cannot score a sequence without BOS")
        sent = sequence[reader.format.adds_bos :]
        prompt = sent if reader.format.takes_ids else text_of(sent, reader.strings, self._folder())
        if prompt is None:
            return masked_rows(request)
        lists, _ = await self._complete(model, prompt, request.top_k, len(sequence), timeout_s)
        with self._http.named_errors():
            try:
                return reader.rows(lists, request, card)
            except RequestMismatch:
                if isinstance(prompt, str) and "".join(lists.tokens).startswith(prompt):
                    return masked_rows(request)  # the same text, which the server splits into other tokens
                raise

    async def _complete(
        self, model: str, prompt: str | list[int], top_k: int, num_tokens: int, timeout_s: float = TIMEOUT_S
    ) -> tuple[Logprobs, int | None]:
        limit = response_limit_bytes(num_tokens, top_k)
        body = echo_request(model, prompt, top_k)
        data = await self._http.post("/v1/completions", body, timeout_s, expect=JSON, limit_bytes=limit)
        with self._http.named_errors():
            return read_completion(data)
