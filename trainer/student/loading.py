"""Load the student: selection of trained weights, precision and sharding."""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch._dynamo import config as dynamo

from alignment import Vocabulary
from alignment.tokenizers.folder import tokenizer_files
from teachers.model_checks import model_errors
from teachers.model_loading import bf16_is_native, load_model
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.paths import resolve_model_dir
from trainer.sources.config import DataConfig
from trainer.student.checks import check_device, check_head, load_vocabulary, packing_is_isolated, student_errors
from trainer.student.config import StudentConfig
from trainer.student.fsdp import decoder_layers, make_mesh, shard
from trainer.student.lora import add_adapters
from trainer.student.model import Student, StudentModule
from trainer.student.router_loss import router_loss_of
from trainer.tokenization import SampleTokenizer, load_chat_template

RECOMPILE_LIMIT = 64  # torch's default of 8 is too low for Gemma 3: its layers would then run uncompiled


def load_student(config: StudentConfig, ranks: Ranks = Ranks()) -> Student:
    """Load the model, select what is trained, and shard it over the ranks, one rank per machine at a time.

    Raises ConfigError if the model does not exist or cannot be trained as configured, and TokenizerError if its
    tokenizer does not exist or produces ids that the model does not have.
    """
    check_device(config.device)
    folder, device = resolve_model_dir(config.model), ranks.device(config.device)
    precision = resolve_precision(config.precision, device)
    autocast = precision == "bf16" and ranks.size == 1
    if ranks.size == 1:
        module, packing = prepare_module(config, folder)
        if autocast:
            cast_frozen_to_bf16(module.model.get_decoder())
        with student_errors(), model_errors(folder, f" on {device}"):
            module.to(device)
    else:
        mesh = make_mesh(device, ranks)
        with ranks.one_per_machine_at_a_time():
            module, packing = prepare_module(config, folder)
            shard(module, decoder_layers(module.model), mesh, bf16=precision == "bf16")
    vocabulary = load_vocabulary(folder, module.model.get_input_embeddings().num_embeddings, config.roles)
    return Student(module, vocabulary, folder, device, autocast, packing, config.lora)


def resolve_precision(precision: str, device: str) -> Literal["bf16", "fp32"]:
    """Return the precision of matrix products. "auto" is bf16 if the device computes it natively, else fp32.

    Raises ConfigError for another value.
    """
    if precision == "auto":
        return "bf16" if bf16_is_native(device) else "fp32"
    if precision not in ("bf16", "fp32"):
        raise ConfigError(f"student.precision: expected auto, bf16 or fp32, received {precision!r}")
    return cast(Literal["bf16", "fp32"], precision)


def student_tokenizer(
    folder: Path, vocabulary: Vocabulary, config: StudentConfig, data: DataConfig, has_chats: bool
) -> SampleTokenizer:
    """Return the tokenizer of samples. Raises ChatError if the data has chats and the model has no chat template."""
    if not has_chats:
        return SampleTokenizer(vocabulary, vocabulary.prefix)
    template = load_chat_template(
        tokenizer_files(folder), vocabulary, config.roles, config.chat_template, data.supervision
    )
    return SampleTokenizer(vocabulary, vocabulary.prefix, template)


# --- selection of trained weights ---


def prepare_module(config: StudentConfig, folder: Path) -> tuple[StudentModule, bool]:
    """Load the model on the CPU, check it and select what is trained. Returns whether samples may share rows, too.

    `doctor` calls the same function. Raises ConfigError if the model cannot be trained as configured.
    """
    with student_errors(), model_errors(folder, keep=ConfigError):
        model = load_model(folder, torch.float32).train()
        check_head(model)
        packing = packing_is_isolated(model)
    if config.train_layers is not None:
        train_upper_layers(model, config.train_layers)
    if config.lora is not None:
        add_adapters(model, config.lora)
    _freeze_unused(model)
    if config.activation_checkpointing:
        _checkpoint_activations(model)
    if config.compile:
        _compile(decoder_layers(model))
    return StudentModule(model, router_loss_of(model, config.router_aux_loss_weight)), packing


def train_upper_layers(model: Any, num_layers: int) -> None:
    """Freeze everything except the uppermost layers and the final norm. Raises ConfigError if they do not exist."""
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers") or not hasattr(decoder, "norm"):
        raise ConfigError(
            f"student.train_layers: the decoder of {type(model).__name__} has no layers or no norm; remove the key"
        )
    if num_layers > len(decoder.layers):
        raise ConfigError(f"student.train_layers is {num_layers}, but the model has {len(decoder.layers)} layers")
    model.requires_grad_(False)
    for module in [*decoder.layers[-num_layers:], decoder.norm]:
        module.requires_grad_(True)


def _freeze_unused(model: Any) -> None:
    """Freeze the parameters outside decoder and LM head, such as the vision tower of a multimodal model."""
    used = {id(p) for module in (model.get_decoder(), model.get_output_embeddings()) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def _checkpoint_activations(model: Any) -> None:
    """Enable activation checkpointing. Raises ConfigError if the model does not support it."""
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"student.activation_checkpointing: {error}") from error
    # only reentrant checkpointing needs inputs with gradients; they would make frozen layers run twice as well
    model.disable_input_require_grads()


def _compile(layers: nn.ModuleList) -> None:
    """Compile every layer. All layers share one code object, whose recompilations count towards one limit."""
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    for layer in layers:
        layer.compile()


def cast_frozen_to_bf16(decoder: nn.Module) -> None:
    """Store frozen matrices in bf16, in place, if bf16 represents them exactly.

    Autocast multiplies in bf16 anyway, so results and export do not change; the matrices take half of the memory.
    """
    for module in decoder.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            bf16 = module.weight.detach().to(torch.bfloat16)
            if torch.equal(bf16.float(), module.weight):
                module.weight.data = bf16
