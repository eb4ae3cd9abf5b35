"""Low-rank adapters (LoRA, arXiv 2106.09685) with peft: added before training, merged into the weights for export."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.model_loading import load_model
from trainer.errors import ConfigError
from trainer.student.config import LoraConfig


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Freeze the model and add adapters to its layers, in place.

    Raises ConfigError if peft is not installed, if no layer matches `targets`, or if the head or the embeddings match.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("student.lora: peft is not installed; install the extra lora of Tutelage") from error
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    try:
        inject_adapter_in_model(_peft_config(config), model)
    except ValueError as error:
        raise ConfigError(f"student.lora.targets: {error}") from error
    adapted = [name for name, p in model.named_parameters() if p.requires_grad]
    head = model.get_output_embeddings()
    if any(p.requires_grad for p in head.parameters()):
        raise ConfigError(
            "student.lora.targets: the head cannot have an adapter, because the loss uses its weight directly"
        )
    if model.get_input_embeddings() is not embeddings:
        raise ConfigError("student.lora.targets: the embeddings cannot have an adapter, which a tied head would ignore")
    if not adapted:
        raise ConfigError(f"student.lora.targets: no layer of {type(model).__name__} matches {config.targets}")


def merge_adapters(folder: Path, config: LoraConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the base model's weights with the adapters merged; `weights` are those of a model with adapters."""
    from peft import get_peft_model

    model = load_model(folder, torch.float32)
    with_adapters = get_peft_model(model, _peft_config(config))
    model.load_state_dict(weights)  # get_peft_model changed `model` in place; names are those of training
    result: dict[str, Tensor] = with_adapters.merge_and_unload().state_dict()
    return result


def _peft_config(config: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft accepts floats
        lora_dropout=config.dropout,
        target_modules=config.targets,
        task_type="CAUSAL_LM",
    )
