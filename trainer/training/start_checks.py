"""Checks at the start of a run, before anything is written. `train` and `doctor` call the same functions."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from alignment import Vocabulary
from trainer.config import RunConfig
from trainer.errors import ConfigError, DataError
from trainer.fusion.run_fuser import check_routes
from trainer.paths import exists, resolve_model_dir
from trainer.query.connect import check_chat_support
from trainer.sources.corpus import Corpus, load_corpus
from trainer.student.checks import check_device, check_folder, load_vocabulary
from trainer.telemetry.jsonl import METRICS_FILE
from trainer.telemetry.tracking import check_trackers

OUTPUT_NAMES = (
    METRICS_FILE,
    "checkpoints",
    "model",
    ".partial-model",
    ".previous-model",
    "tensorboard",
    "mlflow",
    "wandb",
    "ray",
)
"""What a run writes in its folder."""


@dataclass(frozen=True, eq=False)
class StudentFiles:
    """The student's model directory and its vocabulary, read without loading weights."""

    folder: Path
    vocabulary: Vocabulary


def check_settings(config: RunConfig, num_processes: int = 1) -> None:
    """Check what the run file alone determines: device, packages, output folder and batch size.

    Raises ConfigError or TrackingError.
    """
    check_device(config.student.device)
    if config.student.lora is not None and find_spec("peft") is None:
        raise ConfigError("student.lora: peft is not installed: install the extra `lora`")
    check_trackers(config.tracking)
    _check_output(Path(config.output.dir).expanduser())
    if config.train.batch_samples < num_processes:
        raise ConfigError(
            f"train.batch_samples is {config.train.batch_samples}, fewer than the {num_processes} processes"
        )


def _check_output(out: Path) -> None:
    """Raise ConfigError if output.dir is a file or contains links through which the run would write elsewhere."""
    if exists(out) and not out.is_dir():
        raise ConfigError(f"output.dir: {out} is a file")
    for name in OUTPUT_NAMES:
        if (out / name).is_symlink():
            raise ConfigError(
                f"output.dir: {out / name} is a link, and the run would write where it points: remove it, or set "
                "output.dir to another folder"
            )


def check_student(config: RunConfig) -> StudentFiles:
    """Check the student's files, its tokenizer, and the window length with BOS and EOS against the model's limit.

    Raises ConfigError or TokenizerError.
    """
    folder = resolve_model_dir(config.student.model)
    limits = check_folder(folder, config.student)
    vocabulary = load_vocabulary(folder, limits.num_ids, config.student.roles)
    closes = config.data.close_documents or config.rollout is not None
    longest = config.data.window_tokens + len(vocabulary.prefix) + closes
    if longest > limits.max_tokens:
        parts = [part for part, used in (("BOS", vocabulary.prefix), ("EOS", closes)) if used]
        counted = f" ({longest} with {' and '.join(parts)})" if parts else ""
        raise ConfigError(
            f"data.window_tokens is {config.data.window_tokens}{counted}, the student takes {limits.max_tokens} tokens"
        )
    return StudentFiles(folder, vocabulary)


def check_data(config: RunConfig, vocabulary: Vocabulary) -> tuple[Corpus, int]:
    """Index the data, and return the corpus and the number of steps.

    Raises DataError or ConfigError for invalid records, samples without a valid teacher, or too few samples.
    """
    corpus = load_corpus(config.data, config.eval, vocabulary, config.train.seed)
    check_chat_support(config.teachers, corpus)
    if config.data.close_documents and all(source.is_chat for source in corpus.sources):
        raise ConfigError("data.close_documents: the chat template defines the end of a chat; remove the key")
    _check_prompts(config, vocabulary, corpus)
    check_routes(corpus.train, config)
    return corpus, total_steps(config, corpus)


def _check_prompts(config: RunConfig, vocabulary: Vocabulary, corpus: Corpus) -> None:
    """Raise ConfigError if the student cannot write rollouts of a source, or cannot end them."""
    if config.rollout is None:
        return
    if "eos" not in vocabulary.roles:
        raise ConfigError("student.roles: rollouts end with EOS, which the student's tokenizer does not have; set eos")
    for source in corpus.sources:
        if not (source.has_prompt or source.is_chat) and config.rollout.prompt_tokens is None:
            raise ConfigError(
                f"rollout.prompt_tokens: source {source.name} has {source.format}, without prompts; set the number of "
                "tokens at the start of a window that are its prompt"
            )


def unreached_steps(config: RunConfig, num_steps: int) -> list[str]:
    """Return a warning if the epochs end the run before train.steps."""
    if config.train.steps is None or config.train.steps <= num_steps:
        return []
    return [
        f"warning: train.steps is {config.train.steps}, but train.epochs = {config.train.epochs} ends the run after "
        f"{num_steps} steps: raise train.epochs, or remove train.steps"
    ]


def total_steps(config: RunConfig, corpus: Corpus) -> int:
    """Return the number of batches in all epochs, at most train.steps. The last batch may be smaller than the others.

    Raises DataError if there is no sample, and ConfigError if the warm-up is longer than the run.
    """
    samples = config.train.epochs * corpus.order.epoch_samples
    if samples == 0:
        raise DataError("an epoch has no sample: raise the weights of data.sources or add text")
    in_epochs = -(-samples // config.train.batch_samples)
    steps = min(in_epochs, config.train.steps or in_epochs)
    if config.optim.warmup_steps > steps:
        raise ConfigError(f"optim.warmup_steps is {config.optim.warmup_steps}, more than the {steps} steps of the run")
    return steps
