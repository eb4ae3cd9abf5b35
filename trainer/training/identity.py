"""The identity of a run: everything that must not change when it is resumed, or between its processes.

A checkpoint stores the identity. A run with another identity cannot be resumed from it. Other settings may change on
--resume; the changes are reported.
"""

from collections.abc import Iterator, Mapping, Sequence
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

_HINTS = {"samples": ": other texts, or other settings in [data] or eval.held_out_documents"}


def run_identity(config: RunConfig, base_weights: str, corpus: Corpus) -> Identity:
    """Return the identity as JSON values: base weights, trained parameters, samples and their order, evaluation.

    base_weights is the hash that `base_weights_sha256` returns.
    """
    return {
        "train.seed": config.train.seed,
        "train.batch_samples": config.train.batch_samples,
        "student.train_layers": config.student.train_layers,
        "student.lora": config.student.lora.model_dump() if config.student.lora else None,
        "fusion.method": config.fusion.method,
        "student weights": base_weights[:16],
        "data.sources.weight": [source.weight for source in config.data.sources],
        "samples": corpus.fingerprint[:16],
        "eval.max_samples": config.eval.max_samples,
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
    for key, value in current.items():
        if saved.get(key) != value:
            difference = f"{checkpoint} was written with {key} = {saved.get(key)!r}, this run has {value!r}"
            raise CheckpointError(difference + _HINTS.get(key, ""))


def process_settings(config: RunConfig, identity: Identity) -> dict[str, Any]:
    """Return the values that must be equal in all processes of a run, by name."""
    sections = config.model_dump(mode="json")
    teachers = sections.pop("teachers")
    settings = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {"teachers": teachers, **settings, **identity}


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
        if previous and previous["fingerprint"] != card.fingerprint:
            raise ConfigError(
                f"teacher {name} was {previous['model']} with fingerprint {previous['fingerprint'][:16]} in this run, "
                f"and is now {card.model} with {card.fingerprint[:16]}: serve the previous model again, or give "
                "the new one another name in the run file"
            )


def changed_settings(before: StartValues, config: RunConfig) -> dict[str, list[Any]]:
    """Return, by key of the run file, the previous and the present value of every setting that has changed."""
    previous, present = (dict(_flat(run)) for run in (before.get("run", {}), config.model_dump(mode="json")))
    return {key: [previous[key], value] for key, value in present.items() if key in previous and previous[key] != value}


def _flat(run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, values in run.items():
        if section == "teachers":
            yield section, [teacher["name"] for teacher in values]
            yield from _flat({f"teachers.{teacher['name']}": teacher for teacher in values})
        else:
            yield from ((f"{section}.{key}", value) for key, value in values.items())
