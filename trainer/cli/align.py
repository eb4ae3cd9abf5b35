"""`tutelage align`: align a teacher to a student's tokenizer on one text."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from trainer.cli.app import Json, app, one_sentence_errors, print_json, silence_libraries


@app.command()
def align(
    teacher: Annotated[str, typer.Option(help="URL of a teacher, or a model directory or name.")],
    student: Annotated[str, typer.Option(help="Model directory or name; only its tokenizer is loaded.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file.")],
    top_k: Annotated[int, typer.Option(help="Candidates per position.", min=1)] = 64,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the teacher's key.")] = None,
    window_tokens: Annotated[int, typer.Option(help="Maximum length of a window, in student tokens.", min=2)] = 4096,
    method: Annotated[
        Literal["byte_chain", "em", "min_ed"],
        typer.Option(help="Alignment; em and min_ed are those of FuseLLM, for comparison."),
    ] = "byte_chain",
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the teacher's rows and the target of each token.")
    ] = False,
    positions: Annotated[int, typer.Option(help="Number of student tokens to explain.", min=1)] = 40,
    as_json: Json = False,
) -> None:
    """Align a teacher's scores of one text to a student's tokenizer, and print coverage, bits per byte and speed."""
    with one_sentence_errors(as_json):
        from teachers.keys import key_from_environment
        from trainer.cli.align_text import AlignOptions, align_text, explain_text

        silence_libraries()
        key = key_from_environment(key_env) if key_env else None
        options = AlignOptions(teacher, student, text, top_k, key, window_tokens, method)
        if explain:
            from trainer.cli.explain_alignment import show

            explained = explain_text(options, positions)
            if as_json:
                print_json({"positions": [asdict(position) for position in explained]})
            else:
                show(explained)
            return
        figures = asdict(align_text(options))
        if as_json:
            print_json(figures)
            return
        for name, value in figures.items():
            typer.echo(f"{name:>18}  {value:,.4f}" if isinstance(value, float) else f"{name:>18}  {value:,}")
