"""Checks of the student: limits from its files, and tests that its LM head and packing are computed correctly."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment import Vocabulary
from teachers.model_checks import ModelError, QuantizedError
from teachers.model_loading import load_config
from trainer.errors import ConfigError
from trainer.student.config import StudentConfig
from trainer.student.model import lm_head_of

log = logging.getLogger("tutelage.student")

UNLIMITED = 1 << 31
MAX_LOGIT_ERROR = 1e-3  # of the largest logit: head and decoder must reproduce the model's logits this closely
MAX_LEAK = 5e-5  # of the largest hidden state; float32 rounding measured 2e-6, state leaked by a new SSM model 1.4e-4


def check_device(device: str) -> None:
    """Raise ConfigError if a GPU is configured and torch finds none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"student.device is {device}, but torch finds no GPU here; set it to cpu")


@dataclass(frozen=True)
class StudentLimits:
    """Number of token ids, and longest sequence in tokens, BOS and EOS included."""

    num_ids: int
    max_tokens: int


def check_folder(folder: Path, config: StudentConfig) -> StudentLimits:
    """Return the limits of the student without loading its weights.

    Raises ConfigError if the folder has no causal language model or no weights, or if train_layers exceeds its layers.
    """
    with student_errors():
        base = load_config(folder)
    model = base.get_text_config()
    num_layers = getattr(model, "num_hidden_layers", UNLIMITED)
    if (config.train_layers or 0) > num_layers:
        raise ConfigError(f"student.train_layers is {config.train_layers}, but the model has {num_layers} layers")
    max_tokens = getattr(model, "max_position_embeddings", UNLIMITED)
    return StudentLimits(getattr(model, "vocab_size", UNLIMITED), max_tokens)


def load_vocabulary(folder: Path, num_ids: int, roles: Mapping[str, str]) -> Vocabulary:
    """Return the student's vocabulary, limited to the ids of its model. Raises TokenizerError."""
    return Vocabulary.load(folder).within(num_ids).with_roles(roles)


@contextmanager
def student_errors() -> Iterator[None]:
    """Convert errors of a model directory raised in the block into ConfigError."""
    try:
        yield
    except QuantizedError as error:
        raise ConfigError(
            f"student.model: {error}, and quantized weights cannot be trained: use the model's unquantized weights"
        ) from error
    except ModelError as error:
        raise ConfigError(f"student.model: {error}") from error


def check_head(model: Any) -> None:
    """Raise ConfigError if decoder and LM head do not reproduce the model's logits.

    Such a model would be trained as a different function.
    """
    if model.get_decoder() is model:
        raise ConfigError(
            f"student.model: {type(model).__name__} is not supported: transformers does not separate its decoder from "
            "its head"
        )
    ids = torch.arange(min(8, model.get_input_embeddings().num_embeddings), device=model.device)[None]
    with _eval_mode(model):
        expected_TV = model(input_ids=ids, use_cache=False).logits[0]
        hidden_TD = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits_TV = lm_head_of(model).logits(hidden_TD)
    error = float((expected_TV - logits_TV).abs().max())
    if error > MAX_LOGIT_ERROR * max(1.0, float(expected_TV.abs().max())):
        raise ConfigError(
            f"student.model: {type(model).__name__} is not supported: its logits differ by {error:.3g} from those of "
            "its output projection, scale and soft cap"
        )


def packing_is_isolated(model: Any) -> bool:
    """Return whether two samples in one row give the same hidden states as each sample alone; warn otherwise."""
    samples = [torch.arange(n, device=model.device) % model.config.get_text_config().vocab_size for n in (5, 7)]
    with _eval_mode(model):
        run = partial(model.get_decoder(), use_cache=False)
        single = [run(input_ids=ids[None], position_ids=_positions(ids)).last_hidden_state[0] for ids in samples]
        positions = torch.cat([_positions(ids) for ids in samples], 1)
        packed = run(input_ids=torch.cat(samples)[None], position_ids=positions).last_hidden_state[0]
    isolated = float((packed - torch.cat(single)).abs().max()) <= MAX_LEAK * max(1.0, float(packed.abs().max()))
    if not isolated:
        log.warning("%s mixes the samples of one row: packing is disabled, each sample has a row", type(model).__name__)
    return isolated


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Run without dropout and gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(len(ids), device=ids.device)[None]
