"""`tutelage preview RUN.toml`: compare teachers and fusions on held-out text."""

from dataclasses import asdict

from trainer.cli.app import Json, Overrides, RunFile, app, one_sentence_errors, print_json, silence_libraries


@app.command()
def preview(run: RunFile, sets: Overrides = [], as_json: Json = False) -> None:
    """Compare every teacher and every fusion method on held-out text, in bits per byte."""
    with one_sentence_errors(as_json):
        from trainer.cli.console import show_preview
        from trainer.run_file import load_config

        silence_libraries()
        config = load_config(run, sets)
        from trainer.evaluation.preview import preview as run_preview

        result = run_preview(config)
        if as_json:
            print_json(asdict(result))
        else:
            show_preview(result)
