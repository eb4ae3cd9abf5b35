"""Export of a trained model as a Hugging Face directory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from kernel_cache.hub_cache import file_inside
from teachers.model_loading import read_config

COPIED = (  # by exact names: a directory can contain anything
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model"),
    "generation_config.json",
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),  # multimodal models
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENSE-MODEL", "LICENSE-CODE", "NOTICE", "NOTICE.txt", "NOTICE.md"),
)


def write_hf_directory(model: Any, weights: Mapping[str, Tensor], *, base: Path, folder: Path) -> None:
    """Write `weights` in the architecture of `model`, with the base model's tokenizer, processors and licenses.

    Weights are cast to the base model's type. Tied weights are written once.
    """
    dtype = read_config(base).dtype or torch.float32
    untied = {name: tensor.detach() for name, tensor in weights.items() if name not in model.all_tied_weights_keys}
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in untied.items()}
    with _without_generation_config(model, base):
        model.save_pretrained(folder, state_dict=cast)
    _set_config_dtype(folder, dtype)
    for path in filter(None, (file_inside(base, name) for name in COPIED)):
        (folder / path.name).write_bytes(path.read_bytes())


@contextmanager
def _without_generation_config(model: Any, base: Path) -> Iterator[None]:
    """Replace the generation config in the block by a default if the base model has the file.

    transformers refuses to save some generation configs that it loads. The base model's file is copied unchanged.
    """
    own = model.generation_config
    if file_inside(base, "generation_config.json"):
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _set_config_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Write `dtype` to config.json, where `save_pretrained` has written the type used in training."""
    config = read_config(folder)
    for section in (config, *(getattr(config, name) for name in config.sub_configs)):
        if section is not None:
            section.dtype = dtype
    config.save_pretrained(folder)
