"""Run `tutelage demo`: distill two real teachers into a student on this machine, and compare it with a baseline.

The demo starts one teacher process per [[teachers]] of recipes/demo.toml, previews the fusions, trains the student, and
then trains the baseline on the same batches without teachers. A teacher process stops when its standard input closes,
and therefore when this process ends for any reason.
"""

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from teachers.client.dialects.native import NativeClient
from teachers.protocol.errors import Unauthorized, Unavailable
from trainer.cli.bundled_models import BUNDLES, prepare
from trainer.cli.console import console, progress_listener, show_preview, show_table
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.evaluation.preview import Preview, preview
from trainer.losses.config import LossConfig
from trainer.query.config import TeacherConfig
from trainer.run_file import load_config
from trainer.telemetry.json_text import to_json
from trainer.training.loop import train
from trainer.training.result import RunResult
from trainer.training.run_lock import run_lock

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.toml"
KEY_VARIABLE = "TUTELAGE_DEMO_KEY"  # a new key for each demo, so that no other server on the port is used
START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class DemoResult:
    """Results on the same held-out documents, and the total time in seconds."""

    preview: Preview
    student: RunResult
    baseline: RunResult
    seconds: float


def prepare_all(silent: bool) -> None:
    """Prepare the models and the text of the demo."""
    prepare((lambda _: None) if silent else console.print)


def run_demo(overrides: Sequence[str], silent: bool) -> DemoResult:
    """Run the demo. Raises UserError or TeacherError."""
    began = time.monotonic()
    prepare_all(silent)
    config = _with_key(load_config(RECIPE, overrides))
    out = Path(config.output.dir).expanduser()
    for previous in (out / "distilled", out / "baseline"):
        if (previous / "metrics.jsonl").is_file():
            with run_lock(previous):  # another demo may be writing to it
                shutil.rmtree(previous)
    with served(config.teachers):
        compared = preview(config)
        if not silent:
            show_preview(compared)
        student = _train(config, out / "distilled", "student with teachers", silent)
    baseline = _train(baseline_config(config), out / "baseline", "baseline without teachers", silent)
    return DemoResult(compared, student, baseline, round(time.monotonic() - began, 1))


def baseline_config(config: RunConfig) -> RunConfig:
    """Return the config of the baseline: no teachers, and early stopping at the first evaluation that is not better."""
    evaluation = config.eval.model_copy(update={"early_stopping_patience": 1})
    return config.model_copy(update={"teachers": [], "loss": LossConfig(ce_weight=1.0), "eval": evaluation})


def _with_key(config: RunConfig) -> RunConfig:
    """Return the config with a new key for its teachers, which is set in the environment."""
    if len(config.teachers) != len(BUNDLES):
        raise UserError(f"the demo has {len(BUNDLES)} teachers, the run file names {len(config.teachers)}")
    os.environ[KEY_VARIABLE] = secrets.token_hex(16)
    teachers = [teacher.model_copy(update={"key_env": KEY_VARIABLE}) for teacher in config.teachers]
    return config.model_copy(update={"teachers": teachers})


def _train(config: RunConfig, folder: Path, title: str, silent: bool) -> RunResult:
    config = config.model_copy(update={"output": config.output.model_copy(update={"dir": str(folder)})})
    result = train(config, listener=None if silent else progress_listener(title))
    if result.terminated:  # SIGTERM ends the demo too
        raise SystemExit(128 + signal.SIGTERM)
    return result


@contextmanager
def served(teachers: Sequence[TeacherConfig]) -> Iterator[None]:
    """Start one process per teacher. All are ready when the block begins, and are terminated when it ends."""
    processes: list[tuple[TeacherConfig, subprocess.Popen[bytes]]] = []
    try:
        for teacher, bundle in zip(teachers, BUNDLES, strict=True):
            processes.append((teacher, _start(teacher, bundle.name)))
        asyncio.run(_await_ready(processes))
        yield
    finally:
        for _, process in processes:
            process.terminate()
        for _, process in processes:
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _start(teacher: TeacherConfig, model: str) -> "subprocess.Popen[bytes]":
    address = urlsplit(teacher.urls[0])
    command = [sys.executable, "-m", "trainer.cli", "serve", model, "--stop-with-parent"]
    command += ["--host", str(address.hostname), "--port", str(address.port)]
    environment = os.environ | {"TUTELAGE_KEY": os.environ[KEY_VARIABLE]}
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)


async def _await_ready(processes: "Sequence[tuple[TeacherConfig, subprocess.Popen[bytes]]]") -> None:
    """Wait until every teacher accepts its key and is ready. Raises UserError if a process ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    for teacher, _ in processes:
        client = NativeClient(teacher.name, teacher.urls[0], os.environ[KEY_VARIABLE])
        try:
            while True:
                ended = [t.name for t, p in processes if p.poll() is not None]
                if ended:
                    raise UserError(f"teacher {ended[0]} did not start; its error message is above")
                try:
                    await client.card()
                    await client.ready()
                    break
                except (Unavailable, Unauthorized) as error:  # not ready, or another server has the port
                    if time.monotonic() > deadline:
                        raise UserError(f"teacher {teacher.name} was not ready in {START_TIMEOUT_S:g} s") from error
                await asyncio.sleep(0.2)
        finally:
            await client.aclose()


def show(result: DemoResult, as_json: bool) -> None:
    """Print the results as a table, or as JSON on standard output."""
    if as_json:
        sys.stdout.write(to_json(asdict(result)) + "\n")
        return
    show_preview(result.preview)
    runs = (("student with teachers", result.student), ("baseline without teachers", result.baseline))
    rows = [
        [name, run.held_out[0][1], min(bpb for _, bpb in run.held_out), run.held_out[-1][1], run.steps]
        for name, run in runs
    ]
    show_table("Held-out bits per byte", ["", "before", "best", "last", "steps"], rows)
    console.print(f"{result.seconds:.0f} s in total")
