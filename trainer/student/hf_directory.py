"""Export of a trained model as a Hugging Face directory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "generation_config")
PROCESSORS = ("preprocessor_config", "processor_config", "video_preprocessor_config")  # of multimodal models
LICENSES = ("LICENSE", "NOTICE")


def write_hf_directory(model: Any, weights: Mapping[str, Tensor], *, base: Path, folder: Path) -> None:
    """Write `weights` in the architecture of `model`, with the base model's tokenizer, processors and licenses.

    Weights are cast to the base model's type. Tied weights are written once.
    """
    dtype = AutoConfig.from_pretrained(base, local_files_only=True).dtype or torch.float32
    untied = {name: tensor.detach() for name, tensor in weights.items() if name not in model.all_tied_weights_keys}
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in untied.items()}
    with _without_generation_config(model, base):
        model.save_pretrained(folder, state_dict=cast)
    _set_config_dtype(folder, dtype)
    for path in base.iterdir():
        if path.is_file() and path.name.startswith(TOKENIZER + PROCESSORS + LICENSES):
            (folder / path.name).write_bytes(path.read_bytes())


@contextmanager
def _without_generation_config(model: Any, base: Path) -> Iterator[None]:
    """Replace the generation config in the block by a default if the base model has the file.

    transformers refuses to save some generation configs that it loads. The base model's file is copied unchanged.
    """
    own = model.generation_config
    if (base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _set_config_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Write `dtype` to config.json, where `save_pretrained` has written the type used in training."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for section in (config, *(getattr(config, name) for name in config.sub_configs)):
        if section is not None:
            section.dtype = dtype
    config.save_pretrained(folder)
