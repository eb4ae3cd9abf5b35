"""`tutelage train RUN.toml`: train the student, in one process, under torchrun, or on Ray."""

import os
from dataclasses import asdict
from typing import Annotated

import typer

from trainer.cli.app import Json, Overrides, RunFile, app, one_sentence_errors, print_json, silence_libraries


@app.command()
def train(
    run: RunFile,
    sets: Overrides = [],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    stop_at: Annotated[int | None, typer.Option(help="Save and stop after this step.", min=1)] = None,
    ray_workers: Annotated[int | None, typer.Option(help="Train on Ray with this many processes.", min=1)] = None,
    max_failures: Annotated[int, typer.Option(help="Maximum restarts from the last checkpoint, on Ray.", min=0)] = 3,
    address: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster. Default: start a local one.", envvar="RAY_ADDRESS"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train the student of a run file. Under torchrun, every process runs this command."""
    from trainer.launch.torchrun import permanent_failure, recorded_failures

    if permanent_failure() is not None:  # printed by the previous attempt
        raise typer.Exit(1)
    with one_sentence_errors(as_json, result_is_output=False), recorded_failures():
        from trainer.cli.console import progress_listener
        from trainer.run_file import load_config

        silence_libraries()
        config = load_config(run, sets)
        if ray_workers is not None:
            from trainer.launch.ray_driver import train_on_ray

            result = train_on_ray(
                config, workers=ray_workers, max_failures=max_failures, resume=resume, stop_at=stop_at, address=address
            )
        else:
            from trainer.training.loop import train as run_loop

            listener = None if as_json else progress_listener("training")
            result = run_loop(config, resume=resume, stop_at=stop_at, listener=listener)
        if as_json and os.environ.get("RANK", "0") == "0":
            print_json(asdict(result) | {"model": str(result.model) if result.model else None})
        if result.terminated:
            from trainer.training.stop_signals import stopped_exit_code

            raise typer.Exit(stopped_exit_code())
