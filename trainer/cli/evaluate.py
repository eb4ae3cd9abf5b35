"""`tutelage eval DIR`: evaluate an exported model."""

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.app import Json, Overrides, app, one_sentence_errors, print_json, silence_libraries


@app.command("eval")
def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="Exported model, for example model/ in the folder of a run.", metavar="DIR")
    ],
    run: Annotated[Path | None, typer.Option(help="Run file whose held-out text is used.")] = None,
    sets: Overrides = [],
    tasks: Annotated[str | None, typer.Option(help="Comma-separated lm-eval tasks. Requires the extra `eval`.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with additional tasks (YAML).")] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of documents per task.", min=1)] = None,
    device: Annotated[str, typer.Option(help="Device for tasks: cpu, cuda, cuda:1, …")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass in tasks.", min=1)] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Render tasks with the model's chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Evaluate an exported model: bits per byte on the held-out text of a run file, tasks of lm-eval, or both."""
    with one_sentence_errors(as_json):
        silence_libraries()
        from trainer.cli.console import show_evaluation
        from trainer.errors import UserError
        from trainer.evaluation.bits_per_byte import evaluate_folder, figures
        from trainer.evaluation.lm_eval import TaskOptions, run_tasks
        from trainer.run_file import load_config

        if run is None and tasks is None:
            raise UserError("nothing to evaluate on: give --run RUN.toml, or --tasks with the names of lm-eval tasks")
        held_out = figures(evaluate_folder(folder, load_config(run, sets))) if run else {}
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        options = TaskOptions(include_path, limit, device, batch_size, chat)
        results = run_tasks(folder, names, options) if tasks is not None else {}
        if as_json:
            print_json(held_out | {"tasks": results})
        else:
            show_evaluation(held_out, results)
