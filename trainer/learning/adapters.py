"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: put into the model at first, merged into its weights at last."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.weights import load_model
from trainer.config import LoraConfig
from trainer.errors import ConfigError


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Freeze the model and give its layers adapters, in place. Raises ConfigError if there are no such layers."""
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("student.lora: peft is not installed: install Tutelage's extra lora") from error
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    try:
        inject_adapter_in_model(_peft(config), model)
    except ValueError as error:
        raise ConfigError(f"student.lora.targets: {error}") from error
    adapted = [name for name, p in model.named_parameters() if p.requires_grad]
    head = model.get_output_embeddings()
    if any(p.requires_grad for p in head.parameters()):
        raise ConfigError("student.lora.targets: the head cannot have an adapter; the loss reads its weight")
    if model.get_input_embeddings() is not embeddings:
        raise ConfigError("student.lora.targets: the embeddings cannot have an adapter; a tied head would not have it")
    if not adapted:
        raise ConfigError(f"student.lora.targets: {config.targets} is no layer of {type(model).__name__}")


def merged(folder: Path, config: LoraConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base model's weights with the adapters' products added; `weights` are of a model with adapters."""
    from peft import get_peft_model

    model = load_model(folder, torch.float32)
    with_adapters = get_peft_model(model, _peft(config))  # in place, so that names are those of training
    model.load_state_dict(weights)
    result: dict[str, Tensor] = with_adapters.merge_and_unload().state_dict()
    return result


def _peft(config: LoraConfig) -> Any:
    from peft import LoraConfig as Peft

    return Peft(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # it is only divided
        lora_dropout=config.dropout,
        target_modules=config.targets,
        task_type="CAUSAL_LM",
    )
