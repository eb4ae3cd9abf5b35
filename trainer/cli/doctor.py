"""`tutelage doctor RUN.toml`: check a run file before training."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from trainer.cli.app import Json, Overrides, RunFile, app, one_sentence_errors, print_json


@app.command()
def doctor(
    run: RunFile,
    sets: Overrides = [],
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for teachers that do not respond yet (start_timeout_s), as train does.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check settings, student, data and every teacher of a run file before training."""
    with one_sentence_errors(as_json):
        from trainer.plain_text import one_line
        from trainer.run_file import load_config

        config = load_config(run, sets)
        from trainer.cli.run_checks import WARNING, examine

        findings = examine(config, wait=wait)
        if as_json:
            print_json({"ok": all(f.ok for f in findings), "findings": [asdict(f) for f in findings]})
        else:
            marks = typer.style("|", fg="green", reverse=True).split("|") if sys.stdout.isatty() else ("[[", "]]")
            for finding in findings:
                result = "warn " if finding.is_warning else "ok   " if finding.ok else "WRONG"
                detail = finding.detail.removeprefix(WARNING).removeprefix(f"{finding.subject}: ")
                typer.echo(f"{result}  {one_line(finding.subject)}: {one_line(detail)}")
                for example in finding.examples:
                    typer.echo(f"         {one_line(example.sample)}: {example.marked(*marks)}")
        if not all(finding.ok for finding in findings):
            raise typer.Exit(1)
