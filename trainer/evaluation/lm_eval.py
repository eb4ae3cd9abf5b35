"""Benchmark an exported model with lm-eval, on its built-in tasks or on tasks from a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from alignment import Vocabulary
from trainer.errors import ConfigError

PACKAGES = ("lm_eval", "accelerate")  # lm-eval runs transformers models through accelerate


@dataclass(frozen=True)
class TaskOptions:
    """Settings of a run of tasks.

    include_path  folder with the user's own tasks, as YAML
    limit         number of documents per task; for trying a task, not for reporting
    device        cpu, cuda, cuda:1, …
    batch_size    sequences per forward pass
    chat          render each document with the model's chat template
    """

    include_path: Path | None = None
    limit: int | None = None
    device: str = "cpu"
    batch_size: int = 1
    chat: bool = False


def run_tasks(folder: Path, names: Sequence[str], options: TaskOptions) -> dict[str, dict[str, float]]:
    """Return the metrics of each task and group of tasks, under lm-eval's names.

    BOS is added if the model was trained with it. Raises ConfigError if a package is missing, a task is unknown, or the
    tasks cannot be run.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--tasks: {', '.join(missing)} is not installed: install the extra `eval`")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(options.include_path) if options.include_path else None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise ConfigError(
            f"--tasks: expected names of lm-eval tasks, received {', '.join(unknown) or 'none'}; "
            "`lm-eval ls tasks` lists them"
        )
    model = HFLM(
        pretrained=str(folder),
        device=options.device,
        batch_size=options.batch_size,
        trust_remote_code=False,
        add_bos_token=bool(Vocabulary.load(folder).prefix),
    )
    try:
        results = simple_evaluate(
            model,
            tasks=list(names),
            limit=options.limit,
            task_manager=manager,
            apply_chat_template=options.chat,
            log_samples=False,
        )
    except (OSError, ValueError) as error:  # a missing dataset or chat template, an invalid task
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--tasks {','.join(names)}: lm-eval cannot run them on {folder}: {reason}") from error
    assert results is not None  # it is None only on ranks other than 0
    return {name: _metrics(values) for name, values in results["results"].items()}


def _metrics(values: dict[str, object]) -> dict[str, float]:
    """Return metrics by name. lm-eval appends the name of the filter after a comma, `none` without a filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
