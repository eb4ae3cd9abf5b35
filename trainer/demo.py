"""`tutelage demo`: two real models teach a third, on this machine, and a table says what it was worth.

Starts one teacher process for each [[teachers]] of recipes/demo.toml, previews, trains the student, and then a
twin on the same tokens without teachers. Whatever happens to this process, the teachers end with it: each one
stops when its standard input closes.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from trainer.bundled import BUNDLES, prepare
from trainer.config import RunConfig, TeacherConfig, load_config
from trainer.console import console, show_preview, show_table, watching
from trainer.errors import UserError
from trainer.loop import RunResult, train
from trainer.preview import Preview, preview

RECIPE = Path(__file__).parent.parent / "recipes" / "demo.toml"
MODELS = {"smollm2": BUNDLES[0].name, "gemma": BUNDLES[1].name}
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
    config = load_config(RECIPE, overrides)
    out = Path(config.output.dir)
    for earlier in (out / "fused", out / "twin"):
        shutil.rmtree(earlier, ignore_errors=True)
    with served(config.teachers):
        seen = preview(config)
        if not silent:
            show_preview(seen)
        student = _train(config, out / "fused", "student with teachers", silent)
    plain = config.model_copy(update={"teachers": [], "loss": config.loss.model_copy(update={"ce_weight": 1.0})})
    twin = _train(plain, out / "twin", "twin without teachers", silent)
    return DemoResult(seen, student, twin, round(time.monotonic() - began, 1))


def _train(config: RunConfig, folder: Path, title: str, silent: bool) -> RunResult:
    config = config.model_copy(update={"output": config.output.model_copy(update={"dir": str(folder)})})
    with watching(title, silent) as listener:
        return train(config, listener=listener)


@contextmanager
def served(teachers: Sequence[TeacherConfig]) -> Iterator[None]:
    """One process per teacher, ready when the block begins and gone when it ends."""
    processes: list[tuple[TeacherConfig, subprocess.Popen[bytes]]] = []
    try:
        for teacher in teachers:
            processes.append((teacher, _start(teacher)))
        for teacher, process in processes:
            _await_ready(teacher, process)
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


def _start(teacher: TeacherConfig) -> "subprocess.Popen[bytes]":
    address = urlsplit(teacher.urls[0])
    command = [sys.executable, "-m", "trainer.cli", "teach", MODELS[teacher.name], "--stop-with-parent"]
    command += ["--host", str(address.hostname), "--port", str(address.port)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _await_ready(teacher: TeacherConfig, process: "subprocess.Popen[bytes]") -> None:
    """Return when /ready answers; raise if the process ends or takes too long."""
    import asyncio

    from teachers.client import TeacherClient
    from teachers.errors import Unavailable

    async def poll() -> None:
        client = TeacherClient(teacher.name, teacher.urls[0])
        deadline = time.monotonic() + START_S
        try:
            while True:
                if process.poll() is not None:
                    raise UserError(f"teacher {teacher.name} did not start; its own message is above")
                try:
                    return await client.ready()
                except Unavailable as error:
                    if time.monotonic() > deadline:
                        raise UserError(f"teacher {teacher.name} was not ready in {START_S:g} s") from error
                await asyncio.sleep(0.2)
        finally:
            await client.aclose()

    asyncio.run(poll())


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
