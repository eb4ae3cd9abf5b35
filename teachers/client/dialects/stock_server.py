"""Base classes of the dialects of stock servers: servers of other projects, such as vLLM and SGLang.

A stock server has no card and provides no tokenizer files. The client builds the card from requests (probed_card.py)
and reads the tokenizer from a local directory (tokenizer_folder.py). A new kind of server is a subclass of
StockServerClient with the requests of that server, and a subclass of StockServerDialect that names it.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from teachers.bos import bos_probes, prefers_bos
from teachers.client.dialects.base import ReplicaAddress
from teachers.client.dialects.model_list import Model, ModelList
from teachers.client.dialects.probed_card import ProbedCard, Properties, ServerKind, fingerprint
from teachers.client.dialects.tokenizer_folder import TokenizerFolder, open_tokenizer_folder
from teachers.client.http import Transport
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import FingerprintMismatch, NotFound, ProtocolError, Rejected
from teachers.protocol.messages import PROBE, ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows

log = logging.getLogger("tutelage.client")
TIMEOUT_S = 120.0  # of one request of `accepts` and `card`; a server may score on a CPU
MAX_JSON_BYTES = 4 << 20  # of a response without scores; a server may list thousands of models

T = TypeVar("T")


class StockServerDialect:
    """Base class of a Dialect whose servers are recognized by their routes. A subclass sets `client_type`."""

    client_type: ClassVar[type["StockServerClient"]]
    unused_keys: ClassVar[Mapping[str, str]] = {"model": "is used with its first model, except by openai_echo"}

    async def accepts(self, address: ReplicaAddress) -> bool:
        if not address.is_http:
            return False
        client = self.client_type(address)
        try:
            await client.identify(TIMEOUT_S)
        except NotFound:
            return False
        except ProtocolError:  # a server of another kind may respond to every path
            if address.dialect is not None:
                raise
            return False
        finally:
            await client.aclose()
        return True

    def client(self, address: ReplicaAddress) -> "StockServerClient":
        _log_cost(address.teacher, self.client_type.kind)
        return self.client_type(address)


@cache  # once per teacher, not per replica
def _log_cost(teacher: str, kind: ServerKind) -> None:
    log.warning("teacher %s is %s: %s", teacher, kind.name, kind.cost)


class StockServerClient(ABC):
    """Base class of the clients of stock servers. A ReplicaClient.

    kind         kind of the server
    card_top_k   largest K of the request for the scores in the card. Values that are not log-probabilities are
                 recognized by their mass, which is largest at the largest K
    check_top_k  K of the request for the scores that are compared with the card
    """

    kind: ClassVar[ServerKind]
    card_top_k: ClassVar[int] = 1024
    check_top_k: ClassVar[int] = 1

    def __init__(self, address: ReplicaAddress) -> None:
        self._address = address
        self._http = Transport(address.teacher, address.url, address.key, address.ca_file)

    @property
    def url(self) -> str:
        return self._http.url

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ping(self, timeout_s: float) -> None:
        await self.identify(timeout_s)

    async def card(self) -> ProbedCard:
        """Build the card. Raises TeacherError, which names the setting to change."""
        card = await self._draft_card()
        return card.model_copy(update={"probe_logprobs": await self._probe(card, self.card_top_k, TIMEOUT_S)})

    async def check(self, card: TeacherCard, timeout_s: float) -> None:
        """Compare the properties of the served model with the card, then the scores of PROBE_TEXT.

        Raises FingerprintMismatch if one of them differs.
        """
        deadline = time.monotonic() + timeout_s
        properties = await self._properties(timeout_s)
        with self._http.named_errors():
            if not isinstance(card, ProbedCard) or card.kind != self.kind:
                raise FingerprintMismatch(
                    f"expected the teacher {card.model} ({card.engine}), received {self.kind.name}"
                )
            card.check_properties(properties)
        logprobs = await self._probe(card, self.check_top_k, remaining_s(deadline))
        with self._http.named_errors():
            card.check_scores(logprobs)

    async def tokenizer_files(self, card: TeacherCard) -> dict[str, bytes]:
        folder = await self._folder(card.root if isinstance(card, ProbedCard) else None)
        with self._http.named_errors():
            if (received := folder.tokenizer_sha256) != card.tokenizer_sha256:
                raise FingerprintMismatch(
                    f"expected {folder.path}/tokenizer.json with sha256 {card.tokenizer_sha256[:12]}, "
                    f"received {received[:12]}"
                )
            return folder.files

    async def score(self, request: ScoreRequest, card: TeacherCard, timeout_s: float) -> list[Rows]:
        if request.chosen:
            with self._http.named_errors():
                raise Rejected(f"{self.kind.name} scores no chosen ids: remove them from the request")
        return await self._score(request, card, timeout_s)

    # --- differs between kinds of servers ---

    @abstractmethod
    async def identify(self, timeout_s: float) -> None:
        """Check that the server is of this kind by a request. Raises NotFound or ProtocolError if it is not."""

    @abstractmethod
    async def _score(self, request: ScoreRequest, card: TeacherCard, timeout_s: float) -> list[Rows]:
        """Return one Rows per sequence of a request without chosen ids, in its order, checked against the card."""

    @abstractmethod
    async def _properties(self, timeout_s: float) -> Properties:
        """Request the properties of the served model that all replicas of one teacher have in common."""

    @abstractmethod
    async def _draft_card(self) -> ProbedCard:
        """Build the card with all fields except probe_logprobs, which `card` adds."""

    # --- for subclasses ---

    def _new_card(self, properties: Properties, folder: TokenizerFolder, **fields: Any) -> ProbedCard:
        """Build a card from the tokenizer directory and further fields.

        Raises TeacherError for an invalid config.json, and ProtocolError for an invalid or unknown field.
        """
        with self._http.named_errors():
            common = {
                "kind": self.kind,
                "properties": dict(properties),
                "fingerprint": fingerprint(properties, folder.tokenizer_sha256),
                "dtype": "unknown",
                "tokenizer_sha256": folder.tokenizer_sha256,
                "bos_id": folder.bos_id,
                "eos_id": folder.special_id("eos"),
                "expects_bos": False,
                "chat_template_sha256": folder.sha256("chat_template.jinja"),
                "probe_ids": folder.probe_ids,
            }
            with decoding(f"card (from responses of the server and from {folder.path})"):
                return ProbedCard.model_validate(common | fields)

    async def _expects_bos(self, card: ProbedCard, folder: TokenizerFolder, adds_bos: bool) -> bool:
        """Return whether BOS is expected: declared by the tokenizer, else added by the server, else measured."""
        with self._http.named_errors():
            bos, declared = card.bos_id, folder.declared_bos(card.bos_id)
            if declared is not None or bos is None:
                return bool(declared)
            if adds_bos:
                return True
            probes = bos_probes(bos, folder.encode(PROBE))
        sequences, starts = [ids for ids, _ in probes], [start for _, start in probes]
        request = ScoreRequest(sequences=sequences, starts=starts, top_k=1)
        return prefers_bos(*await self.score(request, card, TIMEOUT_S))

    async def _probe(self, card: ProbedCard, top_k: int, timeout_s: float) -> tuple[float, ...]:
        """Return the log-probabilities of PROBE_TEXT, NaN at masked positions."""
        sequence = [*card.prefix, *card.probe_ids]
        request = ScoreRequest(sequences=[sequence], starts=[1], top_k=min(top_k, card.max_top_k))
        return tuple((await self.score(request, card, timeout_s))[0].actual.tolist())

    async def _folder(self, root: str | None = None) -> TokenizerFolder:
        """Load the tokenizer directory of the run file, else `root`, which the server states.

        Raises TeacherError if it has no tokenizer, or an invalid one.
        """
        named = self._address.tokenizer
        with self._http.named_errors():
            path = named.expanduser() if named is not None else Path(root) if root else None
            folder = open_tokenizer_folder(path, self._address.teacher, self.kind.name)
            return await asyncio.to_thread(folder.load)

    async def _models(self, timeout_s: float = TIMEOUT_S) -> list[Model]:
        """Return the list of models."""
        return (await self._get("/v1/models", ModelList, timeout_s)).data

    async def _get(self, path: str, kind: type[T], timeout_s: float = TIMEOUT_S) -> T:
        """Return the JSON response of a GET request."""
        data = await self._http.get(path, timeout_s, MAX_JSON_BYTES)
        return self._decode(data, path, kind)

    async def _post(self, path: str, body: bytes, timeout_s: float, limit_bytes: int = MAX_JSON_BYTES) -> bytes:
        """Return the body of the JSON response to a POST request."""
        return await self._http.post(path, body, timeout_s, expect="application/json", limit_bytes=limit_bytes)

    def _decode(self, data: bytes, path: str, kind: type[T]) -> T:
        with self._http.named_errors(), decoding(f"response of {path}"):
            return msgspec.json.decode(data, type=kind)


def remaining_s(deadline: float) -> float:
    """Return the seconds until a time of time.monotonic(), at least a millisecond."""
    return max(deadline - time.monotonic(), 0.001)
