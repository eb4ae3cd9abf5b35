"""`tutelage serve-ray RUN.toml`: serve the teachers of a run file on Ray Serve."""

import os
from typing import Annotated

import typer

from trainer.cli.app import Overrides, RunFile, app, one_sentence_errors, silence_libraries


@app.command("serve-ray")
def serve_ray(
    run: RunFile,
    sets: Overrides = [],
    host: Annotated[str, typer.Option(help="Address on which Ray's proxies listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port on which Ray's proxies listen.", min=1, max=65535)] = 8000,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster (HOST:PORT or auto). Default: start a local one.", envvar="RAY_ADDRESS"),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace applications of the same names on the cluster.")
    ] = False,
    only_print: Annotated[
        bool, typer.Option("--print", help="Print the configuration for `serve run` and exit.")
    ] = False,
) -> None:
    """Serve the teachers of a run file on Ray Serve."""
    with one_sentence_errors():
        from trainer.cli.ray_teachers import served_teachers
        from trainer.run_file import load_config

        teachers = served_teachers(load_config(run, sets))
        if only_print:
            import yaml

            from teachers.server.ray_options import serve_config

            typer.echo(yaml.safe_dump(serve_config(teachers, host, port), sort_keys=False), nl=False)
            return
        silence_libraries()
        if address is None:  # a local Ray listens on all interfaces and runs submitted code; ray reads this on import
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        from teachers.server.ray_applications import serve_teachers

        serve_teachers(teachers, host, port, address, replace)
