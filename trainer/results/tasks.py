"""Benchmarks of an exported model through lm-eval: its own tasks, or those of a folder. Imports lm_eval."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from alignment import Vocabulary
from trainer.errors import ConfigError

PACKAGES = ("lm_eval", "accelerate")  # lm-eval runs transformers models through accelerate


@dataclass(frozen=True)
class TaskOptions:
    """How to run tasks.

    include_path  folder with tasks of one's own, as YAML
    limit         only so many documents of each task: to try it, not to report
    device        cpu, cuda, cuda:1, …
    batch_size    sequences at once
    chat          write each document as a chat, by the model's own template
    """

    include_path: Path | None = None
    limit: int | None = None
    device: str = "cpu"
    batch_size: int = 1
    chat: bool = False


def run_tasks(folder: Path, names: Sequence[str], options: TaskOptions) -> dict[str, dict[str, float]]:
    """The metrics of each task, and of each group of them, by lm-eval's own names.

    BOS stands in front where the model was trained with it. Raises ConfigError for what is not installed, not known, or
    cannot be read.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--tasks: {', '.join(missing)} is not installed: install Tutelage's extra eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(options.include_path) if options.include_path else None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise ConfigError(f"--tasks: lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    model = HFLM(
        pretrained=str(folder),
        device=options.device,
        batch_size=options.batch_size,
        add_bos_token=bool(Vocabulary.load(folder).prefix),
    )
    try:
        found = simple_evaluate(
            model,
            tasks=list(names),
            limit=options.limit,
            task_manager=manager,
            apply_chat_template=options.chat,
            log_samples=False,
        )
    except (OSError, ValueError) as error:  # a data set that is not there, a task or template that does not fit
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--tasks {','.join(names)}: lm-eval cannot run them on {folder}: {reason}") from error
    assert found is not None  # only where there are several processes
    return {name: _figures(values) for name, values in found["results"].items()}


def _figures(values: dict[str, object]) -> dict[str, float]:
    """Metrics by name; lm-eval puts the filter of the answers behind a comma, and `none` where there is none."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
