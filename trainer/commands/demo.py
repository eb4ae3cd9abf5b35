"""`tutelage demo`: two real models teach a third, on this machine, and a table says what it was worth.

Starts one teacher process for each [[teachers]] of recipes/demo.toml, previews, trains the student, and then a
twin on the same tokens without teachers. Whatever happens to this process, the teachers end with it: each one
stops when its standard input closes.
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
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from teachers.asking.client import TeacherClient
from teachers.errors import Unauthorized, Unavailable
from trainer.commands.bundled import BUNDLES, prepare
from trainer.commands.console import console, show_preview, show_table, watching
from trainer.commands.preview import Preview, preview
from trainer.config import LossConfig, RunConfig, TeacherConfig
from trainer.errors import UserError
from trainer.loop import RunResult, train
from trainer.run_file import load_config

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.toml"
KEY_VARIABLE = "TUTELAGE_DEMO_KEY"  # made anew each time: a teacher of somebody else's is never taken for ours
START_S = 180.0


@dataclass(frozen=True)
class DemoResult:
    """What was measured, all on the same held-out documents."""

    preview: Preview
    student: RunResult
    twin: RunResult
    seconds: float


def prepare_all(silent: bool) -> None:
    prepare((lambda _: None) if silent else console.print)


def run_demo(overrides: Sequence[str], silent: bool) -> DemoResult:
    """The whole demo; raises UserError or TeacherError with what is missing."""
    began = time.monotonic()
    prepare_all(silent)
    config = _with_key(load_config(RECIPE, overrides))
    out = Path(config.output.dir).expanduser()
    for earlier in (out / "fused", out / "twin"):
        if (earlier / "metrics.jsonl").is_file():
            shutil.rmtree(earlier)
    with served(config.teachers):
        seen = preview(config)
        if not silent:
            show_preview(seen)
        student = _train(config, out / "fused", "student with teachers", silent)
    plain = config.model_copy(update={"teachers": [], "loss": LossConfig(ce_weight=1.0)})
    twin = _train(plain, out / "twin", "twin without teachers", silent)
    return DemoResult(seen, student, twin, round(time.monotonic() - began, 1))


def _with_key(config: RunConfig) -> RunConfig:
    """The run file with a fresh key for its teachers."""
    if len(config.teachers) != len(BUNDLES):
        raise UserError(f"the demo has {len(BUNDLES)} teachers, the run file names {len(config.teachers)}")
    os.environ[KEY_VARIABLE] = secrets.token_hex(16)
    teachers = [teacher.model_copy(update={"key_env": KEY_VARIABLE}) for teacher in config.teachers]
    return config.model_copy(update={"teachers": teachers})


def _train(config: RunConfig, folder: Path, title: str, silent: bool) -> RunResult:
    """Told to end, it ends the demo too."""
    config = config.model_copy(update={"output": config.output.model_copy(update={"dir": str(folder)})})
    result = train(config, listener=None if silent else watching(title))
    if result.told_to_end:
        raise SystemExit(128 + signal.SIGTERM)
    return result


@contextmanager
def served(teachers: Sequence[TeacherConfig]) -> Iterator[None]:
    """One process per teacher, ready when the block begins and gone when it ends."""
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
    command = [sys.executable, "-m", "trainer.cli", "teach", model, "--stop-with-parent"]
    command += ["--host", str(address.hostname), "--port", str(address.port)]
    environment = os.environ | {"TUTELAGE_KEY": os.environ[KEY_VARIABLE]}
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)


async def _await_ready(processes: "Sequence[tuple[TeacherConfig, subprocess.Popen[bytes]]]") -> None:
    """Return when every teacher answers to its key; raise if a process ends or takes too long."""
    deadline = time.monotonic() + START_S
    for teacher, _ in processes:
        client = TeacherClient(teacher.name, teacher.urls[0], os.environ[KEY_VARIABLE])
        try:
            while True:
                ended = [t.name for t, p in processes if p.poll() is not None]
                if ended:
                    raise UserError(f"teacher {ended[0]} did not start; its own message is above")
                try:
                    await client.card()
                    await client.ready()
                    break
                except (Unavailable, Unauthorized) as error:  # not yet, or a stranger on the port: ours will end
                    if time.monotonic() > deadline:
                        raise UserError(f"teacher {teacher.name} was not ready in {START_S:g} s") from error
                await asyncio.sleep(0.2)
        finally:
            await client.aclose()


def show(result: DemoResult, as_json: bool) -> None:
    """The table, or the same as JSON on standard output."""
    if as_json:
        import json
        from dataclasses import asdict

        sys.stdout.write(json.dumps(asdict(result), default=str) + "\n")
        return
    show_preview(result.preview)
    rows = [
        [name, run.held_out[0][1], min(bpb for _, bpb in run.held_out), run.held_out[-1][1]]
        for name, run in (("student with teachers", result.student), ("twin without", result.twin))
    ]
    show_table("Held-out bits per byte", ["", "before", "best", "after"], rows)
    console.print(f"{result.student.steps} steps each, {result.seconds:.0f} s in all")
