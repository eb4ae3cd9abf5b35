"""What a teacher admits. A leaf: run files hold it too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may hold. The largest K and the longest sequence stand in the card.

    max_sequences       of one request
    max_request_tokens  of one request
    max_queued_tokens   of all sequences that are not answered yet
    max_body_bytes      of one request
    max_bodies          requests whose bodies are read at once
    max_seconds         of work on one request, whatever its own deadline
    max_body_s          from a request's head to the end of its body
    max_stall_s         without the client taking anything of its answer
    """

    max_sequences: int = 64
    max_request_tokens: int = 1 << 16
    max_queued_tokens: int = 1 << 19
    max_body_bytes: int = 1 << 20
    max_bodies: int = 64
    max_seconds: float = 600.0
    max_body_s: float = 20.0
    max_stall_s: float = 30.0
