"""The limits of a teacher server. Run files contain them too, so this module imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one request and of all requests together. The card contains the largest K and the longest sequence.

    max_sequences       sequences per request
    max_request_tokens  tokens per request
    max_queued_tokens   tokens of all unfinished sequences
    max_body_bytes      size of a request
    max_bodies          requests whose bodies are received at the same time
    max_seconds         seconds of work on one request, even if its own deadline is later
    max_body_s          seconds from the head of a request to the end of its body
    max_stall_s         seconds in which the client receives nothing of its response
    max_held_bytes      size of the rows that are scored and not yet received; beyond it, responses are aborted
    """

    max_sequences: int = 64
    max_request_tokens: int = 1 << 16
    max_queued_tokens: int = 1 << 19
    max_body_bytes: int = 1 << 20
    max_bodies: int = 64
    max_seconds: float = 600.0
    max_body_s: float = 20.0
    max_stall_s: float = 30.0
    max_held_bytes: int = 1 << 30
