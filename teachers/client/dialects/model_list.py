"""The list of models that a stock server provides at /v1/models."""

import msgspec

from teachers.protocol.untrusted_text import clean

MAX_NAME_CHARS = 300  # of a model, which requests and messages repeat, and of its source


class Model(msgspec.Struct):
    """One entry of the list. A name that is too long or has unprintable characters is rejected.

    max_model_len   longest context in tokens, as vLLM and SGLang state it
    context_length  the same, as other servers state it
    root            directory or name from which the model was loaded
    parent          the base model of an adapter
    """

    id: str
    max_model_len: int | None = None
    context_length: int | None = None
    root: str | None = None
    parent: str | None = None

    def __post_init__(self) -> None:
        check_name(self.id)
        check_name(self.root or "")


class ModelList(msgspec.Struct):
    """Response of /v1/models."""

    data: list[Model]


def check_name(name: str) -> None:
    """Raise ValueError unless a name or a directory has at most MAX_NAME_CHARS, all of them printable."""
    if clean(name, MAX_NAME_CHARS) != name:
        raise ValueError(f"expected a name of at most {MAX_NAME_CHARS} printable characters")
