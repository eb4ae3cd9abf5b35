"""Settings of the teachers: addresses, limits of requests, and how their knowledge enters the loss."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from teachers.client.addresses import canonical_url
from teachers.client.dialects import DIALECTS
from teachers.server.ray_options import RayServeOptions
from trainer.config_section import (
    Address,
    Name,
    PathText,
    Positive,
    Roles,
    Seconds,
    Section,
    VariableName,
    Weight,
    one_of,
)
from trainer.signals import SIGNALS, signal_class

MAX_TEACHERS = 16


class TeacherConfig(Section):
    """[[teachers]] A teacher model, served by one or more replicas. A run without teachers is plain training."""

    name: Name
    """Name in metrics and errors."""
    urls: list[Address] = []
    """Base URL of each replica, with or without a final /v1. dns+http://NAME:PORT stands for one replica per address
    that the DNS name currently has."""
    urls_file: PathText | None = None
    """File with more URLs, one per line. It is read again while the run is in progress."""
    key_env: VariableName | None = None
    """Environment variable that holds the bearer key."""
    key_file: PathText | None = None
    """File that holds the bearer key."""
    ca_file: PathText | None = None
    """PEM file with certificates to trust for https, in addition to the system's: that of an authority, or the
    server's own."""
    tokenizer: PathText | None = None
    """Folder with tokenizer.json, and config.json if possible. Only for servers that do not serve their tokenizer's
    files: stock vLLM, SGLang, and OpenAI-compatible endpoints."""
    dialect: Annotated[str | None, one_of(DIALECTS)] = None
    """Protocol of the server. Default: detected when the teacher is connected. For a server that is taken for another
    one, or for a gateway that hides the routes by which it would be recognized."""
    model: str | None = None
    """Name of the model in requests. Only for OpenAI-compatible endpoints (openai_echo), if the server has several."""
    tokens_per_minute: Positive | None = None
    """Maximum number of tokens sent to the teacher in any minute, by all processes of the run together. Default: no
    limit. A limit that the server reports (429 with Retry-After, x-ratelimit-…) is respected in any case."""
    top_k: Positive = 64
    """Number of candidates requested at every position."""
    signal: Annotated[str, one_of(SIGNALS)] = "byte_chain"
    """How the teacher's knowledge enters the loss. `byte_chain`: its distributions are translated to the student's
    tokens by byte-chain alignment and fused with those of the other teachers. `em`, `min_ed`: fused too, aligned as in
    FuseLLM, for comparison. `alm`, `uld`: a separate term of the loss that matches the likelihoods of common spans
    (ALM), or sorted probabilities (ULD)."""
    weight: Weight = 1.0
    """Weight in the fusion, or of the separate term of the loss, relative to the other teachers."""
    final_weight: Weight | None = None
    """Weight at the end of the run, where fusion.schedule changes weights. Default: `weight`."""
    roles: Roles = {}
    """Special tokens by role (bos, eos, end_of_turn, pad, unk), given as token strings, where the tokenizer's own
    configuration is wrong."""
    chat_template: PathText | None = None
    """File with a chat template that replaces the model's own."""
    timeout_s: Seconds = 120.0
    """Total time limit of one request."""
    start_timeout_s: Annotated[float, Field(ge=0, le=86_400)] = 600.0
    """Time for which a run waits at its start until a replica responds and is ready; 0 to try once. An error that only
    the user can correct, such as a wrong key or certificate, ends the run at once."""
    unavailable_timeout_s: Seconds = 600.0
    """Time without a response from any replica after which the teacher counts as lost."""
    on_unavailable: Literal["wait", "drop", "stop"] = "wait"
    """What happens if no replica responds: `wait` ends the run after unavailable_timeout_s, `drop` continues without
    the teacher until it is back, `stop` ends the run as soon as no replica is left."""
    concurrency: Positive = 32
    """Maximum number of concurrent requests of each process to each replica. The run adapts the number to the
    measured throughput."""
    serve: RayServeOptions | None = None
    """[teachers.serve] How `tutelage serve-ray` runs the teacher on Ray Serve. Its URL is then http://HOST:PORT/NAME."""

    @model_validator(mode="after")
    def _check(self) -> "TeacherConfig":
        if not self.urls and self.urls_file is None:
            raise ValueError("urls: expected at least one address, or a urls_file that lists them")
        for url in self.urls:
            canonical_url(self.name, url)  # no ValueError, whose message would repeat the value
        if self.ca_file and self.urls_file is None and not any(url.lower().startswith("https:") for url in self.urls):
            raise ValueError("ca_file: no address begins with https://, so no certificate is checked")
        return self

    @property
    def end_weight(self) -> float:
        """Weight at the end of the run."""
        return self.weight if self.final_weight is None else self.final_weight

    @property
    def is_fused(self) -> bool:
        """Whether the signal yields a target over the student's tokens, which is fused with the other teachers'."""
        return signal_class(self.signal).fused

    @property
    def supports_chats(self) -> bool:
        """Whether the signal aligns chats, not only texts."""
        return signal_class(self.signal).supports_chats
