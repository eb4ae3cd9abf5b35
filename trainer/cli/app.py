"""The Typer application, the options that commands share, and how errors are printed.

Command modules import what they need inside the command function, so that `tutelage --help` loads no torch.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

# Idle OpenMP threads sleep instead of spinning, because student and teachers may share the cores of a machine. With one
# other busy process, a teacher then scores twice as many tokens (docs/log.md). OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Online multi-teacher knowledge distillation of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
RunFile = Annotated[Path, typer.Argument(help="Run file (TOML).", metavar="RUN.toml")]
Overrides = Annotated[list[str], typer.Option("--set", help="Override a key of the run file: key=value.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@contextmanager
def one_sentence_errors(as_json: bool = False, result_is_output: bool = True) -> Iterator[None]:
    """Print an error that the user can fix as one sentence on standard error and exit with 1.

    Other exceptions are bugs of this program and keep their traceback. A closed terminal, a broken pipe and a full disk
    do not end the command (trainer/cli/streams.py). A command whose output is its result then exits with 1.
    """
    from trainer.cli.streams import guard_streams, output_is_lost

    guard_streams()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        with _environment_errors(as_json), _project_errors(as_json):
            _check_working_directory()
            yield
    except KeyboardInterrupt as error:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from error
    finally:
        is_lost = output_is_lost()
    if result_is_output and is_lost:
        raise typer.Exit(1)


@contextmanager
def _project_errors(as_json: bool) -> Iterator[None]:
    """Print an error of this project as one sentence, and exit with 1."""
    from alignment import AlignmentError, TokenizerError
    from teachers.protocol.errors import TeacherError
    from trainer.errors import UserError

    try:
        yield
    except (UserError, TeacherError, AlignmentError, TokenizerError) as error:
        raise _exit_with(str(error), as_json) from error


@contextmanager
def _environment_errors(as_json: bool) -> Iterator[None]:
    """Print a lack of memory, threads or permissions as one sentence, and exit with 1. Other errors pass."""
    import trainer.plain_text  # noqa: F401  imported now: without memory, _exit_with could not import it
    from trainer.cli.environment_errors import environment_error

    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        message = environment_error(error)
        if message is None:
            raise
        raise _exit_with(message, as_json) from error


def _exit_with(message: str, as_json: bool) -> typer.Exit:
    """Print an error as one sentence, and return the exception that ends the command with 1."""
    from trainer.plain_text import one_line

    message = one_line(message)
    typer.echo(json.dumps({"error": message}) if as_json else f"error: {message}", err=True)
    return typer.Exit(1)


def _check_working_directory() -> None:
    from trainer.errors import ConfigError

    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("the working directory does not exist any more: change to another one") from error


def silence_libraries() -> None:
    """Hide the progress bars and warnings of libraries, but not their errors."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def print_json(value: Any) -> None:
    """Print one JSON document on standard output; numbers that are not finite become null."""
    from trainer.telemetry.json_text import to_json

    typer.echo(to_json(value))
