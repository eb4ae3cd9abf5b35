"""The command `tutelage`. Each command imports what it needs when it runs, so that --help is immediate."""

import json
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

# Student and teachers may share a machine: a thread that waits for another one leaves its core to them. Read by OpenMP
# when torch is loaded. Beside one busy process a teacher then scores twice the tokens: docs/log.md has what was seen.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Make one language model learn from many, online.", no_args_is_help=True, pretty_exceptions_enable=False
)
RunFile = Annotated[Path, typer.Argument(help="Run file (TOML).", metavar="RUN.toml")]
Overrides = Annotated[list[str], typer.Option("--set", help="Override a key of the run file: key=value.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables for people.")]


@contextmanager
def _one_sentence_errors(as_json: bool = False) -> Iterator[None]:
    """What a user can mend is one sentence on standard error and exit code 1; anything else is our fault and shows."""
    from alignment import AlignmentError, TokenizerError
    from teachers.errors import TeacherError
    from trainer.errors import UserError

    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        yield
    except (UserError, TeacherError, AlignmentError, TokenizerError) as error:
        message = " ".join(str(error).split())
        typer.echo(json.dumps({"error": message}) if as_json else f"error: {message}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from error


def _quiet() -> None:
    """Keep progress bars of libraries off the screen; their errors still show."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, allow_nan=False))


def _json_object(text: str, option: str) -> dict[str, Any]:
    from trainer.errors import UserError

    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{option}: expected a JSON object, received {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f'{option}: expected a JSON object like {{"enforce_eager": true}}, received {text!r}')
    return value


@app.command()
def demo(
    prepare: Annotated[bool, typer.Option("--prepare", help="Only make the models and the text.")] = False,
    sets: Overrides = [],
    as_json: Json = False,
) -> None:
    """Two real models teach a third: fetch them, serve them, train, and show what it was worth."""
    with _one_sentence_errors(as_json):
        from trainer.commands import demo as room

        _quiet()
        if prepare:
            room.prepare_all(as_json)
        else:
            room.show(room.run_demo(sets, as_json), as_json)


@app.command()
def teach(
    model: Annotated[str, typer.Argument(help="Model directory, or a name under $TUTELAGE_CACHE/models.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8101,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Type to compute in.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … (transformers)")] = "cpu",
    bos: Annotated[Literal["auto", "yes", "no"], typer.Option(help="BOS in front of every text.")] = "auto",
    max_tokens: Annotated[int | None, typer.Option(help="Longest sequence to take.")] = None,
    max_top_k: Annotated[int, typer.Option(help="Largest K to answer.")] = 128,
    batch_tokens: Annotated[
        int, typer.Option(help="Padded tokens in one forward pass; 0: one sequence each (transformers).")
    ] = 0,
    engine: Annotated[Literal["transformers", "vllm"], typer.Option(help="What runs the model.")] = "transformers",
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share the model (vllm).", min=1)] = 1,
    vllm_args: Annotated[str, typer.Option(help="More of vLLM's own engine arguments.", metavar="JSON")] = "{}",
    key_file: Annotated[Path | None, typer.Option(help="File with the bearer keys to take, one a line.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM); then HTTPS only.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of --tls-cert (PEM).")] = None,
    max_sequences: Annotated[int, typer.Option(help="Most sequences in a request.", min=1)] = 64,
    max_request_tokens: Annotated[int, typer.Option(help="Most tokens in a request.", min=2)] = 1 << 16,
    max_queued_tokens: Annotated[int, typer.Option(help="Most tokens that wait at once.", min=2)] = 1 << 19,
    max_body_bytes: Annotated[int, typer.Option(help="Longest request body.", min=1)] = 1 << 20,
    max_seconds: Annotated[float, typer.Option(help="Longest work on a request.", min=0.001)] = 600.0,
    drain_s: Annotated[float, typer.Option(help="Time for what is under way when told to stop.", min=0)] = 10.0,
    request_log: Annotated[bool, typer.Option(help="One line for each request, without texts.")] = False,
    stop_with_parent: Annotated[bool, typer.Option(help="End when standard input closes.")] = False,
) -> None:
    """Serve a model as a teacher."""
    with _one_sentence_errors():
        from teachers.engine import EngineOptions
        from teachers.limits import Limits
        from teachers.serving.teach import TeachOptions, teach_model
        from trainer.places import find_model

        _quiet()
        further = _json_object(vllm_args, "--vllm-args")
        how = EngineOptions(dtype, device, bos, max_tokens, max_top_k, batch_tokens, tensor_parallel, further)
        limits = Limits(max_sequences, max_request_tokens, max_queued_tokens, max_body_bytes, max_seconds=max_seconds)
        serving = (tls_cert, tls_key, drain_s, request_log, stop_with_parent)
        options = TeachOptions(host, port, engine, how, key_file, limits, *serving)
        teach_model(find_model(model), options, lambda line: typer.echo(line, err=True))


@app.command()
def serve(
    run: RunFile,
    sets: Overrides = [],
    host: Annotated[str, typer.Option(help="Address that Ray's proxies listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that they listen on.", min=1, max=65535)] = 8000,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster: HOST:PORT or auto; else a local one.", envvar="RAY_ADDRESS")
    ] = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Print what `serve run` takes, and start nothing.")
    ] = False,
) -> None:
    """Serve the teachers of a run file on Ray Serve."""
    with _one_sentence_errors():
        from trainer.commands.serve import served_teachers
        from trainer.run_file import load_config

        teachers = served_teachers(load_config(run, sets))
        if only_print:
            import yaml

            from teachers.ray_options import serve_config

            typer.echo(yaml.safe_dump(serve_config(teachers, host, port), sort_keys=False), nl=False)
            return
        _quiet()
        if address is None:  # Ray listens on all interfaces and runs what it is sent; read when it is imported
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        from teachers.serving.ray_serve import serve_teachers

        serve_teachers(teachers, host, port, address)


@app.command()
def train(
    run: RunFile,
    sets: Overrides = [],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    stop_at: Annotated[int | None, typer.Option(help="Save and leave after this step.", min=1)] = None,
    ray_workers: Annotated[int | None, typer.Option(help="Train on Ray with this many processes.", min=1)] = None,
    max_failures: Annotated[int, typer.Option(help="Times to begin again from a checkpoint, on Ray.", min=0)] = 3,
    address: Annotated[str | None, typer.Option(help="Ray cluster; else a local one.", envvar="RAY_ADDRESS")] = None,
    as_json: Json = False,
) -> None:
    """Train the student of a run file. Under torchrun, every process of it runs this."""
    with _one_sentence_errors(as_json):
        from trainer.commands.console import watching
        from trainer.run_file import load_config

        _quiet()
        config = load_config(run, sets)
        if ray_workers is not None:
            from trainer.launch import train_on_ray

            result = train_on_ray(
                config, workers=ray_workers, max_failures=max_failures, resume=resume, stop_at=stop_at, address=address
            )
        else:
            from trainer.loop import train as run_loop

            listener = None if as_json else watching("training")
            result = run_loop(config, resume=resume, stop_at=stop_at, listener=listener)
        if as_json and os.environ.get("RANK", "0") == "0":
            _print_json(asdict(result) | {"model": str(result.model) if result.model else None})
        if result.told_to_end:
            raise typer.Exit(128 + signal.SIGTERM)


@app.command()
def doctor(run: RunFile, sets: Overrides = [], as_json: Json = False) -> None:
    """Check student, data and every teacher of a run file, before anything is spent."""
    with _one_sentence_errors(as_json):
        from trainer.run_file import load_config

        config = load_config(run, sets)
        from trainer.commands.doctor import examine

        findings = examine(config)
        if as_json:
            _print_json({"ok": all(f.ok for f in findings), "findings": [asdict(f) for f in findings]})
        else:
            for finding in findings:
                typer.echo(f"{'ok   ' if finding.ok else 'WRONG'}  {finding.subject}: {finding.detail}")
        if not all(finding.ok for finding in findings):
            raise typer.Exit(1)


@app.command()
def preview(run: RunFile, sets: Overrides = [], as_json: Json = False) -> None:
    """Bits per byte of each teacher and each fusion on the held-out text: is this fusion worth running?"""
    with _one_sentence_errors(as_json):
        from trainer.commands.console import show_preview
        from trainer.run_file import load_config

        _quiet()
        config = load_config(run, sets)
        from trainer.commands.preview import preview as look

        result = look(config)
        if as_json:
            _print_json(asdict(result))
        else:
            show_preview(result)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or one with fused/ and twin/.", metavar="DIR")],
    twin: Annotated[
        Path | None, typer.Option(help="The run to compare with: a folder, or its name beside DIR.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the page goes; DIR/report.html if absent.")] = None,
    as_json: Json = False,
) -> None:
    """Write what came of a run, beside its twin, as one HTML page with curves."""
    with _one_sentence_errors(as_json):
        from trainer.reports.report import make_report, save_page

        made = make_report(folder, twin)
        path = out or folder / "report.html"
        save_page(made.page, path)
        if as_json:
            beside = asdict(made.comparison) if made.comparison else None
            _print_json({"run": asdict(made.summary), "comparison": beside, "page": str(path)})
        else:
            typer.echo(f"{made.result}\n{path}")


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Exported model, as model/ of a run's folder.", metavar="DIR")],
    run: Annotated[Path | None, typer.Option(help="Run file whose held-out text is measured on.")] = None,
    sets: Overrides = [],
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, by name: a,b. Needs the extra eval.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own, as YAML.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many documents of each task.", min=1)] = None,
    device: Annotated[str, typer.Option(help="Where tasks run: cpu, cuda, cuda:1, …")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Sequences at once in tasks.", min=1)] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Write tasks as chats, by the model's own template.")] = False,
    as_json: Json = False,
) -> None:
    """Measure an exported model: bits per byte on the held-out text of a run file, or tasks of lm-eval, or both."""
    with _one_sentence_errors(as_json):
        _quiet()
        from trainer.commands.console import show_evaluation
        from trainer.errors import UserError
        from trainer.results.evaluate import evaluate_folder, figures
        from trainer.results.tasks import TaskOptions, run_tasks
        from trainer.run_file import load_config

        if run is None and tasks is None:
            raise UserError("there is nothing to measure on: give --run RUN.toml, or --tasks with names of lm-eval")
        held_out = figures(evaluate_folder(folder, load_config(run, sets))) if run else {}
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        options = TaskOptions(include_path, limit, device, batch_size, chat)
        results = run_tasks(folder, names, options) if tasks is not None else {}
        if as_json:
            _print_json(held_out | {"tasks": results})
        else:
            show_evaluation(held_out, results)


@app.command()
def align(
    teacher: Annotated[str, typer.Option(help="Address of a served teacher, or a model directory or name.")],
    student: Annotated[str, typer.Option(help="Model directory or name; only its tokenizer is read.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file.")],
    top_k: Annotated[int, typer.Option(help="Candidates at every position.", min=1)] = 64,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the teacher's key.")] = None,
    window_tokens: Annotated[int, typer.Option(help="Longest window, in student tokens.", min=2)] = 4096,
    method: Annotated[
        Literal["chain", "em", "min_ed"], typer.Option(help="Ours, or one of the paper's two.")
    ] = "chain",
    explain: Annotated[bool, typer.Option("--explain", help="Show position by position what goes where.")] = False,
    positions: Annotated[int, typer.Option(help="How many student tokens to explain.", min=1)] = 40,
    as_json: Json = False,
) -> None:
    """Align one teacher's answers for a text to a student's tokenizer, and say how much arrives and how fast."""
    with _one_sentence_errors(as_json):
        from teachers.keys import key_from_environment
        from trainer.commands.align import AlignOptions, align_text, explain_text

        _quiet()
        key = key_from_environment(key_env) if key_env else None
        options = AlignOptions(teacher, student, text, top_k, key, window_tokens, method)
        if explain:
            from trainer.commands.explain import show

            explained = explain_text(options, positions)
            if as_json:
                _print_json({"positions": [asdict(e) for e in explained]})
            else:
                show(explained)
            return
        figures = asdict(align_text(options))
        if as_json:
            _print_json({name: value if math.isfinite(value) else None for name, value in figures.items()})
        else:
            for name, value in figures.items():
                typer.echo(f"{name:>18}  {value:,.4f}" if isinstance(value, float) else f"{name:>18}  {value:,}")


if __name__ == "__main__":
    app()
