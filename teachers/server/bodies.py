"""Receive and decode the body of a score request, within limits of size, time and concurrency.

Decoding stops at the first error. ScoreRequest is the documented schema. _Body is the same schema for msgspec, which is
strict about types: true, "6" and 6.0 are not accepted as integers.
"""

import asyncio
import gc
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated

import msgspec
from starlette.requests import ClientDisconnect, Request

from teachers.protocol.messages import ScoreRequest
from teachers.server.admission import Rejection
from teachers.server.limits import Limits
from teachers.server.service import Service

INLINE_BYTES = 64 * 1024  # smaller bodies are decoded on the event loop: that takes less than a change of threads
_DECODING = ThreadPoolExecutor(1, "decode")  # one body at a time: more threads would keep the event loop waiting

_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    sequences: list[list[_Id]]
    starts: list[_Positive]
    top_k: _Positive
    chosen: list[list[list[_Id]]] = []


_decoder = msgspec.json.Decoder(_Body)
_PLACE = re.compile(r"(.*) - at `\$\.?(.*)`", re.DOTALL)


async def receive_request(request: Request, service: Service, client: str) -> ScoreRequest:
    """Receive the body of a request and decode it. Raises Rejection if it is invalid, too large or too slow."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Rejection(415, "Not JSON", "send the request with content-type: application/json", close=True)
    body = await _receive_body(request, service, client)
    if len(body) < INLINE_BYTES:
        return decode_request(body, service.limits)
    return await asyncio.get_running_loop().run_in_executor(_DECODING, decode_request, body, service.limits)


def decode_request(body: bytes, limits: Limits) -> ScoreRequest:
    """Decode a JSON body into a ScoreRequest. Raises Rejection, which describes the first error."""
    num_lists, max_lists = body.count(b"["), 3 + 2 * limits.max_sequences + limits.max_request_tokens
    if num_lists > max_lists:  # before decoding, which takes longest for many short lists
        raise Rejection(413, "Too large", f"the body has {num_lists} lists; send at most {max_lists}")
    try:
        with _without_collection():
            decoded = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Rejection(422, "Malformed", _sentence(error)) from error
    return ScoreRequest.model_construct(
        sequences=decoded.sequences, starts=decoded.starts, top_k=decoded.top_k, chosen=decoded.chosen
    )


@contextmanager
def _without_collection() -> Iterator[None]:
    """Disable the garbage collector in the block.

    Many new lists would trigger collections, each of which traverses all objects of torch (0.3 s in total).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _sentence(error: Exception) -> str:
    """Return a validation error with its field first, as in: sequences.0.1: Expected `int`, got `bool`."""
    found = _PLACE.fullmatch(str(error))
    message, place = (found[1], found[2]) if found else (str(error), "")
    return f"{place.replace('[', '.').replace(']', '') or 'body'}: {message}"


async def _receive_body(request: Request, service: Service, client: str) -> bytes:
    limits = service.limits
    data = bytearray()
    with service.receiving_body(client):
        try:
            async with asyncio.timeout(limits.max_body_s):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > limits.max_body_bytes:
                        detail = f"the body has over {limits.max_body_bytes} bytes; send fewer sequences"
                        raise Rejection(413, "Too large", detail, close=True)
        except TimeoutError as error:
            detail = f"the body did not arrive within {limits.max_body_s:g} s"
            raise Rejection(408, "Too slow", detail, close=True) from error
        except ClientDisconnect as error:
            raise Rejection(400, "Incomplete", "the connection ended before the end of the body", close=True) from error
    return bytes(data)
