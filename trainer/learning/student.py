"""The student: a causal language model that is trained, split into its trunk and its head.

The trunk gives hidden states, the head turns chosen ones into logits, so that the loss decides how many logits
exist at once. What is trained is float32; bf16 is what is computed in.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

from alignment import Vocabulary
from alignment.spans import Tokens
from teachers.weights import load_model
from trainer.config import LoraConfig, RunConfig, StudentConfig
from trainer.data.reading import Reader, chat_template
from trainer.errors import ConfigError
from trainer.learning.adapters import add_adapters, merged
from trainer.learning.losses import Head
from trainer.learning.packing import pack
from trainer.learning.sharding import layers_of, mesh_of, shard
from trainer.places import find_model
from trainer.ranks import Ranks

log = logging.getLogger("tutelage.student")
NEWLINE = "\n"
LEAK = 5e-5  # of the largest state: float32 rounds by 2e-6 of it, what runs on in a model of new weights was 1.4e-4
RECOMPILE_LIMIT = 64  # torch's 8 are not enough for Gemma 3, whose layers would then run uncompiled
COPIED = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "generation_config")
PROCESSORS = ("preprocessor_config", "processor_config", "video_preprocessor_config")  # of what is not text
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
    if model.get_decoder() is model:
        raise ConfigError(f"student.model: {type(model).__name__} does not say what of it is its trunk")
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


Work = Callable[[Head, Tensor], tuple[Tensor, ...]]


class Core(nn.Module):
    """The model, and what is done with its head and hidden states, as one module: sharded, all of it is whole here."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BL: Tensor, positions_BL: Tensor, states_T: Tensor, work: Work) -> tuple[Tensor, ...]:
        trunk = self.model.get_decoder()
        hidden_BLD = trunk(input_ids=ids_BL, position_ids=positions_BL, use_cache=False).last_hidden_state
        return work(head_of(self.model), hidden_BLD.flatten(0, 1)[states_T])


@dataclass(frozen=True, eq=False)
class Student:
    """model and tokenizer; `first_position` is the first token it predicts: 0 with BOS in front, else 1.

    packs: whether several samples in one row do not see each other in this model.
    """

    core: Core
    vocabulary: Vocabulary
    folder: Path
    device: str
    autocast: bool
    packs: bool
    lora: LoraConfig | None = None

    @property
    def model(self) -> Any:
        return self.core.model

    @property
    def first_position(self) -> int:
        return 0 if self.vocabulary.prefix else 1

    @property
    def max_tokens(self) -> int:
        """Longest window, BOS not counted."""
        limit: int = getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 31)
        return limit - len(self.vocabulary.prefix)

    def precision(self) -> AbstractContextManager[Any]:
        kind = self.device.partition(":")[0]
        return torch.autocast(kind, dtype=torch.bfloat16) if self.autocast else nullcontext()

    def compute(self, samples: Sequence[Tokens], wanted: Sequence[NDArray[np.bool_]], work: Work) -> tuple[Tensor, ...]:
        """What `work` makes of the head and [T, D] the states that predict the wanted tokens, sample after sample.

        wanted[i]: of its tokens first_position … , which. The only way to hidden states, for they are never kept.
        """
        prefix = self.vocabulary.prefix
        sequences = [np.concatenate([prefix, tokens.ids]).astype(np.int64) for tokens in samples]
        packed = pack(sequences, wanted, together=self.packs)
        arrays = (packed.ids_BL, packed.positions_BL, packed.states_T)
        with self.precision():
            result: tuple[Tensor, ...] = self.core(*(torch.from_numpy(a).to(self.device) for a in arrays), work)
        return result

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def weights(self) -> dict[str, Tensor]:
        """All weights, whole and on the CPU, adapters merged; on the first rank. All ranks call it together."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(self.model, options=whole)
        return merged(self.folder, self.lora, weights) if self.lora and weights else weights

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a Hugging Face directory that transformers and vLLM load, with the base model's tokenizer and terms.

        Weights are of the base model's own type; what is tied in the model is written once.
        """
        dtype = AutoConfig.from_pretrained(self.folder, local_files_only=True).dtype or torch.float32
        model = self.model if self.lora is None else load_model(self.folder, torch.float32)
        kept = {name: tensor.detach() for name, tensor in weights.items() if name not in model.all_tied_weights_keys}
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in kept.items()}
        with _without_generation_config(model, self.folder):
            model.save_pretrained(folder, state_dict=cast)
        _say_dtype(folder, dtype)
        for path in self.folder.iterdir():
            if path.is_file() and path.name.startswith(COPIED + PROCESSORS + TERMS):
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
        if part is not None:
            part.dtype = dtype
    config.save_pretrained(folder)


def keeps_apart(model: Any) -> bool:
    """Whether two samples in one row give the states that each gives alone. Warns where they do not."""
    two = [torch.arange(length, device=model.device) % model.config.get_text_config().vocab_size for length in (5, 7)]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        run = partial(model.get_decoder(), use_cache=False)
        alone = [run(input_ids=ids[None], position_ids=_counted(ids)).last_hidden_state[0] for ids in two]
        positions = torch.cat([_counted(ids) for ids in two], 1)
        row = run(input_ids=torch.cat(two)[None], position_ids=positions).last_hidden_state[0]
    model.train(was_training)
    apart = float((row - torch.cat(alone)).abs().max()) <= LEAK * max(1.0, float(row.abs().max()))
    if not apart:
        log.warning("%s sees from one sample to the next in a row: each has a row of its own", type(model).__name__)
    return apart


def _counted(ids: Tensor) -> Tensor:
    return torch.arange(len(ids), device=ids.device)[None]


def reader_of(folder: Path, vocabulary: Vocabulary, config: RunConfig) -> Reader:
    """How the student reads samples. Raises ChatError if it is to read chats and has no template."""
    if not config.data.has_chats:
        return Reader(vocabulary, vocabulary.prefix)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    template = chat_template(files, vocabulary, config.student.roles, config.student.chat_template)
    return Reader(vocabulary, vocabulary.prefix, template)


def check_device(device: str) -> None:
    """Raise ConfigError for a GPU where there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"student.device is {device}, but torch finds no GPU here")


def check_folder(folder: Path, config: RunConfig) -> int:
    """How many ids the student's model has, without loading it. Raises ConfigError for what `load_student` refuses."""
    try:
        base = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"student.model: cannot read {folder}: {str(error).partition(NEWLINE)[0]}") from error
    if type(base) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"student.model: transformers has no causal language model for {base.model_type}")
    model = base.get_text_config()
    if not any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        raise ConfigError(f"student.model: {folder} has no weights")
    layers = getattr(model, "num_hidden_layers", 1 << 31)
    if (config.student.train_layers or 0) > layers:
        raise ConfigError(f"student.train_layers is {config.student.train_layers}, but the model has {layers} layers")
    limit = getattr(model, "max_position_embeddings", 1 << 31)
    if config.data.window_tokens > limit:
        raise ConfigError(f"data.window_tokens is {config.data.window_tokens}, the student takes {limit}")
    num_ids: int = getattr(model, "vocab_size", 1 << 31)
    return num_ids


def load_student(config: StudentConfig, ranks: Ranks = Ranks()) -> Student:
    """Load, choose what is trained, and share it out over the ranks, which take turns on each machine.

    Raises ConfigError if the model is not there or cannot be trained as the run file says, TokenizerError if its
    tokenizer is not there or writes ids that it has not.
    """
    check_device(config.device)
    folder, device = find_model(config.model), ranks.device(config.device)
    vocabulary = Vocabulary.load(folder).with_roles(config.roles)
    autocast = config.precision == "bf16" and ranks.size == 1
    if ranks.size == 1:
        core, packs = _prepared(config, folder)
        if autocast:
            halve_frozen(core.model.get_decoder())
        with _load_errors(folder, device):
            core.to(device)
    else:
        mesh = mesh_of(device, ranks)
        with ranks.one_after_another():
            core, packs = _prepared(config, folder)
            shard(core, layers_of(core.model), mesh, bf16=config.precision == "bf16")
    vocabulary = vocabulary.within(core.model.get_input_embeddings().num_embeddings)
    return Student(core, vocabulary, folder, device, autocast, packs, config.lora)


@contextmanager
def _load_errors(folder: Path, device: str) -> Iterator[None]:
    """What libraries raise, as ConfigError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"student.model: cannot load {folder} on {device}: {reason}") from error


def _prepared(config: StudentConfig, folder: Path) -> tuple[Core, bool]:
    """The whole model on the CPU, checked, with what is trained chosen; whether it keeps samples in a row apart."""
    with _load_errors(folder, "cpu"):
        model = load_model(folder, torch.float32).train()
    check_head(model)
    packs = keeps_apart(model)
    if config.train_layers is not None:
        train_upper_layers(model, config.train_layers)
    if config.lora is not None:
        add_adapters(model, config.lora)
    _freeze_what_is_not_called(model)
    if config.activation_checkpointing:
        _checkpoint_activations(model)
    if config.compile:
        _compile(layers_of(model))
    return Core(model), packs


def _freeze_what_is_not_called(model: Any) -> None:
    """Text reaches trunk and head; of a model with other parts, for pictures say, those stay as they are."""
    called = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in called:
            parameter.requires_grad_(False)


def _checkpoint_activations(model: Any) -> None:
    """Raises ConfigError if the model cannot."""
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"student.activation_checkpointing: {error}") from error
    model.disable_input_require_grads()  # only the reentrant way needs it; it has frozen layers computed twice too


def _compile(layers: nn.ModuleList) -> None:
    """All layers share one code, so what each kind of layer, of mask, of row and of mode needs counts together."""
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    for layer in layers:
        layer.compile()


def halve_frozen(trunk: nn.Module) -> None:
    """Keep frozen matrices in bf16, in place, where it holds them exactly: autocast multiplies in it anyway.

    It takes half of their memory and changes no bit of what is computed and exported.
    """
    for module in trunk.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            half = module.weight.detach().to(torch.bfloat16)
            if torch.equal(half.float(), module.weight):
                module.weight.data = half


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
