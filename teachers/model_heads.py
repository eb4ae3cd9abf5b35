"""Check the stored LM head of a model directory against tie_word_embeddings of its configuration.

transformers uses a head of its own beside a tied configuration and only warns; vLLM ignores such a head. Without a head
beside an untied configuration, either initializes it at random. Both cases are refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teachers.model_checks import model_errors, read_weights

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "tok_embeddings.weight")
CHUNK_BYTES = 1 << 24


def check_head_files(folder: Path, is_tied: bool) -> None:
    """Raise ModelError if the files have another head than `is_tied` says. Quantized heads are not compared."""
    with model_errors(folder):
        tensors = read_weights(folder)
        head = find_tensor(tensors, HEADS)
        embeddings = find_tensor(tensors, EMBEDDINGS)
        if embeddings is None:
            return
        if is_tied and head is not None and not _are_equal(tensors[head], tensors[embeddings]):
            raise ValueError(
                f"its config.json ties the head to the embeddings, but {head} differs from {embeddings}: set "
                "tie_word_embeddings to false in config.json to use the stored head"
            )
        if not is_tied and not any(part in name for name in tensors for part in ("head", "output", "embed_out")):
            raise ValueError(
                f"its files lack the model's head, and its config.json does not tie it to {embeddings}: set "
                "tie_word_embeddings to true in config.json if the model shares them"
            )


def find_tensor(tensors: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the shortest tensor name that is one of `names` or ends with a dot and one of them; None without one."""
    found = [t for t in tensors for name in names if t == name or t.endswith(f".{name}")]
    return min(found, key=len, default=None)


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare two stored tensors; True if their types differ, as a cast changes bytes but not the head."""
    if one["dtype"] != other["dtype"]:
        return True
    if one["shape"] != other["shape"]:
        return False
    remaining = one["num_bytes"]
    with one["file"].open("rb") as first, other["file"].open("rb") as second:
        first.seek(one["begin"])
        second.seek(other["begin"])
        while remaining > 0:
            count = min(CHUNK_BYTES, remaining)
            if first.read(count) != second.read(count):
                return False
            remaining -= count
    return True
