"""The identity of a run: everything that must not change when it is resumed, or between its processes.

A checkpoint stores the identity. A run with another identity cannot be resumed from it. RESUME_RULES defines what else
may change on --resume, and which of the changes are reported with a warning.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from teachers.model_dirs import weights_sha256
from teachers.protocol.messages import TeacherCard
from trainer.config import RunConfig
from trainer.distributed import Ranks
from trainer.errors import CheckpointError, ConfigError
from trainer.sources.corpus import Corpus

Identity = Mapping[str, Any]
StartValues = Mapping[str, Any]  # a start event of metrics.jsonl

ALLOWED, WARNED, REJECTED = "allowed", "allowed with a warning", "rejected"


@dataclass(frozen=True)
class ResumeRule:
    """Whether a change is accepted on --resume.

    effect  ALLOWED, WARNED or REJECTED
    what    what changes, for docs/running.md
    keys    patterns of keys of the run file
    """

    effect: str
    what: str
    keys: tuple[str, ...] = ()


RESUME_RULES = (
    ResumeRule(
        REJECTED,
        "the samples of each step",
        ("train.seed", "train.batch_samples", "data.sources*.weight"),
    ),
    ResumeRule(
        REJECTED,
        "the training samples: their contents, their number, their windows or their domains. A chat that is corrected "
        "or removed is another sample; skip it instead, with `data.invalid_chats`",
    ),
    ResumeRule(REJECTED, "the student's weights or its tokenizer"),
    ResumeRule(REJECTED, "the trained parameters", ("student.train_layers", "student.lora")),
    ResumeRule(REJECTED, "the method of fusion; with `adaptive`, also the names of the teachers", ("fusion.method",)),
    ResumeRule(REJECTED, "the model of a teacher. Another model is allowed under another name"),
    ResumeRule(REJECTED, "whether the run has a section `[rollout]`"),
    ResumeRule(REJECTED, "the held-out samples", ("eval.max_samples",)),
    ResumeRule(REJECTED, "fewer steps than the checkpoint has, by `train.steps` or `train.epochs`"),
    ResumeRule(
        ALLOWED,
        "the same student and the same samples elsewhere",
        ("student.model", *(f"data.sources*.{key}" for key in ("files", "dataset")), "data.max_invalid"),
    ),
    ResumeRule(
        ALLOWED,
        "speed and memory, with the number of processes. Results differ by rounding, by other masks of dropout and, "
        "with another number of processes, by other rollouts",
        (
            *(f"student.{key}" for key in ("device", "activation_checkpointing", "compile")),
            "loss.chunk_tokens",
            *(f"train.{key}" for key in ("gradient_accumulation_steps", "deterministic", "target_cache_bytes")),
            "train.prefetch_*",
        ),
    ),
    ResumeRule(
        ALLOWED,
        "addresses and limits of the same teachers",
        (
            *(f"teachers.*.{key}" for key in ("urls", "urls_file", "key_env", "key_file", "ca_file", "timeout_s")),
            *(f"teachers.*.{key}" for key in ("unavailable_timeout_s", "concurrency", "serve")),
        ),
    ),
    ResumeRule(
        ALLOWED,
        "the output",
        ("output.dir", "output.checkpoint_every_steps", "output.keep_checkpoints", "tracking.*"),
    ),
    ResumeRule(
        WARNED,
        "every other key: the schedule (`train.steps`, `train.epochs`, `[optim]`), `[loss]`, the names, weights and "
        "signals of the teachers, templates, and so on. The steps before the change keep the old value",
        ("*",),
    ),
)
"""The first rule that has a pattern for a key decides. Rules without keys are checks of files and of teachers."""

_HINTS = {"samples": " (other texts or chats, or other settings in [data] or eval.held_out_documents)"}


def run_identity(config: RunConfig, base_weights: str, tokenizer: str, corpus: Corpus) -> Identity:
    """Return the identity as JSON values: base weights, trained parameters, samples and their order, evaluation.

    base_weights  the hash that `base_weights_sha256` returns
    tokenizer     fingerprint of the student's vocabulary
    """
    return {
        "train.seed": config.train.seed,
        "train.batch_samples": config.train.batch_samples,
        "student.train_layers": config.student.train_layers,
        "student.lora": config.student.lora.model_dump() if config.student.lora else None,
        "fusion.method": config.fusion.method,
        "student weights": base_weights[:16],
        "student tokenizer": tokenizer[:16],
        "data.sources.weight": [source.weight for source in config.data.sources],
        "samples": corpus.fingerprint[:16],
        "eval.max_samples": config.eval.max_samples,
        **({"[rollout]": True} if config.rollout is not None else {}),
    }


def base_weights_sha256(folder: Path, ranks: Ranks) -> str:
    """Return the hash of the student's base model. The first process of each machine computes it.

    Raises ConfigError if two machines have different base models.
    """
    own = weights_sha256(folder) if ranks.local_rank == 0 else None
    hashes = {rank: sha256 for rank, sha256 in enumerate(ranks.all_gather(own)) if sha256 is not None}
    for rank, sha256 in hashes.items():
        if sha256 != hashes[0]:
            raise ConfigError(
                f"process 0 has student weights {hashes[0][:16]}, process {rank} has {sha256[:16]}: all machines need "
                "the same student"
            )
    return hashes[0]


def check_identity(saved: Identity, current: Identity, checkpoint: Path) -> None:
    """Raise CheckpointError, naming the first difference, if a checkpoint belongs to another run."""
    for key in {**current, **saved}:
        if saved.get(key) != current.get(key):
            raise CheckpointError(
                f"{checkpoint} was written with {key} = {saved.get(key)!r}, this run has {current.get(key)!r}"
                f"{_HINTS.get(key, '')}: restore the previous one, or begin another run with another output.dir"
            )


def check_num_steps(done: int, num_steps: int) -> None:
    """Raise ConfigError if a run is to end before the step of its checkpoint."""
    if done > num_steps:
        raise ConfigError(
            f"the checkpoint was written after step {done}, and the run file ends the run after step {num_steps}: "
            "raise train.steps or train.epochs"
        )


def process_settings(config: RunConfig, identity: Identity) -> dict[str, Any]:
    """Return the values that must be equal in all processes of a run, by name."""
    sections = config.model_dump(mode="json")
    teachers, rollout = sections.pop("teachers"), sections.pop("rollout")
    settings = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {"teachers": teachers, "rollout": rollout, **settings, **identity}


def check_same_settings(settings_of_ranks: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError, in all processes, if the settings of one process differ from those of the first."""
    first = settings_of_ranks[0]
    for rank, settings in enumerate(settings_of_ranks):
        for key, value in settings.items():
            if value != first[key]:
                raise ConfigError(
                    f"process 0 has {key} = {first[key]!r}, process {rank} has {value!r}: all machines need the same "
                    "run file, student and data"
                )


def check_same_teachers(before: StartValues, cards: Mapping[str, TeacherCard]) -> None:
    """Raise ConfigError if a teacher was another model before the run was resumed."""
    for name, card in cards.items():
        previous = before.get("teachers", {}).get(name, {})
        if previous and previous.get("fingerprint") != card.fingerprint:
            fingerprint = str(previous.get("fingerprint"))[:16]
            raise ConfigError(
                f"teacher {name} was {previous.get('model')} with fingerprint {fingerprint} in this run, "
                f"and is now {card.model} with {card.fingerprint[:16]}: serve the previous model again, or give "
                "the new one another name in the run file"
            )


def changed_settings(before: StartValues, config: RunConfig) -> dict[str, list[Any]]:
    """Return, by key of the run file, the previous and the present value of every setting that has changed."""
    previous, present = (dict(_flat(run)) for run in (before.get("run", {}), config.model_dump(mode="json")))
    return {key: [previous[key], value] for key, value in present.items() if key in previous and previous[key] != value}


def changed_results(changed: Iterable[str]) -> list[str]:
    """Return the keys of changed settings with which the results differ from those of a run without the change."""
    return [key for key in changed if resume_rule(key).effect == WARNED]


def resume_rule(key: str) -> ResumeRule:
    """Return the rule of a key of the run file, as `changed_settings` writes it."""
    return next(rule for rule in RESUME_RULES if any(fnmatchcase(key, pattern) for pattern in rule.keys))


def _flat(run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a run file. A start event can be damaged, so that its sections can have any value."""
    for section, values in run.items():
        if section == "teachers":
            yield section, [teacher["name"] for teacher in values]
            for teacher in values:
                yield from _with_prefix(f"teachers.{teacher['name']}", teacher)
        elif isinstance(values, Mapping):
            yield from _with_prefix(section, {key: value for key, value in values.items() if key != "sources"})
            sources = values.get("sources")
            for number, source in enumerate(sources if isinstance(sources, list) else ()):
                if isinstance(source, Mapping):
                    yield from _with_prefix(f"{section}.sources[{number}]", source)


def _with_prefix(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((f"{prefix}.{key}", value) for key, value in values.items())
