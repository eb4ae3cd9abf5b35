"""The student: a causal language model that is trained, split into its trunk and its head.

The trunk gives hidden states, the head turns chosen ones into logits, so that the loss decides how many logits
exist at once. Weights are float32; bf16 is autocast.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from alignment import Vocabulary
from alignment.spans import Tokens
from trainer.config import RunConfig, StudentConfig
from trainer.errors import ConfigError
from trainer.losses import Head
from trainer.places import find_model
from trainer.reading import Reader, chat_template

NEWLINE = "\n"
COPIED = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "generation_config")
TERMS = ("LICENSE", "NOTICE")  # that go with the weights
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def head_of(model: Any) -> Head:
    """The model's own output projection, with what its family does to logits."""
    projection, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    return Head(projection.weight, getattr(projection, "bias", None), scale, cap)


def check_head(model: Any) -> None:
    """Raise ConfigError where trunk and head are not all that makes its logits: it would train as another model."""
    ids = torch.arange(min(8, model.get_input_embeddings().num_embeddings), device=model.device)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected_TV = model(input_ids=ids, use_cache=False).logits[0]
        got_TV = head_of(model).logits(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0])
    model.train(was_training)
    worst = float((expected_TV - got_TV).abs().max())
    if worst > 1e-3 * max(1.0, float(expected_TV.abs().max())):
        raise ConfigError(
            f"student.model: {type(model).__name__} makes its logits in a way that is not known here: they differ by "
            f"{worst:.3g} from hidden states through its output projection"
        )


@dataclass(frozen=True, eq=False)
class Student:
    """model and tokenizer; `first_position` is the first token it predicts: 0 with BOS in front, else 1."""

    model: Any
    vocabulary: Vocabulary
    folder: Path
    device: str
    autocast: bool

    @property
    def first_position(self) -> int:
        return 0 if self.vocabulary.prefix else 1

    @property
    def max_tokens(self) -> int:
        """Longest window, BOS not counted."""
        limit: int = getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 31)
        return limit - len(self.vocabulary.prefix)

    @property
    def head(self) -> Head:
        return head_of(self.model)

    def precision(self) -> AbstractContextManager[Any]:
        kind = self.device.partition(":")[0]
        return torch.autocast(kind, dtype=torch.bfloat16) if self.autocast else nullcontext()

    def hidden(self, samples: Sequence[Tokens]) -> Tensor:
        """[T, D] the states that predict tokens first_position … of every sample, one sample after another."""
        prefix = self.vocabulary.prefix
        rows = [np.concatenate([prefix, tokens.ids]).astype(np.int64) for tokens in samples]
        longest = max(map(len, rows))
        ids_BL = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for i, row in enumerate(rows):
            ids_BL[i, : len(row)] = torch.from_numpy(row)
            mask_BL[i, : len(row)] = 1
        out = self.model.get_decoder()(
            ids_BL.to(self.device), attention_mask=mask_BL.to(self.device), use_cache=False
        ).last_hidden_state
        return torch.cat([out[i, : len(row) - 1] for i, row in enumerate(rows)])

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def export(self, folder: Path) -> None:
        """Write a Hugging Face directory that transformers and vLLM load, with the base model's tokenizer and terms.

        Weights are of the base model's own type; what is tied in the model is written once.
        """
        dtype = AutoConfig.from_pretrained(self.folder, local_files_only=True).dtype or torch.float32
        named = self.model.state_dict(keep_vars=True)
        cast = {id(p): p.detach().to(dtype) if p.is_floating_point() else p.detach() for p in named.values()}
        with _without_generation_config(self.model, self.folder):
            self.model.save_pretrained(folder, state_dict={name: cast[id(p)] for name, p in named.items()})
        _say_dtype(folder, dtype)
        for path in self.folder.iterdir():
            if path.is_file() and path.name.startswith(COPIED + TERMS):
                (folder / path.name).write_bytes(path.read_bytes())


@contextmanager
def _without_generation_config(model: Any, folder: Path) -> Iterator[None]:
    """Where the base has one it is copied as it is: transformers loads some that it refuses to save."""
    own = model.generation_config
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _say_dtype(folder: Path, dtype: torch.dtype) -> None:
    """In config.json, where `save_pretrained` has put what the model was trained in."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = dtype
    config.save_pretrained(folder)


def reader_of(folder: Path, vocabulary: Vocabulary, config: RunConfig) -> Reader:
    """How the student reads samples. Raises ChatError if it is to read chats and has no template."""
    if not config.data.has_chats:
        return Reader(vocabulary, vocabulary.prefix)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    template = chat_template(files, vocabulary, config.student.roles, config.student.chat_template)
    return Reader(vocabulary, vocabulary.prefix, template)


def check_folder(folder: Path, config: RunConfig) -> None:
    """What can be said of a student without loading it. Raises ConfigError for what `load_student` would refuse."""
    try:
        model = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigError(f"student.model: cannot read {folder}: {str(error).partition(NEWLINE)[0]}") from error
    if not any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        raise ConfigError(f"student.model: {folder} has no weights")
    layers = getattr(model, "num_hidden_layers", 1 << 31)
    if (config.student.train_layers or 0) > layers:
        raise ConfigError(f"student.train_layers is {config.student.train_layers}, but the model has {layers} layers")
    limit = getattr(model, "max_position_embeddings", 1 << 31)
    if config.data.window_tokens > limit:
        raise ConfigError(f"data.window_tokens is {config.data.window_tokens}, the student takes {limit}")


def load_student(config: StudentConfig) -> Student:
    """Load and choose what is trained. Raises ConfigError if the model is not there or has too few layers."""
    folder = find_model(config.model)
    vocabulary = Vocabulary.load(folder).with_roles(config.roles)
    loader: Any = AutoModelForCausalLM
    try:
        model = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(config.device).train()
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:  # what the libraries raise
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"student.model: cannot load {folder} on {config.device}: {reason}") from error
    check_head(model)
    if config.train_layers is not None:
        train_upper_layers(model, config.train_layers)
    return Student(model, vocabulary, folder, config.device, config.precision == "bf16")


def train_upper_layers(model: Any, num_layers: int) -> None:
    """Freeze everything but the uppermost layers and the final norm."""
    trunk = model.get_decoder()
    if not hasattr(trunk, "layers") or not hasattr(trunk, "norm"):
        raise ConfigError(
            f"student.train_layers: {type(model).__name__} has no layers and norm to choose; leave it out"
        )
    if num_layers > len(trunk.layers):
        raise ConfigError(f"student.train_layers is {num_layers}, but the model has {len(trunk.layers)} layers")
    model.requires_grad_(False)
    for module in [*trunk.layers[-num_layers:], trunk.norm]:
        module.requires_grad_(True)
