"""Where models are, and what they are called: a directory, or a name in this project's cache."""

import json
import os
from pathlib import Path


def cache_dir() -> Path:
    """$TUTELAGE_CACHE, by default ~/.cache/tutelage."""
    return Path(os.environ.get("TUTELAGE_CACHE") or "~/.cache/tutelage").expanduser()


def model_folder(name: str) -> Path:
    """The directory of that path, or of that name under the cache; the path itself if there is neither."""
    path, cached = Path(name).expanduser(), cache_dir() / "models" / name
    return cached if cached.is_dir() and not path.is_dir() else path


def name_of(folder: Path) -> tuple[str, str | None]:
    """Name and revision. In a hub's cache they are in the path: models--OWNER--NAME/snapshots/REVISION."""
    if in_hub_cache(folder, "snapshots"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.name
    return folder.name, None


def in_hub_cache(path: Path, kind: str) -> bool:
    """Whether a hub's cache holds it in its folder `kind`, snapshots or blobs."""
    return path.parent.name == kind and path.parent.parent.name.startswith("models--")


def bos_of(tokenizer_json: bytes, tokenizer_config: bytes, of_model: int | None) -> int | None:
    """The tokenizer's own BOS; the model configuration's where the tokenizer names none.

    They are not always one: DeepSeek-R1-Distill-Qwen's configuration has its EOS there.
    """
    token = json.loads(tokenizer_config).get("bos_token")
    spelled = token.get("content") if isinstance(token, dict) else token
    if spelled is None:
        return of_model
    added = json.loads(tokenizer_json).get("added_tokens", [])
    return next((one["id"] for one in added if one["content"] == spelled), of_model)
