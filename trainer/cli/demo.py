"""`tutelage demo`: the whole pipeline on two real models."""

from typing import Annotated

import typer

from trainer.cli.app import Json, Overrides, app, one_sentence_errors, silence_libraries


@app.command()
def demo(
    prepare: Annotated[bool, typer.Option("--prepare", help="Only prepare the models and the text.")] = False,
    sets: Overrides = [],
    as_json: Json = False,
) -> None:
    """Distil two real models into a third one: download, serve, preview, train, and compare with a baseline."""
    with one_sentence_errors(as_json, result_is_output=False):
        from trainer.cli.demo_run import prepare_all, run_demo, show

        silence_libraries()
        if prepare:
            prepare_all(as_json)
        else:
            show(run_demo(sets, as_json), as_json)
