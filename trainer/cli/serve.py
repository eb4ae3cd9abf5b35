"""`tutelage serve MODEL`: serve one model as a teacher, or with --rollouts as a writer of rollouts."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from teachers.engines import DEFAULT_ENGINE, ENGINES
from trainer.cli.app import app, one_sentence_errors, silence_libraries

# Options that a rollout server does not use. Those of the engine transformers are unknown to vLLM.
ONLY_TEACHERS: tuple[str, ...] = ("engine", "max_sequences", "max_request_tokens", "max_queued_tokens")
ONLY_TEACHERS += ("max_body_bytes", "max_seconds", "drain_s", "request_log", "stop_with_parent")


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model directory, or a name under $TUTELAGE_CACHE/models.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8101,
    engine: Annotated[
        str, typer.Option(help="Library that runs the model.", metavar="|".join(ENGINES))
    ] = DEFAULT_ENGINE,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"] | None,
        typer.Option(
            help="Data type to compute in. auto: bfloat16 if it is native to the device.", show_default="auto"
        ),
    ] = None,
    bos: Annotated[
        Literal["auto", "yes", "no"] | None, typer.Option(help="Whether BOS precedes every text.", show_default="auto")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest sequence to accept, in tokens.", show_default="the model's limit")
    ] = None,
    max_top_k: Annotated[int | None, typer.Option(help="Largest K to return.", show_default="128")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … (transformers)", show_default="cpu")] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens per forward pass, with padding; 0: one sequence (transformers).", show_default="0"),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="GPUs that share the model (vllm).", show_default="1")
    ] = None,
    vllm_args: Annotated[str | None, typer.Option(help="Additional engine arguments (vllm).", metavar="JSON")] = None,
    rollouts: Annotated[
        bool, typer.Option("--rollouts", help="Serve a student that writes rollouts, with vLLM; needs --sync-dir.")
    ] = False,
    sync_dir: Annotated[
        Path | None, typer.Option(help="Directory below which new weights are read (--rollouts).")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with the bearer keys to accept, one per line.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM); enables HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of --tls-cert (PEM).")] = None,
    max_sequences: Annotated[int, typer.Option(help="Maximum number of sequences per request.", min=1)] = 64,
    max_request_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per request.", min=2)] = 1 << 16,
    max_queued_tokens: Annotated[int, typer.Option(help="Maximum number of queued tokens.", min=2)] = 1 << 19,
    max_body_bytes: Annotated[int, typer.Option(help="Maximum size of a request body, in bytes.", min=1)] = 1 << 20,
    max_seconds: Annotated[float, typer.Option(help="Time limit of a request, in seconds.", min=0.001)] = 600.0,
    drain_s: Annotated[float, typer.Option(help="Time for requests in flight at shutdown, in seconds.", min=0)] = 10.0,
    request_log: Annotated[bool, typer.Option(help="Log one line per request, without texts.")] = False,
    stop_with_parent: Annotated[bool, typer.Option(help="Stop when standard input closes.")] = False,
) -> None:
    """Serve a model as a teacher."""
    with one_sentence_errors(result_is_output=False):
        from teachers.engines import engine_options
        from teachers.server.limits import Limits
        from trainer.errors import UserError

        if model.endswith(".toml"):
            raise UserError(
                f"{model} is a run file, expected a model: `tutelage serve-ray {model}` serves its teachers"
            )
        options = {
            "dtype": dtype,
            "bos": bos,
            "max_tokens": max_tokens,
            "max_top_k": max_top_k,
            "device": device,
            "batch_tokens": batch_tokens,
            "tensor_parallel": tensor_parallel,
            "vllm_args": None if vllm_args is None else _json_object(vllm_args, "--vllm-args"),
        }
        given = {name: value for name, value in options.items() if value is not None}
        if rollouts:
            _refuse_options_without_effect(context, engine)
            _serve_rollouts(model, sync_dir, given, host=host, port=port, key_file=key_file, tls=(tls_cert, tls_key))
        if sync_dir is not None:
            raise UserError("--sync-dir is an option of --rollouts")
        validated = engine_options(engine, given)  # before the imports that load torch

        from teachers.server.serve import ServerOptions, serve_model
        from trainer.paths import resolve_model_dir

        silence_libraries()
        limits = Limits(max_sequences, max_request_tokens, max_queued_tokens, max_body_bytes, max_seconds=max_seconds)
        process = (tls_cert, tls_key, drain_s, request_log, stop_with_parent)
        server_options = ServerOptions(validated, host, port, key_file, limits, *process)
        serve_model(resolve_model_dir(model), server_options, lambda line: typer.echo(line, err=True))


def _refuse_options_without_effect(context: typer.Context, engine: str) -> None:
    """Raise UserError for a given option that a rollout server does not use."""
    from trainer.errors import UserError

    for name in ONLY_TEACHERS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and (name, engine) != ("engine", "vllm"):
            raise UserError(f"--{name.replace('_', '-')} has no effect with --rollouts: leave it out")


def _serve_rollouts(
    model: str,
    sync_dir: Path | None,
    given: dict[str, Any],
    *,
    host: str,
    port: int,
    key_file: Path | None,
    tls: tuple[Path | None, Path | None],
) -> NoReturn:
    """Execute a vLLM server for rollouts in place of this process. Raises UserError or TeacherError."""
    from teachers.engines import engine_options
    from teachers.server.rollout_options import RolloutServerOptions, run_rollout_server
    from trainer.errors import UserError
    from trainer.paths import resolve_model_dir

    if sync_dir is None:
        raise UserError("--rollouts needs --sync-dir, the directory below which the trainer writes new weights")
    if "bos" in given:
        raise UserError("--bos is not an option of --rollouts: a prompt contains its BOS token")
    options = RolloutServerOptions(engine_options("vllm", given), sync_dir, host, port, key_file, *tls)
    run_rollout_server(resolve_model_dir(model), options)


@app.command(hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def teach() -> None:
    """Fail with the name of the command that serves a model."""
    with one_sentence_errors():
        from trainer.errors import UserError

        raise UserError("there is no command `tutelage teach`: use `tutelage serve MODEL`")


def _json_object(text: str, option: str) -> dict[str, Any]:
    from trainer.errors import UserError

    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{option}: expected a JSON object, received {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f'{option}: expected a JSON object like {{"enforce_eager": true}}, received {text!r}')
    return value
